"""Attention distillation: rows of attention over the tokens two networks share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_vits import DISTILLED, NO_CLASS, kept, loss_of, outputs, randn, vit
from torch import Tensor

from vitdistill.methods.attention_maps import (
    AttentionMaps,
    attention_loss,
    class_attention_loss,
    shared_rows,
    shared_vectors,
)
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput

seeds = st.integers(0, 10**6)


def some(seed: int, *shape: int) -> Tensor:
    return 2 * randn(seed, *shape)


# --- the formulas --------------------------------------------------------------------------------


def test_the_divergence_of_rows_by_hand() -> None:
    """One image of two heads, two tokens; of three heads in the teacher, the means meet."""
    ours, its = [[0.5, 0.5], [0.9, 0.1]], [[0.25, 0.75], [0.6, 0.4]]
    kl = [
        sum(q * math.log(q / p) for p, q in zip(a, b, strict=True))
        for a, b in zip(ours, its, strict=True)
    ]
    student, teacher = torch.tensor([ours]), torch.tensor([its])
    assert class_attention_loss(student, teacher).item() == pytest.approx(sum(kl) / 2, abs=1e-6)
    assert class_attention_loss(student, teacher, "mse").item() == pytest.approx(
        (2 * 0.25**2 + 2 * 0.3**2) / 2, abs=1e-6
    )
    three = torch.cat([teacher, teacher.mean(1, keepdim=True)], dim=1)
    mean = [sum(q * math.log(q / p) for p, q in zip([0.7, 0.3], [0.425, 0.575], strict=True))]
    assert class_attention_loss(student, three).item() == pytest.approx(mean[0], abs=1e-6)


@given(seed=seeds, heads=st.integers(1, 4), tokens=st.integers(1, 9))
def test_all_rows_are_torchs_divergence_of_their_softmax(
    seed: int, heads: int, tokens: int
) -> None:
    ours, its = some(seed, 2, heads, tokens, tokens), some(seed + 1, 2, heads, tokens, tokens)
    p, q = ours.softmax(-1), its.softmax(-1)
    expected = (q * (q / p).log()).sum(-1).mean()
    assert attention_loss(ours, its, "kl").item() == pytest.approx(expected.item(), abs=1e-5)
    assert attention_loss(ours, its, "mse").item() == pytest.approx(
        (ours - its).square().mean().item(), rel=1e-5
    )
    more = torch.cat([its, its], dim=1)
    expected = (q.mean(1) * (q.mean(1) / p.mean(1)).log()).sum(-1).mean()
    assert attention_loss(ours, more, "kl").item() == pytest.approx(expected.item(), abs=1e-5)
    assert attention_loss(ours, more, "mse").item() == pytest.approx(
        (ours.mean(1) - its.mean(1)).square().mean().item(), rel=1e-4, abs=1e-6
    )


# --- which tokens --------------------------------------------------------------------------------


@given(
    seed=seeds,
    prefix=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    count=st.integers(1, 9),
    classes=st.booleans(),
)
def test_rows_and_vectors_are_gathered_token_by_token(
    seed: int, prefix: tuple[int, int], count: int, classes: bool
) -> None:
    keep = kept(count, 2, 9)
    student = ViTOutput(
        grid=(3, 3), network=Network(num_prefix_tokens=prefix[0], has_class_token=classes)
    )
    teacher = ViTOutput(
        grid=(3, 3), keep=keep, network=Network(num_prefix_tokens=prefix[1], has_class_token=True)
    )
    ours, its = (
        some(seed, 2, 2, prefix[0] + 9).softmax(-1),
        some(seed + 1, 2, 3, prefix[1] + count).softmax(-1),
    )
    rows = shared_rows(student, teacher, ours, its)
    vectors = shared_vectors(student, teacher, ours[..., None], its[..., None])
    for b in range(2):
        mine = [0] * classes + [prefix[0] + int(place) for place in keep[b]]
        other = [0] * classes + [prefix[1] + i for i in range(count)]
        for row, vector, values, places in (
            (rows[0], vectors[0], ours, mine),
            (rows[1], vectors[1], its, other),
        ):
            picked = values[b][:, places]
            assert torch.allclose(row[b], picked / picked.sum(1, keepdim=True), atol=1e-6)
            assert torch.equal(vector[b], picked.T)


@given(seed=seeds, grid=st.sampled_from([(2, 2), (4, 2), (8, 8), (3, 5)]))
def test_between_grids_patches_keep_their_total_and_a_level_row_stays_level(
    seed: int, grid: tuple[int, int]
) -> None:
    student = ViTOutput(grid=grid, network=Network(num_prefix_tokens=2, has_class_token=True))
    teacher = ViTOutput(grid=(4, 4), network=Network(num_prefix_tokens=1, has_class_token=True))
    ours = some(seed, 2, 3, 2 + grid[0] * grid[1]).softmax(-1)
    its = some(seed, 2, 3, 17).softmax(-1)
    row, _ = shared_rows(student, teacher, ours, its)
    without_distillation = ours[:, :, 0] / (1 - ours[:, :, 1])
    assert torch.allclose(row[:, :, 0], without_distillation, atol=1e-5) and torch.allclose(
        row.sum(-1), torch.ones(2, 3)
    )
    level = torch.cat([ours[:, :, :2], torch.full((2, 3, grid[0] * grid[1]), 0.01)], dim=-1)
    row, _ = shared_rows(student, teacher, level, its)
    assert torch.allclose(row[:, :, 1:], row[:, :, 1:2].expand(2, 3, 16), atol=1e-6)


# --- as an objective -----------------------------------------------------------------------------


@torch.no_grad()
def test_the_class_row_on_kept_patches_by_hand() -> None:
    """A student with class and distillation token; a teacher of other width, depth and heads that
    sees 5 patches.
    """
    student, teacher, keep = vit(0, DISTILLED), vit(1, embed_dim=36, depth=4, num_heads=3), kept(5)
    objective = AttentionMaps(block=1, teacher_block=-1)
    ours, its = outputs(objective, student, teacher, keep)
    total = 0.0
    for b in range(3):
        p = ours.attention[1][b][:, [0, *(2 + keep[b]).tolist()]]
        p, q = (p / p.sum(1, keepdim=True)).mean(0), its.attention[3][b].mean(0)
        total += (q * (q / p).log()).sum().item() / 3
    assert loss_of(objective, student, teacher, keep).item() == pytest.approx(total, rel=1e-4)


@torch.no_grad()
def test_all_rows_on_kept_patches_by_hand() -> None:
    """No class token in the teacher: the student's is left out too."""
    student, teacher, keep = vit(0), vit(1, embed_dim=36, **NO_CLASS), kept(5)
    objective = AttentionMaps(rows="all", divergence="kl", block=0, teacher_block=2)
    ours, its = outputs(objective, student, teacher, keep)
    total = 0.0
    for b in range(3):
        places = (1 + keep[b]).tolist()
        p = (
            ours.qkv[0].q[b][:, places]
            @ ours.qkv[0].k[b][:, places].transpose(1, 2)
            / math.sqrt(12)
        ).softmax(-1)
        q = (its.qkv[2].q[b] @ its.qkv[2].k[b].transpose(1, 2) / math.sqrt(18)).softmax(-1)
        total += (q * (q / p).log()).sum(-1).mean().item() / 3
    assert loss_of(objective, student, teacher, keep).item() == pytest.approx(total, rel=1e-4)
