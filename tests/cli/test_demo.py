"""The demo, shortened to an epoch a run: every step of it, and what it leaves behind."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from tests.cli.home import run
from vitdistill.cli import demo
from vitdistill.data.sources.open import open_source
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.demo import demo_recipes

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
    output = tmp_path / "demo"
    assert run(f"demo --output {output}") == 0
    text = capsys.readouterr().out
    said = "teacher, 64 wide", "student, plain distillation", "8 of 16 patches", "top-1", "MFLOPs"
    for words in said:
        assert words in text
    assert f"{output}/report.html" in text
    page = (output / "report.html").read_text()
    assert "Did it help?" in page and page.count("<img ") > 2
    student = timm.create_model(f"local-dir:{output}/maskedkd_50/last", pretrained=True)
    assert student(torch.zeros(1, 3, 8, 8)).shape == (1, 10)

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert run(f"demo --output {output}") == 0
    for path, time in before.items():
        assert path.stat().st_mtime_ns == time, "a second demo repeats nothing"


def test_digits_are_written_once_and_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []

    def interrupted(image: Image.Image, path: Path) -> None:
        saved.append(path)
        if len(saved) == 100:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", interrupted)
        demo.write_digits(tmp_path / "images")
    assert len(saved) == 100 and list(tmp_path.iterdir()) == []
    demo.write_digits(tmp_path / "images")
    train, val = (open_source(str(tmp_path / "images"), split) for split in ("train", "val"))
    assert len(train) + len(val) == 1797 and len(val) == demo.NUM_VALIDATION
    assert train.classes == tuple("0123456789") and train.load(0).size == (8, 8)
    names = [{Path(source.key(i)).name for i in range(len(source))} for source in (train, val)]
    assert not names[0] & names[1], "no digit is in both"
