"""MaskedKD: which patches are chosen, and where they lie on another grid."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.methods.maskedkd import (
    MaskedKD,
    RandomPatches,
    TeacherGuided,
    patch_saliency,
    resample_saliency,
    select_patches,
)
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput


def attention_of(
    seed: int, batch: int = 2, heads: int = 3, prefix: int = 1, patches: int = 16
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, heads, prefix + patches, generator=generator)).softmax(-1)


def output(attention: Tensor, grid: tuple[int, int], prefix: int = 1, depth: int = 12) -> ViTOutput:
    """Of the last block."""
    network = Network(num_prefix_tokens=prefix, depth=depth)
    return ViTOutput(attention={depth - 1: attention}, grid=grid, network=network)


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    heads=st.integers(1, 6),
    prefix=st.integers(0, 5),
    patches=st.integers(1, 40),
    share=st.floats(0, 1),
)
def test_the_most_attended_patches_are_chosen(
    seed: int, batch: int, heads: int, prefix: int, patches: int, share: float
) -> None:
    attention, count = attention_of(seed, batch, heads, prefix, patches), round(share * patches)
    keep = select_patches(attention, count, prefix)
    assert keep.shape == (batch, count) and keep.dtype is torch.int64
    for row, chosen in zip(attention[:, :, prefix:].mean(1).tolist(), keep.tolist(), strict=True):
        assert len(set(chosen)) == count
        assert [row[i] for i in chosen] == sorted(row, reverse=True)[:count]


@given(seed=st.integers(0, 10**6), prefix=st.integers(1, 5))
def test_over_patches_is_a_softmax_over_patches(seed: int, prefix: int) -> None:
    logits = 3 * torch.randn(2, 3, prefix + 9, generator=torch.Generator().manual_seed(seed))
    attention, over_patches = logits.softmax(-1), logits[:, :, prefix:].softmax(-1).mean(1)
    assert torch.allclose(patch_saliency(attention, prefix, "patches"), over_patches, atol=1e-6)
    class_alone = torch.eye(prefix + 9)[0].expand(1, 2, -1)  # no division by zero
    assert patch_saliency(class_alone, prefix, "patches").isfinite().all()


@pytest.mark.parametrize(
    ("grid", "to_grid"),
    [((14, 14), (16, 16)), ((16, 16), (7, 7)), ((6, 10), (9, 5)), ((2, 2), (37, 37))],
)
@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_a_bright_corner_stays_in_its_corner(
    grid: tuple[int, int], to_grid: tuple[int, int], corner: tuple[int, int]
) -> None:
    saliency = torch.zeros(1, *grid)
    saliency[0, corner[0], corner[1]] = 1
    moved = resample_saliency(saliency.flatten(1), grid, to_grid).unflatten(1, to_grid)[0]
    assert moved[corner[0], corner[1]] == moved.max() > 0
    assert moved[-1 - corner[0], -1 - corner[1]] <= 1e-6


# --- the selectors -------------------------------------------------------------------------------


def test_student_guided_on_two_grids_goes_by_position() -> None:
    attention = torch.zeros(1, 2, 1 + 16)
    attention[:, :, 1 + 3] = 1  # top right of 4 x 4
    keep = MaskedKD(num_keep=4).select((8, 8), 4, output(attention, (4, 4)), None, None)
    assert set(keep[0].tolist()) == {6, 7, 14, 15}


@pytest.mark.parametrize("block", [-1, 3, -9])
def test_the_block_counts_from_either_end(block: int) -> None:
    attention = {i: attention_of(i) for i in range(12)}
    network = Network(num_prefix_tokens=1, depth=12)
    student = ViTOutput(attention=attention, grid=(4, 4), network=network)
    keep = MaskedKD(block=block).select((4, 4), 5, student, None, None)
    assert torch.equal(keep, select_patches(attention[block % 12], 5))


def test_teacher_guided_reads_the_teacher_alone() -> None:
    teacher = output(attention_of(1, prefix=2), (4, 4), prefix=2, depth=8)
    student = output(attention_of(2, patches=9), (3, 3))
    keep = TeacherGuided().select((4, 4), 5, student, teacher, None)
    assert torch.equal(keep, select_patches(teacher.attention[7], 5, num_prefix_tokens=2))


@pytest.mark.parametrize("kind", [MaskedKD, RandomPatches, TeacherGuided])
def test_keeping_all_keeps_every_patch_once(kind: Any) -> None:
    seen = output(attention_of(0), (4, 4))
    keep = kind(keep_rate=1.0).select((4, 4), 16, seen, seen, torch.rand(2, 16))
    assert all(sorted(row) == list(range(16)) for row in keep.tolist())
