"""Feature distillation after the final norm: class token and patches, each through a projection."""

from typing import Any

import pytest
import timm
import torch
from small_vits import DISTILLED, NO_CLASS, batch_of, kept, network, outputs, vit
from torch import Tensor, nn

from vitdistill.methods.tokens import TokenAdapter, TokenFeatures, feature_loss

Vectors = tuple[Tensor, Tensor]


def test_the_kinds_by_hand() -> None:
    ours, its = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[4.0, 3.0], [0.0, 3.0]])
    assert feature_loss(ours, its).item() == pytest.approx((1 + 1 + 0 + 4) / 4)
    assert feature_loss(ours, its, "smooth_l1").item() == pytest.approx((0.5 + 0.5 + 0 + 1.5) / 4)
    assert feature_loss(ours, its, "cosine").item() == pytest.approx((1 - 24 / 25) / 2, abs=1e-6)


def check(student: nn.Module, teacher: nn.Module, by_hand: Any, keep: Tensor | None = None) -> None:
    """``by_hand(ours, its)``: the pairs of class vectors and of patches, from the features."""
    for weights in ((1.0, 1.0), (0.5, 0.0)):
        objective = TokenFeatures(class_weight=weights[0], patch_weight=weights[1])
        adapter = objective.adapter(network(student, "student"), network(teacher))
        assert isinstance(adapter, TokenAdapter)
        ours, its = outputs(objective, student, teacher, keep)
        classes, patches = by_hand(ours.features, its.features)
        expected = weights[0] * ((adapter.class_head(classes[0]) - classes[1]) ** 2).mean()
        assert hasattr(adapter, "patch_head") == (weights[1] > 0)
        if weights[1]:
            expected = expected + ((adapter.patch_head(patches[0]) - patches[1]) ** 2).mean()
        loss = objective.loss(ours, its, batch_of(), adapter)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_kept_patches_by_hand() -> None:
    """Of a student with two prefix tokens and a wider, deeper teacher with registers."""
    teacher, keep = vit(1, embed_dim=36, depth=4, reg_tokens=2), kept(5)

    def by_hand(ours: Tensor, its: Tensor) -> tuple[Vectors, Vectors]:
        gathered = torch.stack([ours[b][2 + keep[b]] for b in range(3)])
        return (ours[:, 0], its[:, 0]), (gathered, its[:, 3:])

    check(vit(0, DISTILLED), teacher, by_hand, keep)


@pytest.mark.parametrize("registers", [0, 3])
@torch.no_grad()
def test_the_mean_of_the_patches_stands_in_for_a_class_token(registers: int) -> None:
    """Register tokens are not one."""
    without, other = vit(0, reg_tokens=registers, **NO_CLASS), vit(1)

    def by_hand(ours: Tensor, its: Tensor) -> tuple[Vectors, Vectors]:
        patches = ours[:, registers:]
        return (patches.mean(1), its[:, 0]), (patches, its[:, 1:])

    check(without, other, by_hand)
    check(other, without, lambda ours, its: [pair[::-1] for pair in by_hand(its, ours)])


@torch.no_grad()
def test_the_one_vector_of_a_small_cnn_meets_class_token_and_every_patch() -> None:
    torch.manual_seed(0)
    cnn = timm.create_model("resnet10t", num_classes=5).eval()  # its last map is 1 x 1
    for p in cnn.parameters():
        nn.init.normal_(p, std=0.1)

    def by_hand(ours: Tensor, its: Tensor) -> tuple[Vectors, Vectors]:
        return (ours[:, 0], its[:, 0]), (ours.expand(3, 16, 512), its[:, 1:])

    check(cnn, vit(0), by_hand)
