"""Names and weight files: loaded strictly or refused in one sentence, and never executed."""

import argparse
import io
import json
import os
import pickle
import random
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from vitdistill import weights
from vitdistill.errors import ConfigError, DataError, UserError
from vitdistill.weights import class_names, create_model, load_state_dict, load_weights

TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
NAME = "vit_tiny_patch16_224"


def tiny(seed: int = 0, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    return create_model(NAME, **{"num_classes": 5, **TINY, **changes}).eval()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("vit_tinny_patch16_224", {}, "did you mean vit_tiny_patch16_224"),
        ("qqqqqqqqqq", {}, "list_models"),
        (NAME + ".nosuch", {}, "'nosuch'; it has augreg_in21k_ft_in1k"),
        (NAME, {"fooo": 1}, "takes no argument 'fooo'"),
        (NAME, {"embed_dim": 193}, "cannot be built with embed_dim=193"),
        (NAME, {"image_size": 30}, "16 x 16, which do not fill 30 x 30"),
        (NAME, {"drop_path": 0.1, "drop_path_rate": 0.1}, "the same setting"),
        (NAME, {"pretrained": True, "checkpoint": "x.pth"}, "choose one"),
        ("no/such/folder", {}, "hf-hub:no/such/folder"),
        ("local-dir:/no/such/folder", {}, "no folder /no/such/folder"),
    ],
)
def test_wrong_names_and_arguments_are_one_sentence(name, options, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        create_model(name, **options)
    assert "\n" not in str(caught.value)


def test_settings_reach_the_network():
    model = tiny(drop_path=0.2, in_chans=1)
    assert model.num_classes == 5 and model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.pretrained_cfg["input_size"] == (1, 32, 32)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
    assert create_model("resnet18", image_size=(64, 32)).pretrained_cfg["input_size"] == (3, 64, 32)
    assert NAME in timm.list_models() and tiny(image_size=(16, 24)).patch_embed.grid_size == (2, 3)


def test_a_timm_name_wins_over_a_folder_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert type(create_model("resnet18", num_classes=2)).__name__ == "ResNet"


def test_without_network_pretrained_is_one_sentence(monkeypatch):
    for name, options in ((NAME, {"pretrained": True}), ("hf-hub:timm/" + NAME, {})):
        with pytest.raises(DataError, match="without network, download") as caught:
            create_model(name, **options)
        assert "\n" not in str(caught.value)


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_ema", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".tar"])
def test_wrapped_and_prefixed_files_load(tmp_path, wrapper, prefix, suffix):
    state = tiny(1).state_dict()
    content = {prefix + key: value for key, value in state.items()}
    path = tmp_path / f"w{suffix}"
    path.write_bytes(torch_bytes(content if wrapper is None else {wrapper: content, "epoch": 3}))
    model = tiny(2)
    load_weights(model, path)
    assert equal(model.state_dict(), state)
    assert equal(create_model(NAME, num_classes=5, checkpoint=path, **TINY).state_dict(), state)


def test_the_average_is_preferred_and_compiled_blocks_are_unwrapped(tmp_path):
    state, other = tiny(1).state_dict(), tiny(2).state_dict()
    inner = {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in state.items()}
    (tmp_path / "w.pth").write_bytes(torch_bytes({"state_dict": other, "state_dict_ema": inner}))
    assert equal(load_state_dict(tmp_path / "w.pth"), state)
    (tmp_path / "twice.pth").write_bytes(torch_bytes({"a": torch.ones(1), "module.a": torch.ones(1)}))
    assert "twice" in refused(tmp_path / "twice.pth")


def test_safetensors_load_under_either_name(tmp_path):
    state = tiny(1).state_dict()
    for name in ("w.safetensors", "w.bin"):
        (tmp_path / name).write_bytes(safetensors.torch.save(state))
        assert equal(load_state_dict(tmp_path / name), state)


def test_keys_that_differ_are_counted_and_named(tmp_path):
    state = tiny(1).state_dict()
    cases = {
        r"1 key missing \(cls_token\)": {k: v for k, v in state.items() if k != "cls_token"},
        r"30 keys missing \(cls_token, pos_embed, .*, \.\.\.\)": {
            "head.weight": state["head.weight"],
            "head.bias": state["head.bias"],
        },
        r"1 key unexpected \(extra\)": {**state, "extra": torch.ones(1)},
        r"2 keys of another shape \(head.weight is 7x24 in the file and 5x24 in the network, head.bias": tiny(num_classes=7).state_dict(),
        r"1 key of another shape \(norm.weight is a number": {**state, "norm.weight": torch.tensor(1.0)},
    }
    before = tiny(3)
    for sentence, content in cases.items():
        path = tmp_path / "w.safetensors"
        path.write_bytes(safetensors.torch.save(content))
        model = tiny(3)
        with pytest.raises(DataError, match=sentence) as caught:
            load_weights(model, path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
        assert equal(model.state_dict(), before.state_dict())


def test_position_embeddings_of_another_size_go_through_timms_converter(tmp_path, caplog):
    small, large = tiny(1), tiny(1, image_size=64)
    (tmp_path / "w.safetensors").write_bytes(safetensors.torch.save(small.state_dict()))
    load_weights(large, tmp_path / "w.safetensors")
    assert "converter" in caplog.text
    assert torch.equal(large.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)
    assert large.pos_embed.shape == (1, 65, 24)


# -- files that are not weights ---------------------------------------------------------------------------------------


def test_files_that_are_no_weights_are_one_sentence(tmp_path):
    cases: dict[str, tuple[bytes, str]] = {
        "empty.pth": (b"", "is empty"),
        "empty.safetensors": (b"", "is empty"),
        "page.pth": (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        "page.safetensors": (b"<html>", "web page"),
        "pointer.bin": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "noise.pth": (random.Random(0).randbytes(3000), "not a weights file"),
        "noise.safetensors": (random.Random(0).randbytes(3000), "not a safetensors file"),
        "weights.npz": (b"PK\x03\x04", "convert it to .safetensors"),
        "list.pth": (torch_bytes([torch.ones(1)]), "holds no weights"),
        "numbers.pth": (torch_bytes({"a": 1}), "'a' is int, not a tensor"),
        "nothing.pth": (torch_bytes({}), "holds no weights"),
        "huge-header.safetensors": ((2**62).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        "overlap.safetensors": (
            header(
                {
                    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
                },
                12,
            ),
            "not a safetensors",
        ),
        "wrong-shape.safetensors": (
            header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}, 8),
            "not a safetensors",
        ),
    }
    for name, (content, sentence) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert sentence in refused(tmp_path / name), name
    assert "no weights file" in refused(tmp_path / "missing.pth")
    (tmp_path / "dir.pth").mkdir()
    assert "is a folder" in refused(tmp_path / "dir.pth")


def header(entries: dict, size: int) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_cut_is_refused_in_one_sentence(tmp_path, kind):
    state = {"a": torch.randn(50), "b": torch.randn(3, 3)}
    if kind == "safetensors":
        data, path = safetensors.torch.save(state), tmp_path / "w.safetensors"
    else:
        data, path = torch_bytes(state, _use_new_zipfile_serialization=kind == "zip"), tmp_path / "w.pth"
    rng = random.Random(kind)
    for cut in [1, 7, 8, 9, 20, len(data) - 1, *(rng.randrange(1, len(data)) for _ in range(80))]:
        path.write_bytes(data[:cut])
        refused(path)


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def malicious(folder: Path, canary: Path) -> list[Path]:
    payload = Payload(canary)
    files = {
        "a.pth": torch_bytes({"model": {"w": torch.ones(1)}, "args": payload}),
        "b.pt": torch_bytes(payload),
        "c.bin": torch_bytes({"w": payload}, _use_new_zipfile_serialization=False),
        "d.tar": pickle.dumps(payload),
        "e.pth": pickle.dumps({"w": payload}, protocol=0),
        "f.safetensors": torch_bytes(payload),
        "g.safetensors": pickle.dumps(payload),
    }
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps(payload))
        zipped.writestr("archive/version", "3\n")
    files["h.pth"] = archive.getvalue()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def test_a_pickle_is_never_executed(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists(), "the payload works"
    canary.unlink()
    for path in malicious(tmp_path, canary):
        refused(path)
        with pytest.raises(UserError):
            create_model(NAME, checkpoint=path)
        folder = tmp_path / f"folder-{path.name}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architecture": NAME, "pretrained_cfg": {}}))
        (folder / ("model.safetensors" if path.suffix == ".safetensors" else "pytorch_model.bin")).write_bytes(path.read_bytes())
        for name in (str(folder), f"local-dir:{folder}"):
            for num_classes in (None, 3):
                with pytest.raises(UserError):
                    create_model(name, num_classes=num_classes)
    assert not canary.exists()


def test_a_pickle_is_named_and_the_conversion_told(tmp_path):
    path = tmp_path / "deit.pth"
    path.write_bytes(torch_bytes({"model": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=1)}))
    sentence = refused(path)
    assert "argparse.Namespace" in sentence and "not executed" in sentence and "convert it: python -c" in sentence
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    (tmp_path / "script.pt").write_bytes(buffer.getvalue())
    assert "TorchScript" in refused(tmp_path / "script.pt")


def test_old_torch_opens_no_foreign_pickle(tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    path.write_bytes(torch_bytes({"a": torch.ones(1)}))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert "install torch 2.10 or newer" in refused(path)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert weights.load_state_dict(path)


# -- classes ----------------------------------------------------------------------------------------------------------


def test_class_names():
    assert class_names(create_model(NAME))[:2] == ("n01440764", "n01443537")
    assert class_names(tiny()) is None
    assert class_names(create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=1000)) is None
    named = tiny()
    named.pretrained_cfg["label_names"] = list("abcde")
    assert class_names(named) == tuple("abcde")
    named.pretrained_cfg["label_names"] = list("abc")
    assert class_names(named) is None
    assert class_names(torch.nn.Linear(2, 2)) is None
