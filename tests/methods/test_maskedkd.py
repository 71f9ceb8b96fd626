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
    seed: int,
    batch: int = 2,
    heads: int = 3,
    prefix: int = 1,
    patches: int = 16,
    scale: float = 2.0,
) -> Tensor:
    logits = scale * torch.randn(
        batch, heads, prefix + patches, generator=torch.Generator().manual_seed(seed)
    )
    return logits.softmax(-1)


def output(
    attention: Tensor, grid: tuple[int, int], prefix: int = 1, depth: int = 12, block: int = 11
) -> ViTOutput:
    return ViTOutput(
        attention={block: attention},
        grid=grid,
        network=Network(num_prefix_tokens=prefix, depth=depth),
    )


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "batch": st.integers(1, 4),
        "heads": st.integers(1, 6),
        "prefix": st.integers(0, 5),
        "patches": st.integers(1, 40),
    }
)


# --- choosing ------------------------------------------------------------------------------------


@given(shape=shapes, share=st.floats(0, 1))
def test_the_most_attended_patches_are_chosen(shape: dict[str, int], share: float) -> None:
    attention, count = attention_of(**shape), max(1, round(share * shape["patches"]))
    keep = select_patches(attention, count, shape["prefix"])
    assert keep.shape == (shape["batch"], count) and keep.dtype is torch.int64
    saliency = attention[:, :, shape["prefix"] :].mean(1)
    for row, chosen in zip(saliency, keep, strict=True):
        assert (
            len(set(chosen.tolist())) == count
            and int(chosen.min()) >= 0
            and int(chosen.max()) < shape["patches"]
        )
        left = row[[i for i in range(len(row)) if i not in chosen]]
        assert len(left) == 0 or row[chosen].min() >= left.max()
        assert row[chosen].tolist() == sorted(row[chosen].tolist(), reverse=True)


@pytest.mark.parametrize("count", [1, 7, 49, 98, 196])
def test_ties_are_broken_the_same_way_every_time(count: int) -> None:
    attention = torch.full((4, 3, 197), 1 / 197)
    first = select_patches(attention, count)
    assert all(torch.equal(first, select_patches(attention.clone(), count)) for _ in range(5))
    assert torch.equal(first, first[:1].expand(4, -1))


@given(seed=st.integers(0, 10**6), prefix=st.integers(1, 5))
def test_over_patches_is_a_softmax_over_patches(seed: int, prefix: int) -> None:
    logits = 3 * torch.randn(2, 3, prefix + 9, generator=torch.Generator().manual_seed(seed))
    over_patches = logits[:, :, prefix:].softmax(-1).mean(1)
    assert torch.allclose(
        patch_saliency(logits.softmax(-1), prefix, "patches"), over_patches, atol=1e-6
    )
    assert torch.allclose(
        patch_saliency(logits.softmax(-1), prefix, "tokens"),
        logits.softmax(-1)[:, :, prefix:].mean(1),
    )


def test_a_head_that_looks_only_at_the_class_token_is_no_division_by_zero() -> None:
    attention = torch.zeros(1, 2, 5)
    attention[:, :, 0] = 1
    assert patch_saliency(attention, 1, "patches").isfinite().all()


# --- another grid --------------------------------------------------------------------------------

grids = st.tuples(st.integers(1, 20), st.integers(1, 20))


@pytest.mark.parametrize(
    ("grid", "to_grid"),
    [
        ((14, 14), (16, 16)),
        ((16, 16), (14, 14)),
        ((14, 14), (7, 7)),
        ((8, 8), (16, 16)),
        ((6, 10), (9, 5)),
        ((10, 4), (4, 10)),
        ((2, 2), (37, 37)),
    ],
)
@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_a_bright_corner_stays_in_its_corner(
    grid: tuple[int, int], to_grid: tuple[int, int], corner: tuple[int, int]
) -> None:
    saliency = torch.zeros(1, *grid)
    saliency[0, corner[0], corner[1]] = 1
    moved = resample_saliency(saliency.flatten(1), grid, to_grid).unflatten(1, to_grid)[0]
    assert moved[corner[0], corner[1]] == moved.max() > 0
    assert moved.sum() > 0 and moved[-1 - corner[0], -1 - corner[1]] <= 1e-6


# --- the selectors -------------------------------------------------------------------------------


def test_student_guided_on_one_grid_is_select_patches() -> None:
    attention = attention_of(0)
    keep = MaskedKD().select((4, 4), 6, output(attention, (4, 4)), None, None)
    assert torch.equal(keep, select_patches(attention, 6))


def test_student_guided_on_two_grids_goes_by_position() -> None:
    attention = torch.zeros(1, 2, 1 + 16)
    attention[:, :, 1 + 3] = 1  # top right of 4 x 4
    keep = MaskedKD(num_keep=4).select((8, 8), 4, output(attention, (4, 4)), None, None)
    assert set(keep[0].tolist()) == {6, 7, 14, 15}


@pytest.mark.parametrize("block", [-1, 3, -9])
def test_the_block_counts_from_either_end(block: int) -> None:
    attention = {i: attention_of(i) for i in range(12)}
    student = ViTOutput(
        attention=attention, grid=(4, 4), network=Network(num_prefix_tokens=1, depth=12)
    )
    keep = MaskedKD(block=block).select((4, 4), 5, student, None, None)
    assert torch.equal(keep, select_patches(attention[block % 12], 5))


def test_teacher_guided_reads_the_teacher_alone() -> None:
    teacher = output(attention_of(1, prefix=2), (4, 4), prefix=2, depth=8, block=7)
    student = output(attention_of(2, patches=9), (3, 3))
    keep = TeacherGuided().select((4, 4), 5, student, teacher, None)
    assert torch.equal(keep, select_patches(teacher.attention[7], 5, num_prefix_tokens=2))


@pytest.mark.parametrize("kind", [MaskedKD, RandomPatches, TeacherGuided])
def test_keeping_all_keeps_every_patch_once(kind: Any) -> None:
    seen = output(attention_of(0), (4, 4))
    keep = kind(keep_rate=1.0).select((4, 4), 16, seen, seen, torch.rand(2, 16))
    assert all(sorted(row) == list(range(16)) for row in keep.tolist())
