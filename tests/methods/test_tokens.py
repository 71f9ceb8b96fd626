"""Feature distillation after the final norm: class token and patches, through projections of their
own.
"""

import pytest
import timm
import torch
from hypothesis import strategies as st
from small_vits import DISTILLED, NO_CLASS, batch_of, kept, network, vit
from torch import Tensor, nn

from vitdistill.methods.tokens import TokenAdapter, TokenFeatures, feature_loss
from vitdistill.vit.needs import Needs
from vitdistill.vit.output import ViTOutput
from vitdistill.vit.walk import run_vit

seeds = st.integers(0, 10**6)


def both(
    student: nn.Module, teacher: nn.Module, keep: Tensor | None = None
) -> tuple[ViTOutput, ViTOutput]:
    images = batch_of().images
    return run_vit(student, images, Needs(features=True)), run_vit(
        teacher, images, Needs(features=True), keep
    )


def adapter_of(objective: TokenFeatures, student: nn.Module, teacher: nn.Module) -> TokenAdapter:
    torch.manual_seed(3)
    adapter = objective.adapter(network(student, "student"), network(teacher))
    assert isinstance(adapter, TokenAdapter)
    return adapter


def loss_of(
    objective: TokenFeatures, student: nn.Module, teacher: nn.Module, keep: Tensor | None = None
) -> Tensor:
    return objective.loss(
        *both(student, teacher, keep), batch_of(), adapter_of(objective, student, teacher)
    )


def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


# --- the formula ---------------------------------------------------------------------------------


def test_the_kinds_by_hand() -> None:
    ours, its = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[4.0, 3.0], [0.0, 3.0]])
    assert feature_loss(ours, its).item() == pytest.approx((1 + 1 + 0 + 4) / 4)
    assert feature_loss(ours, its, "smooth_l1").item() == pytest.approx((0.5 + 0.5 + 0 + 1.5) / 4)
    assert feature_loss(ours, its, "cosine").item() == pytest.approx((1 - 24 / 25) / 2, abs=1e-6)


# --- as an objective -----------------------------------------------------------------------------


def by_hand(
    adapter: TokenAdapter, classes: tuple[Tensor, Tensor], patches: tuple[Tensor, Tensor]
) -> Tensor:
    return ((adapter.class_head(classes[0]) - classes[1]) ** 2).mean() + (
        (adapter.patch_head(patches[0]) - patches[1]) ** 2
    ).mean()


@torch.no_grad()
def test_what_is_compared_by_hand() -> None:
    """A student with class and distillation token; a teacher of other width and depth, with
    registers, that sees 5 patches.
    """
    student, teacher, keep = vit(0, DISTILLED), vit(1, embed_dim=36, depth=4, reg_tokens=2), kept(5)
    ours, its = both(student, teacher, keep)
    assert torch.equal(
        its.features[:, :3],
        teacher.norm(
            run_vit(teacher, batch_of().images, Needs(hidden=frozenset({-1})), keep).hidden[3]
        )[:, :3],
    )
    gathered = torch.stack([ours.features[b][2 + keep[b]] for b in range(3)])
    adapter = adapter_of(TokenFeatures(), student, teacher)
    expected = by_hand(
        adapter, (ours.features[:, 0], its.features[:, 0]), (gathered, its.features[:, 3:])
    )
    assert loss_of(TokenFeatures(), student, teacher, keep).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    half = TokenFeatures(class_weight=0.5, patch_weight=0)
    assert not hasattr(adapter_of(half, student, teacher), "patch_head")
    term = (
        (adapter_of(half, student, teacher).class_head(ours.features[:, 0]) - its.features[:, 0])
        ** 2
    ).mean()
    assert loss_of(half, student, teacher, keep).item() == pytest.approx(term.item() / 2, rel=1e-5)


@torch.no_grad()
def test_the_mean_of_the_patches_stands_in_for_a_class_token() -> None:
    """Without one; with registers alone, which are not one; and in a network that is run whole."""
    for form in (NO_CLASS, {"reg_tokens": 3, **NO_CLASS}):
        student, teacher = vit(0, **form), vit(1)
        adapter = adapter_of(TokenFeatures(), student, teacher)
        ours, its = both(student, teacher)
        patches = ours.features[:, form.get("reg_tokens", 0) :]
        expected = by_hand(
            adapter, (patches.mean(1), its.features[:, 0]), (patches, its.features[:, 1:])
        )
        assert loss_of(TokenFeatures(), student, teacher).item() == pytest.approx(
            expected.item(), rel=1e-5
        )
        back = adapter_of(TokenFeatures(), teacher, student)
        expected = by_hand(
            back, (its.features[:, 0], patches.mean(1)), (its.features[:, 1:], patches)
        )
        assert TokenFeatures().loss(its, ours, batch_of(), back).item() == pytest.approx(
            expected.item(), rel=1e-5
        )


@torch.no_grad()
def test_a_convolutional_teacher_and_student() -> None:
    """Its last map of a 16 pixel image is 1 x 1: that one vector meets the class token, and every
    patch of the other network.
    """
    vision, other = vit(0), cnn()
    ours, its = both(vision, other)
    assert (
        ours.features is not None and its.features is not None and its.features.shape == (3, 1, 512)
    )
    adapter = adapter_of(TokenFeatures(), other, vision)
    expected = by_hand(
        adapter,
        (its.features[:, 0], ours.features[:, 0]),
        (its.features.expand(3, 16, 512), ours.features[:, 1:]),
    )
    assert TokenFeatures().loss(its, ours, batch_of(), adapter).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    assert loss_of(TokenFeatures(), vision, other).isfinite()
