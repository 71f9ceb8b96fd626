"""What a run depends on is known by content, noted once, and compared in one place."""

import pytest

from vitdistill.errors import ConfigError, DataError, Set
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.folder import RunFolder, check_folder
from vitdistill.runs.identity import (
    IDENTITY,
    SUMMARY,
    changes,
    is_unfinished,
    read_identity,
    resolve_run,
    weights_identity,
)

BEGAN = {"training images": "a", "validation images": "b", "labels of the teacher": "c"}


def named(file, **fields):
    return replace_fields(Recipe(), {"student.checkpoint": str(file), **fields})


@pytest.fixture
def run(tmp_path):
    """A folder whose run began from a.safetensors, and has learnt something."""
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    with RunFolder(tmp_path / "run", named(tmp_path / "a.safetensors"), BEGAN):
        (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    return tmp_path / "run"


def test_weights_are_the_same_wherever_they_are(run, tmp_path):
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    moved = named(tmp_path / "b.safetensors")
    assert changes(run, moved) == []
    with RunFolder(run, moved, BEGAN):
        pass
    assert read_identity(run)["student.checkpoint"] == weights_identity(moved)["student.checkpoint"]
    (tmp_path / "b.safetensors").write_bytes(b"others")
    (line,) = changes(run, moved)
    assert line.startswith("student.checkpoint is ")


def test_other_weights_under_the_old_name_are_noticed_once_something_is_learnt(run, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"others")
    recipe = named(tmp_path / "a.safetensors")
    assert changes(run, recipe) == ["student.checkpoint has other weights than when the run began"]
    with pytest.raises(ConfigError):
        check_folder(run, recipe)
    (run / "checkpoints" / "step-00000001").rmdir()
    with RunFolder(run, recipe, {**BEGAN, "training images": "others"}):
        pass
    assert read_identity(run)["training images"] == "others"
    assert (
        read_identity(run)["student.checkpoint"] == weights_identity(recipe)["student.checkpoint"]
    )


def test_everything_that_changed_is_listed_and_images_may_be_accepted(run, tmp_path):
    recipe, before = named(tmp_path / "a.safetensors"), (run / IDENTITY).read_bytes()
    images = {**BEGAN, "training images": "A", "validation images": "B"}
    accepting = named(tmp_path / "a.safetensors", **{"train.accept_changed_images": True})
    with pytest.raises(DataError, match="training images, validation images") as caught:
        RunFolder(run, recipe, images)
    assert Set("train.accept_changed_images", True) in caught.value.fixes
    with pytest.raises(DataError, match="labels of the teacher") as caught:
        RunFolder(run, accepting, {**images, "labels of the teacher": "C"})
    assert caught.value.field == "labels of the teacher"
    assert (run / IDENTITY).read_bytes() == before
    with RunFolder(run, accepting, images):
        pass
    assert read_identity(run)["training images"] == "A"
    with RunFolder(run, recipe, images):  # accepted once is accepted
        pass


def test_a_recipe_that_was_edited_is_refused(run, tmp_path):
    other = named(tmp_path / "a.safetensors", **{"optim.lr": 0.5})
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("lr: 0.001", "lr: 0.5", 1))
    with pytest.raises(DataError) as caught:
        RunFolder(run, other, BEGAN)
    assert caught.value.field == "recipe"


@pytest.mark.parametrize("text", ["[", "[]", "null", ""])
def test_a_damaged_note_is_named(run, text, tmp_path):
    (run / IDENTITY).write_text(text)
    with pytest.raises(DataError, match=r"identity\.json is damaged"):
        check_folder(run, named(tmp_path / "a.safetensors"))
    (run / IDENTITY).unlink()
    assert check_folder(run, named(tmp_path / "a.safetensors"))


def test_a_run_stands_for_its_best_weights_or_its_last(run):
    with pytest.raises(ConfigError):
        resolve_run(str(run))
    for kind in ("last", "best"):
        (run / kind).mkdir()
        (run / kind / "config.json").touch()
        assert resolve_run(str(run)) == str(run / kind)
    assert is_unfinished(str(run)) and is_unfinished(str(run / "best"))
    (run / SUMMARY).touch()
    assert not is_unfinished(str(run)) and not is_unfinished("deit_tiny_patch16_224")
    assert resolve_run("deit_tiny_patch16_224") == "deit_tiny_patch16_224"


def test_a_networks_name_is_the_networks_where_a_run_is_called_the_same(run, monkeypatch):
    (run / "last").mkdir()
    (run / "last" / "config.json").touch()
    monkeypatch.chdir(run.parent)
    run.rename("vit_tiny_patch16_224")
    assert resolve_run("vit_tiny_patch16_224") == "vit_tiny_patch16_224"
    assert resolve_run("./vit_tiny_patch16_224") == "vit_tiny_patch16_224/last"
