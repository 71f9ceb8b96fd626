"""Every message of messages.txt is what the command says now, and the command changes no file."""

import contextlib
import difflib
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from tests.cli.home import rename_classes, run, tree, write_images
from vitdistill.cli import main

PAGE = Path(__file__).with_name("messages.txt")
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
SHORT = f"-b 12 --epochs 2 --warmup-epochs 0 --device cpu --set student.model_args='{VIT}'"
RED = Path("train", "red", "03.png")


class Canary:
    """Unpickling this makes a folder."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("canary",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the head of messages.txt says, as the current folder."""
    with contextlib.chdir(tmp_path_factory.mktemp("messages")):
        write_images(Path("photos"), val=4)
        taught = f"small_images_kd --data-dir photos --teacher-model runs/teacher {SHORT}"
        for command in (
            f"train small_images_alone --data-dir photos --output runs/teacher {SHORT}",
            f"label {taught} --output runs/labels --set data.views=1 --encoding float16",
        ):
            with contextlib.redirect_stdout(io.StringIO()):
                assert run(command) == 0
        for name in ("flat", "empty", "uneven", "damaged", "zero"):
            shutil.copytree("photos", name)
        shutil.move("flat/train/red", "flat")
        shutil.rmtree("flat/train")
        shutil.rmtree("flat/val")
        Path("empty/train/violet").mkdir()
        Path("uneven/val/red").rename("uneven/val/rot")
        Path("damaged", RED).write_bytes(Path("photos", RED).read_bytes()[:-200])
        Path("zero", RED).write_bytes(b"")
        rename_classes("other", ["blue", "green", "violet"])
        rename_classes("turned", ["green", "red", "blue"])
        torch.save({"model": Canary()}, "pickle.pth")
        Path("nothing.pth").write_bytes(b"")
        Path("page.pth").write_bytes(b"<html>")
        torch.manual_seed(0)
        five = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT)
        safetensors.torch.save_file(five.state_dict(), "five.safetensors")
        Path("broken.yaml").write_text("train: {epochs: [3\n")
        Path("unknown.yaml").write_text("train: {epoch: 3}\n")
        stage = {"objectives": {"ce": {"method": "ce"}}}
        stages = {"first": stage, "last": {**stage, "student": {"model": "stage:first"}}}
        Path("stages.yaml").write_text(json.dumps({"stages": stages}))
        yield Path.cwd()


def answer(command: str, folder: Path) -> list[str]:
    """What a command says, without what differs from machine to machine, and its exit code."""
    words = shlex.split(command.removeprefix("$ vitdistill").replace("{short}", SHORT))
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main(words)
    said = errors.getvalue().replace(str(folder), "FOLDER")
    said = said.replace(torch.__version__, "VERSION").replace(timm.__version__, "VERSION")
    said = re.sub(r"\b[0-9a-f]{12,64}\b", "DIGEST", said)
    return [f"{code}  {said.rstrip()}"]


@pytest.mark.whole
def test_the_messages_are_those_of_the_page(folder: Path, request: pytest.FixtureRequest) -> None:
    before = tree(folder)
    page = PAGE.read_text().splitlines()
    found: list[str] = []
    for line in page:
        if line.startswith("$ "):
            found += ["", line, *answer(line, folder)]
        elif line and not line[0].isdigit():
            found += ["", line] if line.startswith("== ") else [line]
    if request.config.getoption("--rewrite"):
        PAGE.write_text("\n".join(found) + "\n")
        page = found
    assert not [line for line in found if line.startswith(("0  ", "1  "))], (
        "it went well, or crashed"
    )
    assert tree(folder) == before
    changed = difflib.unified_diff(page, found, "messages.txt", "now", lineterm="", n=1)
    assert found == page, "\n".join(changed)
