"""What a recipe's networks and labels are made of, and what is said when something lacks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vitdistill.distill.classes import match_classes
from vitdistill.errors import ConfigError
from vitdistill.labels.encoding import LogitEncoding
from vitdistill.labels.layout import Layout
from vitdistill.labels.store import LabelStore, Manifest
from vitdistill.methods.kd import SoftKD
from vitdistill.recipes.config import Recipe, TeacherConfig, TrainConfig
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.networks import (
    build_blank_teacher,
    build_teacher_model,
    resolve_run,
    runs_at,
)
from vitdistill.runs.stored import with_views_of_labels

# -- views of labels ------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Callable[..., Recipe]:
    """``two(5, 10)``: a recipe of 100 epochs with labels of so many views of its two teachers, in
    this order.
    """

    def make(*counts: int) -> Recipe:
        layout = Layout(logits=LogitEncoding(kind="float16", num_classes=3))
        teachers = {}
        for count in counts:
            manifest = Manifest(
                identity={"view.seed": 3}, layout=layout, num_samples=4, num_views=count
            )
            store = LabelStore.create(tmp_path / f"t{count}", manifest)
            teachers[f"t{count}"] = TeacherConfig(model="resnet18", labels=str(store.path))
        objectives = {f"kd_{name}": SoftKD(teacher=name) for name in teachers}
        return Recipe(teachers=teachers, objectives=objectives, train=TrainConfig(epochs=100))

    return make


@pytest.mark.parametrize("counts", [(5, 10), (10, 5)])
def test_as_many_views_as_all_labels_have(
    two: Callable[..., Recipe], counts: tuple[int, int]
) -> None:
    recipe = two(*counts)
    found = with_views_of_labels(recipe)
    assert (found.data.views, found.data.seed) == (5, 3)
    assert with_views_of_labels(found, found) == found == with_views_of_labels(recipe, found)
    with pytest.raises(
        ConfigError,
        match=(
            r"shows 12 views of each image \(data.views\), and the labels of the t\d+ .*: set"
            r" --views 5, or"
        ),
    ):
        with_views_of_labels(replace_fields(recipe, {"data.views": 12}))
    online = replace_fields(recipe, {"teachers.t5.missing": "online"})
    assert with_views_of_labels(online).data.views == 10  # the teacher answers where its labels end
    both = replace_fields(online, {"teachers.t10.missing": "online"})
    assert with_views_of_labels(both).data.views == 5  # as many as no teacher has to answer


# -- what is said ---------------------------------------------------------------------------------


def test_a_sentence_names_the_setting_of_its_teacher() -> None:
    for name, of in (
        ("teacher", "--teacher-model MODEL"),
        ("conv", "--set teachers.conv.model=MODEL"),
    ):
        with pytest.raises(
            ConfigError, match=rf"the {name} has no model: name one with {of} \(a timm name"
        ):
            build_blank_teacher(TeacherConfig(), name, {})
    flags = {
        "teacher": "--teacher-path FILE, --teacher-pretrained",
        "model": "--model-path FILE, --pretrained",
        "inv": "--set teachers.inv.checkpoint=FILE, --set teachers.inv.pretrained=true",
    }
    for name, of in flags.items():
        with pytest.raises(
            ConfigError,
            match=(
                f"the {name} resnet18 would have random weights: give {of}, or the folder of a run"
            ),
        ):
            build_teacher_model(TeacherConfig(model="resnet18"), name)
    orders = {
        "teacher": "--reorder-classes",
        "model": "--reorder-classes",
        "inv": "--set teachers.inv.reorder_classes=true",
    }
    for name, of in orders.items():
        with pytest.raises(
            ConfigError,
            match=f"the {name} has the data set's classes .* in the {name}.: pass {of} to match",
        ):
            match_classes(name, ("dog", "cat"), 2, ("cat", "dog"), reorder=False)
    with pytest.raises(
        ConfigError,
        match=(
            r"the inv of a\.npz has the data set's .*: pass --set"
            r" teachers\.inv\.reorder_classes=true to"
        ),
    ):
        match_classes("inv", ("dog", "cat"), 2, ("cat", "dog"), reorder=False, source="a.npz")


# -- runs that have moved -------------------------------------------------------------------------


def test_a_run_is_found_where_it_was_moved_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/a", "moved/a"):
        (tmp_path / folder / "best").mkdir(parents=True)
        (tmp_path / folder / "recipe.yaml").touch()
        (tmp_path / folder / "best" / "config.json").touch()
    with runs_at({"runs/a": "moved/a"}):
        assert resolve_run("runs/a") == "moved/a/best" and resolve_run("./runs/a") == "runs/a/best"
    assert resolve_run("runs/a") == "runs/a/best"
