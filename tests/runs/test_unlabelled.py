"""Labelled and unlabelled images in one run: both count, and whatever stops or divides the run."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import ends_alike, losses, ranks, records, run, said

from vitdistill.errors import ConfigError, DataError, MissingSplit, Set, UserError
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.label import LabelOptions, label
from vitdistill.runs.prepare import open_images

CALM = {"student.drop_path": 0.0, "train.log_every": 1, "train.ema_decay": None}


def write_others(folder: Path, count: int = 30) -> Path:
    """Images of the same three kinds in one folder."""
    random = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = random.integers(0, 120, (16, 16, 3))
        pixels[..., i % 3] += 100
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"u{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> Path:
    return write_others(tmp_path_factory.mktemp("others") / "more")


@pytest.fixture
def both(taught, others) -> Callable[..., Recipe]:
    """``both(...)``: MaskedKD on all images and the labels' loss on 48, mixed, in micro-batches."""
    return lambda **changes: taught(**{"data.unlabelled": str(others), **changes})


# -- the same run, whatever stops or divides it ---------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("changes", [{}, {"data.in_memory": False, "data.workers": 2}])
def test_a_kill_costs_nothing(tmp_path, both, changes):
    recipe = both(**changes)
    summary = run(recipe, tmp_path / "whole")
    assert summary["steps"] == 36  # 48 of them at 4 a step are 12 steps an epoch, of 30 at 12 two
    ends_alike(recipe, tmp_path / "whole", tmp_path / "run", 5)


@pytest.mark.whole
def test_two_processes_are_one_run(tmp_path, both):
    once = {"train.epochs": 1, "optim.warmup_epochs": 0.0, "train.accumulate": 1}
    recipe = both(**CALM, **once)
    run(recipe, tmp_path / "one")
    ranks(2, lambda rank: run(recipe, tmp_path / "two"))
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.whole
def test_stored_answers_to_all_images_are_those_of_the_teacher(tmp_path, kd, others):
    """45 and 31 images: mixing leaves one of either kind over."""
    more = tmp_path / "more"
    shutil.copytree(others, more)
    shutil.copy(more / "u00.png", more / "v.png")
    fields = {"data.unlabelled": str(more), "data.labelled_share": 0.5, "student.drop_path": 0.0}
    recipe = kd(**fields)
    options = LabelOptions(encoding="float32", part_size=16)
    (store,) = label(recipe, tmp_path / "labels", options, device="cpu").stores.values()
    assert store.manifest.num_samples == 76 and not store.missing_parts()
    run(recipe, tmp_path / "live")
    run(replace_fields(recipe, {"teachers.teacher.labels": str(store.path)}), tmp_path / "stored")
    for live, stored in zip(records(tmp_path / "live"), records(tmp_path / "stored"), strict=True):
        for key in live.keys() & {"ce", "kd", "loss"}:
            assert stored[key] == pytest.approx(live[key], rel=1e-4), key
    # Without a number of views it takes those that are stored.
    free = replace(recipe, data=replace(recipe.data, views=None))
    free = replace_fields(free, {"teachers.teacher.labels": str(store.path)})
    run(free, tmp_path / "free")
    assert records(tmp_path / "free") == records(tmp_path / "stored")
    forgotten = replace_fields(free, {"data.unlabelled": None, "data.labelled_share": 0.25})
    with pytest.raises(DataError, match=r"images.count") as refused:
        run(forgotten, tmp_path / "forgotten")
    assert Set("data.unlabelled") in refused.value.fixes


# -- what is served, and what is refused ----------------------------------------------------------


def opened(recipe: Recipe) -> tuple[int, int, str]:
    """How many training images have labels, how many have none, and what is said."""
    said_lines: list[str] = []
    train = open_images(recipe, said_lines.append).train
    assert len({train.key(i) for i in range(len(train))}) == len(train)
    with_labels = int((train.labels >= 0).sum())
    return with_labels, len(train) - with_labels, "\n".join(said_lines)


