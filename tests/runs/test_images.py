"""The images of a run: a validation part, damaged files, labels beside unlabelled images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import CLASSES, flat, records, run, write_images

from vitdistill.errors import ConfigError, DataError, MissingSplit, Set
from vitdistill.methods.kd import SoftKD
from vitdistill.recipes.yaml import load_recipe
from vitdistill.runs.prepare import build
from vitdistill.world import ALONE


@pytest.fixture
def unlabelled(tmp_path: Path, images: Path, taught):
    """A recipe for flat training images beside labelled validation images."""
    (tmp_path / "set").mkdir()
    flat(images, tmp_path / "set" / "train")
    shutil.copytree(images / "val", tmp_path / "set" / "val")
    recipe = taught(**{"data.dir": str(tmp_path / "set")})
    return replace(recipe, objectives={"kd": SoftKD()}, selector=None)


def test_labelled_images_beside_unlabelled_ones_are_evaluated(tmp_path, unlabelled) -> None:
    summary = run(unlabelled, tmp_path / "run")
    assert summary["best_top1"] is not None
    assert len(records(tmp_path / "run", "eval")) == 3


def test_a_teacher_without_names_is_taken_at_its_number(tmp_path, unlabelled, teacher) -> None:
    nameless = shutil.copytree(teacher / "last", tmp_path / "teacher")
    config = json.loads((nameless / "config.json").read_text())
    for part in (config, config["pretrained_cfg"]):
        part.pop("label_names", None)
    (nameless / "config.json").write_text(json.dumps(config))
    config = replace(unlabelled.teachers["teacher"], model=str(nameless))
    prepared = build(replace(unlabelled, teachers={"teacher": config}), ALONE, lambda text: None)
    assert prepared.networks.classes == CLASSES and prepared.loaders.proof is not None


def test_classes_that_the_teacher_has_among_others(unlabelled) -> None:
    shutil.rmtree(Path(unlabelled.data.dir) / "val" / "bee")
    prepared = build(unlabelled, ALONE, lambda text: None)
    assert prepared.networks.classes == prepared.images.val.classes == CLASSES
    assert set(prepared.images.val.labels.tolist()) == {0, 2}


@pytest.mark.parametrize("change", ["renamed", "added"])
def test_classes_that_are_not_the_teachers_are_named(unlabelled, change: str) -> None:
    val, lines = Path(unlabelled.data.dir) / "val", []
    shutil.copytree(val / "bee", val / "wasp")
    if change == "renamed":
        shutil.rmtree(val / "bee")
    prepared = build(unlabelled, ALONE, lines.append)
    assert prepared.images.val is None and prepared.loaders.val is None
    (line,) = [line for line in lines if "are not the teacher's" in line]
    assert str(val) in line


def test_a_part_of_the_training_images_is_remembered(tmp_path: Path, plain) -> None:
    root = write_images(tmp_path / "images", train=20)
    shutil.rmtree(root / "val")
    recipe = plain(**{"data.dir": str(root)})
    with pytest.raises(MissingSplit) as caught:
        build(recipe, ALONE, lambda text: None)
    assert Set("data.val_split", 0.1) in caught.value.fixes
    summary = run(plain(**{"data.dir": str(root), "data.val_split": 0.1}), tmp_path / "run")
    assert summary["best_top1"] is not None
    again = load_recipe(tmp_path / "run" / "recipe.yaml")
    images = build(again, ALONE, lambda text: None).images
    assert (again.data.val_split, len(images.train), len(images.val)) == (0.1, 54, 6)
    with pytest.raises(ConfigError) as caught:
        plain(**{"data.val_split": 1.5})
    assert caught.value.field == "data.val_split"


def test_damaged_images_are_left_out_and_recorded(tmp_path: Path, plain) -> None:
    root, lines = write_images(tmp_path / "images"), []
    damaged = [root / "train/ant/03.png", root / "train/cat/11.png", root / "val/bee/00.png"]
    for i, path in enumerate(damaged):
        path.write_bytes(path.read_bytes()[: 40 * i])
    recipe = plain(**{"data.dir": str(root)})
    with pytest.raises(DataError, match=r"2 of 48 images .*'ant/03.png', 'cat/11.png'") as caught:
        run(recipe, tmp_path / "run")
    assert Set("data.skip_damaged", True) in caught.value.fixes
    skipping = plain(**{"data.dir": str(root), "data.skip_damaged": True})
    run(skipping, tmp_path / "run", lines)
    (recorded,) = json.loads((tmp_path / "run" / "environment.json").read_text()).values()
    assert len(recorded["images"]) == 2 and set(recorded["images"]) <= set(lines)
    assert "cat/11.png" in recorded["images"][0] and "bee/00.png" in recorded["images"][1]
    for path in damaged:
        path.unlink()
    run(recipe, tmp_path / "without")
    losses = [
        [line["loss"] for line in records(tmp_path / name, "train")] for name in ("run", "without")
    ]
    assert losses[0] == losses[1]
