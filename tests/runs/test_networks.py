"""What a recipe's networks and labels are made of, and what is said when something lacks."""

import pytest
import torch

from vitdistill.errors import ConfigError, DataError, Set
from vitdistill.labels.encoding import LogitEncoding
from vitdistill.labels.layout import Layout
from vitdistill.labels.manifest import Manifest
from vitdistill.labels.store import LabelStore
from vitdistill.methods.kd import SoftKD
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.settings import StudentConfig, TeacherConfig, TrainConfig
from vitdistill.runs.networks import (
    amp_dtype_of,
    build_blank,
    build_student,
    build_teacher_model,
)
from vitdistill.runs.stored import with_views_of_labels


@pytest.mark.parametrize("counts", [(5, 10), (10, 5)])
def test_as_many_views_as_all_labels_have(tmp_path, counts):
    """Two teachers' labels, in this order, for a recipe of 100 epochs."""
    teachers = {}
    for count in counts:
        layout = Layout(logits=LogitEncoding(kind="float16", num_classes=3))
        shape = {"layout": layout, "num_samples": 4, "num_views": count}
        manifest = Manifest(identity={"view.seed": 3}, **shape)
        store = LabelStore.create(tmp_path / f"t{count}", manifest)
        teachers[f"t{count}"] = TeacherConfig(model="resnet18", labels=str(store.path))
    objectives = {f"kd_{name}": SoftKD(teacher=name) for name in teachers}
    recipe = Recipe(teachers=teachers, objectives=objectives, train=TrainConfig(epochs=100))
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


def test_a_teacher_needs_a_model_and_weights():
    with pytest.raises(ConfigError) as caught:
        build_teacher_model(TeacherConfig(), "conv", with_weights=False)
    assert caught.value.field == "teachers.conv.model"
    with pytest.raises(ConfigError) as caught:
        build_teacher_model(TeacherConfig(model="resnet18"), "conv")
    assert caught.value.field == "teachers.conv.checkpoint"
    assert Set("teachers.conv.pretrained", True) in caught.value.fixes


def test_what_cannot_be_built_is_called_by_its_place_in_the_recipe():
    """Tests have no network, so weights cannot be downloaded."""
    asked = {"model": "tf_efficientnet_lite0.in1k", "pretrained": True}
    remedies = {"checkpoint": None, "pretrained": False}
    for place, build in (
        ("student", lambda read, **of: build_student(StudentConfig(**of), 3, with_weights=read)),
        (
            "teachers.conv",
            lambda read, **of: build_teacher_model(TeacherConfig(**of), "conv", with_weights=read),
        ),
    ):
        with pytest.raises(DataError) as caught:
            build(True, **asked)
        assert caught.value.field == f"{place}.pretrained"
        assert {*caught.value.fixes} == {Set(f"{place}.{k}", v) for k, v in remedies.items()}
        with pytest.raises(ConfigError) as refused:
            build(False, model="vit_tiny_patch16_224", image_size=30)
        assert refused.value.field == f"{place}.image_size"


@pytest.mark.parametrize(
    ("setting", "classes"),
    [({}, 5), ({"checkpoint": "tuned.pth"}, 5), ({"pretrained": True}, 0)],
)
def test_a_head_is_assumed_of_a_file_and_not_of_weights_that_are_known(setting, classes):
    """DINOv3's own weights are without a head; a file fine-tuned under its name has one."""
    args = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
    config = TeacherConfig(model="vit_small_patch16_dinov3", model_args=args, **setting)
    recipe = Recipe(teachers={"teacher": config}, objectives={"kd": SoftKD()})
    built = build_blank(recipe, 5)[1]["teacher"]
    assert (built.network.num_classes, built.model.num_classes) == (classes, classes)


@pytest.mark.parametrize(
    ("native", "emulated", "expected"),
    [(True, True, torch.bfloat16), (False, True, None), (False, False, None)],
)
def test_a_gpu_that_emulates_bfloat16_computes_in_float32(monkeypatch, native, emulated, expected):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: emulated if including_emulation else native,
    )
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert amp_dtype_of("auto", gpu) is expected and amp_dtype_of("auto", cpu) is None
    assert amp_dtype_of("bfloat16", gpu) is torch.bfloat16
