"""Nine small runs by the command line, and what each computed: a change without numeric purpose
leaves all of it as it was.

``python tests/oracle/oracle.py`` prints the losses and the digests of this tree; ``--write``
records them in oracle.json, which `test_oracle.py` compares with: losses within rounding on any
machine, every bit on one like the recorded one.
"""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

RECORDED = Path(__file__).with_name("oracle.json")
CLASSES = ("ant", "bee", "cat")


def write_images(root: Path) -> None:
    """``alike``: 16 x 16; ``unlike``: sides of 18 to 30, so that they are augmented one by one."""
    random = np.random.default_rng(0)
    for kind in ("alike", "unlike"):
        for split, count in (("train", 16), ("val", 7)):
            for label, name in enumerate(CLASSES):
                folder = root / kind / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    height, width = (16, 16) if kind == "alike" else random.integers(18, 31, 2)
                    pixels = random.integers(0, 120, (height, width, 3))
                    pixels[..., label] += 100
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")


def vit(dim: int, depth: int = 2, heads: int = 2, **more: Any) -> dict[str, Any]:
    args = {"img_size": 16, "patch_size": 4, "embed_dim": dim, "depth": depth, "num_heads": heads}
    return {"model": "vit_tiny_patch16_224", "model_args": args, **more}


def recipe(root: Path, **parts: Any) -> dict[str, Any]:
    """What all runs share: 2 epochs of 3 steps; ``parts`` replace or extend it."""
    base: dict[str, Any] = {
        "student": vit(24),
        "objectives": {"ce": {"method": "ce", "smoothing": 0.1}},
        "data": {
            "dir": str(root / "alike"),
            "workers": 0,
            "augment": {"crop": "pad", "crop_padding": 2},
        },
        "optim": {"lr": 2e-3, "warmup_epochs": 1.0},
        "train": {
            "epochs": 2,
            "batch_size": 16,
            "log_every": 1,
            "eval_batch_size": 8,
            "amp_dtype": "float32",
        },
    }
    for name, part in parts.items():
        base[name] = {**base[name], **part} if name in ("data", "optim", "train") else part
    return base


def recipes(root: Path) -> dict[str, dict[str, Any]]:
    """By name, in the order in which they run: teachers first."""
    teacher = {"teacher": {"model": str(root / "runs" / "teacher" / "last")}}
    ce = {"method": "ce", "weight": 0.5, "smoothing": 0.1}
    kd = {"method": "kd", "weight": 0.5, "temperature": 2.0}
    mae = {"method": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    small = {"scale": [0.3, 1.0]}
    mixed = {"crop": "pad", "crop_padding": 2, "mixup": 0.8, "cutmix": 1.0, "reprob": 0.25}
    pretrain = recipe(
        root,
        student=vit(24, init="mae"),
        teachers=teacher,
        objectives={"mae": mae, "dmae": {"method": "dmae", "any_teacher": True}},
        masking={"method": "random_masking", "mask_rate": 0.5},
        data={"augment": small},
    )
    finetune = recipe(
        root,
        student={"model": "stage:pretrain", "drop_path": 0.1, "model_args": {"global_pool": "avg"}},
        data={"augment": small},
        optim={"layer_decay": 0.75},
    )
    stored = {
        "teachers": teacher,
        "objectives": {"ce": ce, "kd": kd},
        "data": {"augment": {"crop": "pad", "mixup": 0.8}, "views": 2},
    }
    return {
        "teacher": recipe(root, student=vit(32, depth=4), train={"epochs": 4}),
        "maskedkd": recipe(
            root,
            student=vit(24, drop_path=0.3),
            teachers=teacher,
            objectives={"ce": ce, "kd": kd},
            selector={"method": "maskedkd", "keep_rate": 0.5},
            data={"augment": mixed},
            optim={"clip_grad": 1.0, "layer_decay": 0.8},
            train={"ema_decay": 0.6, "accumulate": 2},
        ),
        "vitkd_nkd": recipe(
            root,
            teachers=teacher,
            objectives={"ce": ce, "vitkd": {"method": "vitkd"}, "nkd": {"method": "nkd"}},
        ),
        "dmae": {"name": "dmae", "stages": {"pretrain": pretrain, "finetune": finetune}},
        "libkd_topk": recipe(root, **stored),
        "libkd_float32": recipe(root, **stored),
        "one_by_one": recipe(
            root,
            data={
                "dir": str(root / "unlike"),
                "workers": 2,
                "augment": {"scale": [0.3, 1.0], "aa": "rand-m9-mstd0.5-inc1"},
            },
        ),
        "two_processes": recipe(
            root, teachers=teacher, objectives={"ce": ce, "kd": kd}, train={"accumulate": 2}
        ),
    }


def command(*words: str) -> None:
    """One command in this process; what it prints is shown only if it fails."""
    from vitdistill.cli import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(list(words))
    if code:
        raise RuntimeError(f"vitdistill {' '.join(words)} ended with {code}:\n{text.getvalue()}")


def run(name: str, file: Path, output: Path, folder: Path) -> None:
    """One of `recipes`, in the way its name says."""
    words = ["train", str(file), "--output", str(output), "--device", "cpu"]
    if name.startswith("libkd"):
        encoding = name.removeprefix("libkd_")
        labels = folder / f"labels_{encoding}"
        sparse = ["--k", "2"] if encoding == "topk" else []
        label = ["label", str(file), "--output", str(labels), "--encoding", encoding, *sparse]
        command(*label, "--device", "cpu")
        words += ["--labels", str(labels)]
    if name == "two_processes":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", "2", "-m", "vitdistill"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = str(RECORDED.parents[2])
        subprocess.run([*launcher, *words], check=True, capture_output=True, env=environment)
    else:
        command(*words)


def computed(folder: Path) -> dict[str, Any]:
    """The losses of a run's steps, its scores, and one digest of both and of every weight."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not k.endswith("_unweighted")} for line in lines]
    digest = hashlib.sha256(json.dumps(lines, sort_keys=True).encode())
    for name, tensor in sorted(
        safetensors.torch.load_file(folder / "last" / "model.safetensors").items()
    ):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    return {"losses": losses, "digest": digest.hexdigest()}


def compute(folder: Path) -> dict[str, dict[str, Any]]:
    """Every run, and what it computed."""
    write_images(folder)
    found = {}
    for name, data in recipes(folder).items():
        file, output = folder / f"{name}.yaml", folder / "runs" / name
        file.write_text(json.dumps(data))
        run(name, file, output, folder)
        for part in (output, *(output / stage for stage in data.get("stages", {}))):
            if (part / "metrics.jsonl").is_file():
                found[name if part == output else f"{name}/{part.name}"] = computed(part)
    return found


def machine() -> str:
    """What decides the last bits: kernels of torch on this kind of processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
    )
    return f"torch {torch.__version__}, {model}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = compute(Path(folder))
    for name, result in found.items():
        print(
            f"{name:16} {result['digest'][:16]}  {result['losses'][0]:.6f} ->"
            f" {result['losses'][-1]:.6f}"
        )
    if "--write" in sys.argv:
        RECORDED.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")
    elif RECORDED.exists():
        before = json.loads(RECORDED.read_text())
        same = before["machine"] == machine() and before["runs"] == found
        print("as recorded" if same else f"NOT as recorded on {before['machine']}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
