"""Validation images of some of the classes."""

import shutil
from pathlib import Path

import pytest
from small_runs import CLASSES, plain_recipe, write_images

from vitdistill.errors import UserError
from vitdistill.runs.prepare import open_images


@pytest.mark.parametrize("absent", [(), ("ant",), ("bee",), ("ant", "cat"), CLASSES[:2]])
@pytest.mark.parametrize("empty", [False, True])
def test_are_said_once_and_numbered_as_in_training(
    tmp_path: Path, absent: tuple[str, ...], empty: bool
) -> None:
    root = write_images(tmp_path / "images")
    said: list[str | UserError] = []
    for name in absent:
        shutil.rmtree(root / "val" / name)
        if empty:
            (root / "val" / name).mkdir()
    images = open_images(plain_recipe(root), said.append)
    assert images.val is not None and images.val.classes == images.classes == CLASSES
    shown = [i for i, name in enumerate(CLASSES) if name not in absent]
    assert sorted(set(images.val.labels.tolist())) == shown
    assert [all(repr(name) in str(warning) for name in absent) for warning in said] == (
        [True] if absent else []
    )
