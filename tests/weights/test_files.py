"""Weights files are read or refused by name, and nothing in them is ever executed."""

import argparse
import io
import json
import math
import os
import pickle
import random
import shlex
import signal
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.weights.networks import NAME, TINY, equal, write
from vitdistill.errors import DataError, UserError
from vitdistill.storage.manifest import read_manifest
from vitdistill.weights.create import create_model
from vitdistill.weights.files import is_weights, load_state_dict


def torch_bytes(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def refused(path: Path, kind: type[UserError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        load_state_dict(path)
    sentence = str(caught.value)
    assert "\n" not in sentence and str(path) in sentence and sentence.count("Traceback") == 0
    return sentence


STATE = {"blocks.0.weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)}


@pytest.mark.parametrize(
    "wrapper",
    [
        None,
        "model",
        "state_dict",
        "model_ema",
        "model_state_dict",
        "net",
        "network",
        "module",
        "ema",
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model.", "backbone."])
@pytest.mark.parametrize("suffix", [".pth", ".tar", ".ckpt"])
def test_wrapped_and_prefixed_files_load(tmp_path, wrapper, prefix, suffix):
    content = {prefix + key: value for key, value in STATE.items()}
    path = tmp_path / f"w{suffix}"
    wrapped = {"ema": {"decay": 0.9}, wrapper: content, "epoch": 3} if wrapper else content
    for whole in (wrapped, {"model": wrapped}):
        path.write_bytes(torch_bytes(whole))
        assert equal(load_state_dict(path), STATE)


def test_the_average_is_preferred_and_compiled_blocks_are_unwrapped(tmp_path):
    other = {key: value + 1 for key, value in STATE.items()}
    inner = {key.replace("blocks.0.", "blocks.0._orig_mod."): STATE[key] for key in STATE}
    (tmp_path / "w.pth").write_bytes(torch_bytes({"state_dict": other, "state_dict_ema": inner}))
    assert equal(load_state_dict(tmp_path / "w.pth"), STATE)
    twice = {"a": torch.ones(1), "module.a": torch.ones(1)}
    (tmp_path / "twice.pth").write_bytes(torch_bytes(twice))
    assert "twice" in refused(tmp_path / "twice.pth")


def test_safetensors_load_under_either_name(tmp_path):
    for name in ("w.safetensors", "w.bin"):
        (tmp_path / name).write_bytes(safetensors.torch.save(STATE))
        assert equal(load_state_dict(tmp_path / name), STATE)


def header(entries: dict, size: int) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def floats(count: int, *offsets: int) -> dict:
    return {"dtype": "F32", "shape": [count], "data_offsets": list(offsets)}


OVERLAP = header({"a": floats(2, 0, 8), "b": floats(2, 4, 12)}, 12)
NO_WEIGHTS = {
    "empty.pth": (b"", "is empty"),
    "empty.safetensors": (b"", "is empty"),
    "page.pth": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
    "page.safetensors": (b"<html>", "web page"),
    "pointer.bin": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "noise.pth": (random.Random(0).randbytes(3000), "no weights file"),
    "noise.safetensors": (random.Random(0).randbytes(3000), "no weights file"),
    "weights.npz": (b"PK\x03\x04", "convert to .safetensors"),
    "list.pth": (torch_bytes([torch.ones(1)]), "holds no weights"),
    "numbers.pth": (torch_bytes({"a": 1}), "holds no weights"),
    "nothing.pth": (torch_bytes({}), "holds no weights"),
    "huge.safetensors": ((2**62).to_bytes(8, "little") + b"{}", "no weights file"),
    "overlap.safetensors": (OVERLAP, "no weights file"),
    "shape.safetensors": (header({"a": floats(9, 0, 8)}, 8), "no weights file"),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_files_that_are_no_weights_are_one_sentence(tmp_path, name):
    content, sentence = NO_WEIGHTS[name]
    (tmp_path / name).write_bytes(content)
    assert sentence in refused(tmp_path / name)


def test_folders_and_missing_files_are_told_apart(tmp_path):
    assert "no weights file" in refused(tmp_path / "missing.pth")
    (tmp_path / "dir.pth").mkdir()
    assert "is a folder" in refused(tmp_path / "dir.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_cut_is_refused_in_one_sentence(tmp_path, kind):
    state = {"a": torch.randn(50), "b": torch.randn(3, 3)}
    data, path = safetensors.torch.save(state), tmp_path / "w.safetensors"
    if kind != "safetensors":
        data = torch_bytes(state, _use_new_zipfile_serialization=kind == "zip")
        path = tmp_path / "w.pth"
    rng = random.Random(kind)
    for cut in [1, 7, 8, 9, 20, len(data) - 1, *(rng.randrange(1, len(data)) for _ in range(40))]:
        path.write_bytes(data[:cut])
        refused(path)


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return (os.system, (f"touch {shlex.quote(self.canary)}",))


def malicious(payload: Payload) -> dict[str, bytes]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps(payload))
        zipped.writestr("archive/version", "3\n")
    return {
        "a.pth": torch_bytes({"model": {"w": torch.ones(1)}, "args": payload}),
        "b.pt": torch_bytes(payload),
        "c.bin": torch_bytes({"w": payload}, _use_new_zipfile_serialization=False),
        "d.tar": pickle.dumps(payload),
        "e.pth": pickle.dumps({"w": payload}, protocol=0),
        "f.safetensors": torch_bytes(payload),
        "g.safetensors": pickle.dumps(payload),
        "h.pth": archive.getvalue(),
    }


def test_a_pickle_is_never_executed(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists(), "the payload works"
    canary.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME, "pretrained_cfg": {}}))
    for name, content in malicious(Payload(canary)).items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name)
        weights = "model.safetensors" if name.endswith("safetensors") else "pytorch_model.bin"
        (tmp_path / weights).write_bytes(content)
        for num_classes in (None, 3):
            with pytest.raises(UserError):
                create_model(str(tmp_path), num_classes=num_classes)
        (tmp_path / weights).unlink()
    assert not canary.exists()


class Odd(torch.nn.Module):
    """Of no library: its file cannot be read without its code."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(3.0))
        self.tied = self.w


def script() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    return buffer.getvalue()


def test_a_program_is_told_from_weights_alone(tmp_path):
    files = {"script.pt": script(), "w.pt": torch_bytes(W), "w.txt": torch_bytes(W)}
    files["old.pth"] = torch_bytes(W, _use_new_zipfile_serialization=False)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    told = {name for name in (*files, "none.pt") if is_weights(tmp_path / name)}
    assert told == {"w.pt", "old.pth"}


W, OTHER, LR = {"w": torch.arange(3.0)}, {"w": torch.zeros(3)}, argparse.Namespace(lr=1)
CONVERTED = {
    "timm": lambda: torch_bytes({"state_dict": OTHER, "state_dict_ema": W, "args": LR}),
    "deit": lambda: torch_bytes({"model": W, "args": LR}),
    "beside numbers": lambda: torch_bytes({"ema": {"decay": 0.9}, "model": W, "args": LR}),
    "twice": lambda: torch_bytes({"model": {"state_dict": W}, "args": LR}),
    "flat": lambda: torch_bytes({**W, "args": LR}),
    "module": lambda: torch_bytes(Odd()),
    "module in a mapping": lambda: torch_bytes({"net": Odd(), "args": LR}),
    "script": script,
    "under another name": lambda: torch_bytes({"what it's": W, "head": OTHER, "lr": 1}),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_the_command_that_is_told_takes_what_would_be_read(tmp_path, monkeypatch, kind):
    path = tmp_path / "it's a file.pth"
    path.write_bytes(CONVERTED[kind]())
    with pytest.raises(DataError) as caught:
        load_state_dict(path)
    (fix,) = caught.value.fixes
    assert ("not executed" in caught.value.what) == (kind != "under another name")
    _, _, code, *files = shlex.split(fix[fix.index("python -c") :])
    monkeypatch.setattr(sys, "argv", ["-c", *files])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, {})
    found = load_state_dict(path.with_suffix(".safetensors"))
    assert torch.equal(found["w"], W["w"]) if kind != "script" else found["weight"].shape == (2, 2)


# -- what is no file, and what is no number -------------------------------------------------------


@pytest.mark.parametrize("name", ["w.pth", "config.json", "manifest.json"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    def late(*_: object) -> None:
        raise AssertionError("it was waited for")

    os.mkfifo(tmp_path / name)
    signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        with pytest.raises(UserError):
            {"w.pth": load_state_dict, "manifest.json": read_manifest}.get(name, create_model)(
                str(tmp_path / name if name == "w.pth" else tmp_path)
            )
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["file", "folder", "cnn"])
def test_weights_that_are_not_finite_are_named(tmp_path, kind, dtype, value):
    name, args = ("test_convnext.r160_in1k", {}) if kind == "cnn" else (NAME, TINY)
    state = {
        k: v.to(dtype) for k, v in create_model(name, num_classes=5, **args).state_dict().items()
    }
    key = next(k for k in state if k.endswith("mlp.fc1.weight"))
    state[key][0, -1] = value
    file = write(tmp_path / "model.safetensors", state)
    config = {"architecture": name.partition(".")[0], "model_args": args, "num_classes": 5}
    config["model_args"] = {"img_size" if k == "image_size" else k: v for k, v in args.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="not finite") as caught:
        create_model(str(tmp_path)) if kind == "folder" else create_model(
            name, checkpoint=file, **args
        )
    assert str(file) in str(caught.value) and key in str(caught.value)