def test_both_kinds_are_counted(both, others):
    assert opened(both()) == (48, 30, f"48 labelled images, and 30 without labels in {others}")


@pytest.mark.parametrize(
    ("copied", "left"), [(["train/ant/03.png"], 30), (["val/bee/01.png", "train/cat/00.png"], 30)]
)
def test_copies_of_labelled_and_validation_images_are_left_out(
    tmp_path, both, images, others, copied, left
):
    more = tmp_path / "more"
    shutil.copytree(others, more)
    for name in copied:
        shutil.copy(images / name, more / Path(name).name)
    (with_labels, without, said_lines) = opened(both(**{"data.unlabelled": str(more)}))
    assert (with_labels, without) == (48, left)
    assert f"{len(copied)} of {30 + len(copied)} images" in said_lines and "left out" in said_lines


def test_the_labelled_folder_itself_leaves_none(both, images):
    with pytest.raises(DataError, match="leaves none") as caught:
        opened(both(**{"data.unlabelled": str(images)}))
    assert caught.value.field == "data.unlabelled"


def test_class_folders_of_unlabelled_images_are_not_read(tmp_path, both):
    for i, kind in enumerate(("ant", "bee", "cat")):
        write_others(tmp_path / "train" / kind, 5 + i)
    with_labels, without, said_lines = opened(both(**{"data.unlabelled": str(tmp_path)}))
    assert (with_labels, without) == (48, 18) and "classes are not read" in said_lines


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        ({"data.unlabelled": "/nowhere"}, DataError, "data.unlabelled"),
        ({"data.unlabelled": "VAL"}, MissingSplit, "data.unlabelled"),
        ({"data.dir": "OTHERS"}, ConfigError, "data.dir"),  # and the labels' loss has no labels
        ({"data.unlabelled": None, "data.labelled_share": 0.5}, ConfigError, "data.labelled_share"),
    ],
)
def test_impossible_mixtures_are_refused(tmp_path, both, images, others, fields, kind, field):
    shutil.copytree(images / "val", tmp_path / "alone" / "val")
    places = {"OTHERS": str(others), "VAL": str(tmp_path / "alone")}
    with pytest.raises(kind) as caught:
        opened(both(**{path: places.get(value, value) for path, value in fields.items()}))
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_images_that_nothing_learns_from_are_refused(plain, both, others):
    with pytest.raises(ConfigError, match="every objective reads labels"):
        opened(plain(**{"data.unlabelled": str(others)}))
    unlabelled = replace(
        both(**{"data.dir": str(others)}), objectives={"kd": both().objectives["kd"]}
    )
    with pytest.raises(ConfigError, match="no labels either"):
        opened(unlabelled)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"data.labelled_share": 0.3}, "data.labelled_share"),
        ({"data.labelled_share": 0.01}, "data.labelled_share"),
        ({"data.labelled_share": 0.99}, "data.labelled_share"),
        ({"train.batch_size": 8}, "data.labelled_share"),  # one image a micro-batch is no pair
        ({"train.batch_size": 64}, "data.unlabelled"),
    ],
)
def test_a_share_that_does_not_divide_is_refused_and_its_remedy_works(
    tmp_path, both, fields, field
):
    with pytest.raises(UserError) as caught:
        run(both(**fields), tmp_path / "run")
    assert caught.value.field == field and not (tmp_path / "run").exists()
    fix = caught.value.fixes[0]
    if field == "data.labelled_share":
        assert isinstance(fix, Set)
        fixed = (
            both(**fields, **{"train.epochs": 1})
            if fix.value is None
            else both(
                **{**fields, fix.field: fix.value, "train.epochs": 1, "optim.warmup_epochs": 0.0}
            )
        )
        lines = said(fixed, tmp_path / "run")
        assert not any(re.search("error", line) for line in lines)
