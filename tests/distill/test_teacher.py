"""Teachers: frozen, with their own input contract, answering in the data set's classes."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vitdistill.data.augment import InputSpec
from vitdistill.distill.classes import match_classes
from vitdistill.distill.teacher import Teacher
from vitdistill.errors import ConfigError
from vitdistill.vit.families import describe_network
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit

IMAGENET = InputSpec((16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = InputSpec((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LOGITS = Needs(logits=True)


def vit(
    num_classes: int = 4, image_size: int = 16, name: str = "vit_tiny_patch16_224", **args: object
) -> nn.Module:
    torch.manual_seed(1)
    settings = {
        "img_size": image_size,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        **args,
    }
    return timm.create_model(name, num_classes=num_classes, **settings).train()


def teacher_of(
    model: nn.Module, spec: InputSpec, images_spec: InputSpec, **options: object
) -> Teacher:
    return Teacher(
        model,
        describe_network(model, "teacher", "vit", spec.image_size),
        spec,
        images_spec,
        **options,
    )


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("cat", "dog"), None])
def test_equal_classes_or_as_many_without_names_are_taken(names: tuple[str, ...] | None) -> None:
    assert match_classes("teacher", names, 2, ("cat", "dog"), reorder=False).index is None


def test_extra_classes_are_left_out_by_name() -> None:
    match = match_classes("teacher", ("ant", "bee", "cat", "dog"), 4, ("dog", "bee"), reorder=False)
    assert match.index == (3, 1) and "2 of its 4, by name" in match.remark


def test_another_order_is_refused_unless_asked_for() -> None:
    with pytest.raises(ConfigError, match="class 0 is 'cat' in the data set and 'dog'") as caught:
        match_classes("teacher", ("dog", "cat"), 2, ("cat", "dog"), reorder=False)
    assert caught.value.field == "teachers.teacher.reorder_classes"


@given(st.permutations(list(range(7))))
def test_reordering_finds_every_class(order: list[int]) -> None:
    its, ours = [f"c{i}" for i in order], [f"c{i}" for i in range(7)]
    match = match_classes("teacher", its, 7, ours, reorder=True)
    assert [its[i] for i in match.index or range(7)] == ours


@pytest.mark.parametrize(
    ("its", "count", "words"),
    [
        (("cat", "cow", "owl", "ape", "bat"), 5, "does not know 4 of the data set's 5"),
        (("cat", "dog"), 3, "answers with 3"),
        (None, 7, "answers with 7"),
        (("cat", "cat", "dog", "elk", "fox", "gnu"), 6, "two classes called 'cat'"),
    ],
)
def test_other_classes_are_refused(its: tuple[str, ...] | None, count: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        match_classes("teacher", its, count, ("cat", "dog", "elk", "fox", "gnu"), reorder=True)
    assert caught.value.field == "teachers.teacher.model"


# --- its own input contract ----------------------------------------------------------------------


def test_images_arrive_in_its_own_normalisation() -> None:
    pixels = torch.rand(5, 3, 16, 16)

    def normalised(spec: InputSpec) -> Tensor:
        return (pixels - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(
            3, 1, 1
        )

    for mine, its in ((IMAGENET, HALF), (HALF, IMAGENET)):
        prepared = teacher_of(vit(), its, mine).prepare(normalised(mine))
        assert torch.allclose(prepared, normalised(its), atol=1e-5)
    same = normalised(HALF)
    assert teacher_of(vit(), HALF, HALF).prepare(same) is same


def test_images_arrive_at_its_own_size() -> None:
    large = InputSpec((24, 32), HALF.mean, HALF.std)
    teacher = teacher_of(vit(dynamic_img_size=True), large, HALF)
    prepared = teacher.prepare(torch.full((2, 3, 16, 16), 0.25))
    assert prepared.shape == (2, 3, 24, 32) and torch.allclose(
        prepared, torch.tensor(0.25), atol=1e-5
    )


def test_kept_patches_are_its_own() -> None:
    model = vit()
    teacher = teacher_of(model, HALF, HALF)
    images, keep = torch.randn(2, 3, 16, 16), torch.tensor([[0, 3, 15], [7, 8, 2]])
    output = teacher(images, LOGITS, keep)
    assert output.logits is not None and torch.equal(
        output.logits, run_vit(model, images, LOGITS, keep).logits
    )
    changed = images.clone()
    changed[0, :, :4, 4:8] += 1  # patch 1 of image 0, which is not seen
    again = teacher(changed, LOGITS, keep)
    assert again.logits is not None and torch.equal(again.logits, output.logits)


# --- frozen --------------------------------------------------------------------------------------


def test_it_is_frozen_and_in_evaluation_mode() -> None:
    model = vit(drop_rate=0.5, drop_path_rate=0.5)
    teacher = teacher_of(model, HALF, HALF)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    one, two = teacher(images, LOGITS), teacher(images, LOGITS)
    assert torch.equal(one.logits, two.logits) and not one.logits.requires_grad
    with torch.enable_grad():
        assert not teacher(images, Needs(hidden=frozenset({0}))).hidden[0].requires_grad


def test_it_answers_in_the_data_sets_classes() -> None:
    model = vit(num_classes=5)
    whole, some = (
        teacher_of(model, HALF, HALF),
        teacher_of(model, HALF, HALF, class_index=torch.tensor([4, 0])),
    )
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(some(images, LOGITS).logits, whole(images, LOGITS).logits[:, [4, 0]])


def test_a_teacher_with_two_heads_answers_with_its_prediction() -> None:
    model = vit(name="deit_tiny_distilled_patch16_224")
    teacher = teacher_of(model, HALF, HALF, class_index=torch.tensor([1, 0, 3, 2]))
    images = torch.randn(2, 3, 16, 16)
    output = teacher(images, LOGITS)
    assert output.logits is not None and torch.allclose(
        output.logits, model(images)[:, [1, 0, 3, 2]], atol=1e-5
    )
    assert output.head_logits is None


def test_its_precision_is_its_own() -> None:
    teacher = teacher_of(vit(), HALF, IMAGENET, dtype=torch.bfloat16)
    images = torch.randn(2, 3, 16, 16)
    output = teacher(images, LOGITS)
    assert output.logits is not None and output.logits.dtype is torch.bfloat16
    exact = teacher_of(vit(), HALF, IMAGENET)(images, LOGITS)
    with torch.autocast("cpu", torch.bfloat16):
        float32 = teacher_of(vit(), HALF, IMAGENET, dtype=torch.float32)(images, LOGITS)
        same = teacher_of(vit(), HALF, IMAGENET)(images, LOGITS)
    assert float32.logits is not None and torch.equal(float32.logits, exact.logits)
    assert same.logits is not None and same.logits.dtype is torch.bfloat16
