"""The demo, shortened to an epoch a run: every step of it, and what it leaves behind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.cli.home import run
from vitdistill.cli import demo
from vitdistill.data.model_input import input_spec_of
from vitdistill.data.sources.open import open_source
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.demo import KEEP_RATES, demo_recipes
from vitdistill.runs.pictures import draw_choices, png
from vitdistill.weights.export import export_timm

pytestmark = pytest.mark.whole


def short(images: str, teacher: str) -> dict[str, Recipe]:
    return {
        name: replace(
            recipe,
            train=replace(recipe.train, epochs=4 if name == "teacher" else 1),
            optim=replace(recipe.optim, warmup_epochs=0),
        )
        for name, recipe in demo_recipes(images, teacher).items()
    }


def test_demo_ends_with_a_table_a_picture_and_students_for_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "demo_recipes", short)
    assert run(f"demo --output {tmp_path}/demo") == 0
    text = capsys.readouterr().out
    for words in ("teacher, 64 wide", "+ plain distillation", "8 of 16 patches", "top-1", "MFLOPs"):
        assert words in text
    with Image.open(tmp_path / "demo" / "what_the_teacher_saw.png") as picture:
        assert picture.size[0] > 1000
    student = timm.create_model(f"local-dir:{tmp_path}/demo/maskedkd_50/last", pretrained=True)
    assert student(torch.zeros(1, 3, 8, 8)).shape == (1, 10)

    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*") if path.is_file()
    }
    assert run(f"demo --output {tmp_path}/demo") == 0
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {"what_the_teacher_saw.png"}, "a second demo repeats nothing"


def test_digits_are_written_once_and_whole(tmp_path: Path) -> None:
    demo.write_digits(tmp_path / "images")
    train, val = (
        open_source(str(tmp_path / "images"), "train"),
        open_source(str(tmp_path / "images"), "val"),
    )
    assert len(train) + len(val) == 1797 and len(val) == demo.NUM_VALIDATION
    assert train.classes == tuple("0123456789")
    assert {train.load(i).size for i in range(0, len(train), 97)} == {(8, 8)}
    names: set[Any] = {Path(train.key(i)).name for i in range(len(train))} & {
        Path(val.key(i)).name for i in range(len(val))
    }
    assert not names, "no digit is in both"


def test_an_interruption_leaves_no_half_of_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, when the first hundred images are there."""
    found: list[int] = []

    def interrupted(image: Image.Image) -> bytes:
        if len(list(tmp_path.glob(".tmp-*/*/*/*.png"))) == 100:
            found.append(100)
            raise KeyboardInterrupt
        return png(image)

    monkeypatch.setattr(demo, "png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.write_digits(tmp_path / "images")
    assert found and list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    demo.write_digits(tmp_path / "images")
    assert len(open_source(str(tmp_path / "images"), "val")) == demo.NUM_VALIDATION


def test_the_picture_hides_what_the_teacher_does_not_see(tmp_path: Path) -> None:
    """In the row of a keep rate, the share of covered area is one minus that rate."""
    torch.manual_seed(0)
    demo.write_digits(tmp_path / "images")
    args = demo_recipes("", "")["alone"].student.model_args
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **args)
    export_timm(
        model,
        tmp_path / "student",
        architecture="vit_tiny_patch16_224",
        model_args=args,
        classes=tuple("0123456789"),
        input_spec=input_spec_of(model),
    )
    sheet = draw_choices(tmp_path / "student", str(tmp_path / "images"), KEEP_RATES)
    cover = torch.tensor([0xD8, 0xDD, 0xE6])
    pixels = torch.from_numpy(np.array(sheet)).long()
    size, gap, margin = 96, 8, 190
    for row, rate in enumerate((1.0, *KEEP_RATES)):
        top = gap + row * (size + gap)
        band = pixels[top : top + size, margin:]
        covered = (band == cover).all(-1).sum().item()
        inner = 22 * 22  # a covered patch is 24 pixels wide, with an outline of one pixel
        assert covered == round(10 * 16 * (1 - rate)) * inner
