"""Recipes of small runs, and two finished ones that are made once and only read."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_runs import plain_recipe, run, taught_recipe, write_images

from vitdistill.data.augment import Augment
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.settings import DataConfig

Make = Callable[..., Recipe]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 21 validation images."""
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 training images: mixing leaves one over."""
    return write_images(tmp_path_factory.mktemp("odd") / "images", train=15)


@pytest.fixture(scope="session")
def plain(images: Path) -> Make:
    """``plain(**{"optim.lr": 1.0})``: the student alone."""
    return partial(plain_recipe, images)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, plain: Make) -> Path:
    """The run folder of a teacher that is right on every validation image."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    recipe = plain(**{"train.epochs": 8, "optim.lr": 5e-3, "train.eval_every": 8, "train.seed": 5})
    assert run(recipe, folder)["scores"]["top1"] == 1.0
    return folder


@pytest.fixture(scope="session")
def taught(images: Path, teacher: Path) -> Make:
    """``taught(...)``: MaskedKD with all that has a state or is random."""
    return partial(taught_recipe, images, teacher)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, taught: Make) -> Path:
    """The finished, uninterrupted run of ``taught()``; to be read only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(taught(), folder)
    return folder


@pytest.fixture(scope="session")
def kd(taught: Make, odd: Path) -> Make:
    """``kd(...)``: plain KD on views that are cropped, erased and mixed, two of each image."""

    def make(**changes: Any) -> Recipe:
        recipe = taught(**{"train.accumulate": 1, "train.log_every": 1, "train.ema_decay": None})
        hard = Augment(crop="rrc", mixup=0.8, cutmix=1.0, reprob=0.5)
        data = DataConfig(dir=str(odd), workers=0, augment=hard, views=2)
        return replace_fields(replace(recipe, selector=None, data=data), changes)

    return make
