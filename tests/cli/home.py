"""A folder of images and a teacher trained on them, for tests of whole commands."""

import contextlib
import hashlib
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from vitdistill.cli import main

USAGE, DATA, DISK, CONFIG = 64, 65, 74, 78
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
NETWORK = "{img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}"
VIT = f"--set 'student.model_args={NETWORK}'"
SHORT = f"--data-dir photos --epochs 2 --warmup-epochs 0 -b 12 --device cpu {VIT}"


def run(command: str) -> int:
    return main(shlex.split(command))


def write_images(root: Path, train: int = 12, val: int = 20) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + random.normal(0, 40, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype("uint8")).save(root / split / name / f"{i:02d}.png")


def rename_classes(folder: str, classes: list[str]) -> None:
    """Copy the teacher's last weights under other class names."""
    shutil.copytree("runs/teacher/last", folder)
    config = json.loads(Path(folder, "config.json").read_text())
    (config if "label_names" in config else config["pretrained_cfg"])["label_names"] = classes
    Path(folder, "config.json").write_text(json.dumps(config))


def make_home(root: Path, train: int = 12) -> Path:
    write_images(root / "photos", train)
    with contextlib.chdir(root):
        assert run(f"train small_images_alone --output runs/teacher {SHORT}") == 0
    return root


def tree(root: Path) -> dict[str, str]:
    """Return every file's digest, and every folder."""
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in sorted(root.rglob("*"))
    }
