"""Manifold distillation: cosines between patches, within and between images."""

from collections.abc import Iterable

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_vits import DISTILLED, batch_of, kept, loss_of, outputs, randn, vit
from torch import Tensor, nn

from vitdistill.methods.manifold import (
    Manifold,
    patch_gram_loss,
    random_gram_loss,
    sample_gram_loss,
)

seeds = st.integers(0, 10**6)


def cosines(vectors: Tensor) -> Tensor:
    return torch.tensor([[torch.cosine_similarity(a, b, dim=0) for b in vectors] for a in vectors])


def difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    return torch.stack([(cosines(a) - cosines(b)).square().mean() for a, b in pairs]).mean().item()


# --- the formulas --------------------------------------------------------------------------------


@given(
    seed=seeds,
    images=st.integers(1, 3),
    patches=st.integers(1, 4),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    count=st.integers(2, 12),
)
def test_each_term_is_a_mean_of_squared_differences_of_cosines(
    seed: int, images: int, patches: int, widths: tuple[int, int], count: int
) -> None:
    ours, its = randn(seed, images, patches, widths[0]), randn(seed + 1, images, patches, widths[1])
    within = difference(zip(ours, its, strict=True))
    assert patch_gram_loss(ours, its).item() == pytest.approx(within, abs=1e-5)
    between = difference(zip(ours.unbind(1), its.unbind(1), strict=True))
    assert sample_gram_loss(ours, its).item() == pytest.approx(between, abs=1e-5)
    uniforms = randn(seed, images, patches)
    chosen = uniforms.flatten().sort(descending=True).indices[:count]
    drawn = difference([(ours.flatten(0, 1)[chosen], its.flatten(0, 1)[chosen])])
    loss = random_gram_loss(ours, its, uniforms, count).item()
    assert loss == pytest.approx(drawn, abs=1e-5)


def test_vectors_of_length_zero_stay_finite() -> None:
    ours, its = torch.zeros(2, 3, 4, requires_grad=True), randn(0, 2, 3, 4)
    loss = (
        patch_gram_loss(ours, its)
        + sample_gram_loss(ours, its)
        + random_gram_loss(ours, its, randn(1, 2, 3))
    )
    loss.backward()
    assert loss.isfinite() and ours.grad is not None and ours.grad.isfinite().all()


# --- as an objective -----------------------------------------------------------------------------


@torch.no_grad()
def test_weights_blocks_and_kept_patches_by_hand() -> None:
    """A student with class and distillation token; a teacher of other width and depth that sees 5
    patches.
    """
    student, teacher, keep = vit(0, DISTILLED), vit(1, embed_dim=36, depth=4, reg_tokens=1), kept(5)
    objective = Manifold(
        blocks=(0, -1),
        teacher_blocks=(1, -1),
        patch_weight=3.0,
        sample_weight=0.5,
        random_weight=0.25,
        num_samples=6,
    )
    ours, its = outputs(objective, student, teacher, keep)
    total = 0.0
    for i, (mine, other) in enumerate(((0, 1), (2, 3))):
        uniforms = batch_of().uniforms(32)[:, 16 * i : 16 * (i + 1)]
        places = [
            sorted(range(5), key=lambda k, b=b: keep[b, k].item()) for b in range(3)
        ]  # row by row
        s = torch.stack([ours.hidden[mine][b][2 + keep[b]][places[b]] for b in range(3)])
        t = torch.stack([its.hidden[other][b][2:][places[b]] for b in range(3)])
        drawn = torch.stack([uniforms[b][keep[b]][places[b]] for b in range(3)])
        total += (
            3 * patch_gram_loss(s, t)
            + 0.5 * sample_gram_loss(s, t)
            + 0.25 * random_gram_loss(s, t, drawn, 6)
        ).item() / 2
    assert loss_of(objective, student, teacher, keep).item() == pytest.approx(total, rel=1e-4)


@torch.no_grad()
def test_a_term_of_no_weight_is_left_out_and_the_others_couple_images() -> None:
    student, teacher = vit(0), vit(1)
    parts = [
        Manifold(sample_weight=0, random_weight=0),
        Manifold(patch_weight=0, random_weight=0),
        Manifold(patch_weight=0, sample_weight=0),
    ]
    assert [part.couples_images for part in parts] == [False, True, True]
    total = sum(loss_of(part, student, teacher) for part in parts).item()
    assert total == pytest.approx(loss_of(Manifold(), student, teacher).item(), rel=1e-5)


def test_a_convolutional_teacher_and_student() -> None:
    """Their stages have grids and widths of their own: 2 x 2 after stage 3 of a 16 pixel image."""
    vision, cnn = vit(0), timm.create_model("resnet10t", num_classes=5).eval()
    for p in cnn.parameters():
        nn.init.normal_(p, std=0.1)
    for student, teacher in ((vision, cnn), (cnn, vision)):
        objective = Manifold(blocks=(0, 2), teacher_blocks=(2, 1))
        loss = loss_of(objective, student, teacher)
        loss.backward()
        assert loss.isfinite() and loss > 0
