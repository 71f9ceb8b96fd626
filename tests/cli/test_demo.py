"""The demo, shortened to an epoch a run: every step of it, and what it leaves behind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from tests.cli.home import run
from vitdistill.cli import demo
from vitdistill.data.sources.open import open_source
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.demo import demo_recipes
from vitdistill.runs.pictures import png

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
    assert f"{tmp_path}/demo/maskedkd_50/pictures.png" in text
    student = timm.create_model(f"local-dir:{tmp_path}/demo/maskedkd_50/last", pretrained=True)
    assert student(torch.zeros(1, 3, 8, 8)).shape == (1, 10)

    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*") if path.is_file()
    }
    assert run(f"demo --output {tmp_path}/demo") == 0
    for path, time in before.items():
        assert path.stat().st_mtime_ns == time, "a second demo repeats nothing"


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
