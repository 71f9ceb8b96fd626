"""Manifold distillation: cosines between patches, within and between images."""

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
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput

seeds = st.integers(0, 10**6)


def cosines(vectors: Tensor) -> Tensor:
    return torch.tensor([[torch.cosine_similarity(a, b, dim=0) for b in vectors] for a in vectors])


# --- the formulas --------------------------------------------------------------------------------


@given(
    seed=seeds,
    images=st.integers(1, 3),
    patches=st.integers(1, 4),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_each_term_is_a_mean_of_squared_differences_of_cosines(
    seed: int, images: int, patches: int, widths: tuple[int, int]
) -> None:
    ours, its = randn(seed, images, patches, widths[0]), randn(seed + 1, images, patches, widths[1])
    within = [(cosines(a) - cosines(b)).square().mean() for a, b in zip(ours, its, strict=True)]
    assert patch_gram_loss(ours, its).item() == pytest.approx(
        torch.stack(within).mean().item(), abs=1e-5
    )
    between = [(cosines(ours[:, i]) - cosines(its[:, i])).square().mean() for i in range(patches)]
    assert sample_gram_loss(ours, its).item() == pytest.approx(
        torch.stack(between).mean().item(), abs=1e-5
    )
    everything = (cosines(ours.flatten(0, 1)) - cosines(its.flatten(0, 1))).square().mean()
    assert random_gram_loss(ours, its, randn(seed, images, patches)).item() == pytest.approx(
        everything.item(), abs=1e-5
    )


@given(seed=seeds, count=st.integers(2, 12))
def test_the_largest_numbers_are_drawn(seed: int, count: int) -> None:
    ours, its, uniforms = randn(seed, 2, 5, 3), randn(seed + 1, 2, 5, 4), randn(seed + 2, 2, 5)
    chosen = sorted(range(10), key=lambda i: -uniforms.flatten()[i].item())[:count]
    expected = (
        (cosines(ours.flatten(0, 1)[chosen]) - cosines(its.flatten(0, 1)[chosen])).square().mean()
    )
    assert random_gram_loss(ours, its, uniforms, count).item() == pytest.approx(
        expected.item(), abs=1e-5
    )


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
def test_what_is_drawn_depends_on_the_seed_and_on_nothing_else() -> None:
    objective, student, teacher = (
        Manifold(num_samples=8, patch_weight=0, sample_weight=0),
        vit(0),
        vit(1),
    )
    ours, its = outputs(objective, student, teacher)
    losses = [objective.loss(ours, its, batch_of(seed=seed), None) for seed in (0, 0, 1)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


@torch.no_grad()
def test_a_term_of_no_weight_is_left_out_and_the_others_couple_images() -> None:
    student, teacher = vit(0), vit(1)
    parts = [
        Manifold(sample_weight=0, random_weight=0),
        Manifold(patch_weight=0, random_weight=0),
        Manifold(patch_weight=0, sample_weight=0),
    ]
    assert [part.couples_images for part in parts] == [
        False,
        True,
        True,
    ] and Manifold().couples_images
    assert sum(loss_of(part, student, teacher) for part in parts).item() == pytest.approx(
        loss_of(Manifold(), student, teacher).item(), rel=1e-5
    )
    ours, its = outputs(parts[0], student, teacher)
    alone = []
    for b in range(3):
        mine, other = (
            {i: h[b : b + 1] for i, h in output.hidden.items()} for output in (ours, its)
        )
        one = [
            ViTOutput(hidden=hidden, grid=(4, 4), network=Network(num_prefix_tokens=1, depth=3))
            for hidden in (mine, other)
        ]
        alone.append(parts[0].loss(one[0], one[1], batch_of(1), None).item())
    assert sum(alone) / 3 == pytest.approx(loss_of(parts[0], student, teacher).item(), rel=1e-5)


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
