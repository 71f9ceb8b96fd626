"""What a recipe's networks and labels are made of, and what is said when something lacks."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vitdistill.errors import ConfigError, Set
from vitdistill.labels.encoding import LogitEncoding
from vitdistill.labels.layout import Layout
from vitdistill.labels.manifest import Manifest
from vitdistill.labels.store import LabelStore
from vitdistill.methods.kd import SoftKD
from vitdistill.recipes.config import Recipe, TeacherConfig, TrainConfig
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.networks import build_teacher_model
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
    with pytest.raises(ConfigError) as caught:
        with_views_of_labels(replace_fields(recipe, {"data.views": 12}))
    assert caught.value.field == "data.views" and Set("data.views", 5) in caught.value.fixes
    online = replace_fields(recipe, {"teachers.t5.missing": "online"})
    assert with_views_of_labels(online).data.views == 10  # the teacher answers where its labels end
    both = replace_fields(online, {"teachers.t10.missing": "online"})
    assert with_views_of_labels(both).data.views == 5  # as many as no teacher has to answer


# -- networks -------------------------------------------------------------------------------------


def test_a_teacher_needs_a_model_and_weights() -> None:
    with pytest.raises(ConfigError) as caught:
        build_teacher_model(TeacherConfig(), "conv", with_weights=False)
    assert caught.value.field == "teachers.conv.model"
    with pytest.raises(ConfigError) as caught:
        build_teacher_model(TeacherConfig(model="resnet18"), "conv")
    assert caught.value.field == "teachers.conv.checkpoint"
    assert Set("teachers.conv.pretrained", True) in caught.value.fixes
