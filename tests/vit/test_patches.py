"""Patches brought to the same places: what resampling and gathering keep, on any two grids."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.vit.patches import PatchMap, gather_patches, resample_patches

sides = st.integers(1, 9)
grids = st.tuples(sides, sides)
seeds = st.integers(0, 10**6)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def permutation(seed: int, batch: int, count: int, kept: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(count, generator=generator)[:kept] for _ in range(batch)])


# --- another grid --------------------------------------------------------------------------------


def weights(count: int, to: int) -> Tensor:
    """How much of each of ``count`` patches in a line there is in each of ``to``: a triangle as
    wide as the coarser of the two.
    """
    rows = torch.zeros(to, count, dtype=torch.float64)
    for i in range(to):
        for k in range(count):
            away = abs((k + 0.5) / count - (i + 0.5) / to) * min(count, to)
            rows[i, k] = max(0.0, 1 - away)
    return rows / rows.sum(1, keepdim=True)


@given(grid=grids, to=grids, seed=seeds)
def test_every_patch_is_a_mean_of_those_near_it(
    grid: tuple[int, int], to: tuple[int, int], seed: int
) -> None:
    # torch (2.15) reads wrong rows where an antialiased result has one column.
    assume(not to[1] == 1 < to[0])
    vectors = random(seed, 2, grid[0] * grid[1] + 1, 3)[:, 1:]  # behind a class token
    along = weights(grid[0], to[0]), weights(grid[1], to[1])
    by_hand = torch.einsum("ar,bc,nrcd->nabd", *along, vectors.double().unflatten(1, grid))
    found = resample_patches(vectors, grid, to).double()
    assert torch.allclose(found, by_hand.flatten(1, 2), atol=1e-5)


# --- kept patches --------------------------------------------------------------------------------


@given(seed=seeds, batch=st.integers(1, 3), count=st.integers(1, 12), data=st.data())
def test_rows_are_gathered_in_the_order_of_the_choice(
    seed: int, batch: int, count: int, data: st.DataObject
) -> None:
    keep = permutation(seed, batch, count, data.draw(st.integers(1, count)))
    for values in (random(seed, batch, count, 2, 2), random(seed, batch, count) > 0):
        rows = gather_patches(values, keep)
        expected = torch.stack([image[kept] for image, kept in zip(values, keep, strict=True)])
        assert torch.equal(rows, expected) and rows.dtype is values.dtype


# --- maps ----------------------------------------------------------------------------------------


@given(mine=grids, its=grids, seed=seeds, data=st.data())
def test_a_whole_map_is_read_at_the_others_patches(
    mine: tuple[int, int], its: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    count = its[0] * its[1]
    keep = permutation(seed, 2, count, data.draw(st.integers(1, count)))
    ours = PatchMap(random(seed, 2, mine[0] * mine[1], 3), mine)
    places = PatchMap(random(seed + 1, 2, keep.shape[1], 5), its, keep)
    read = ours.at(places)
    whole = resample_patches(ours.vectors, mine, its)
    assert torch.equal(read, torch.stack([whole[i, keep[i]] for i in range(2)]))
    assert torch.equal(ours.at(PatchMap(random(seed, 2, count, 1), its)), whole)


@given(seed=seeds)
def test_on_one_grid_the_vectors_are_the_kept_ones_themselves(seed: int) -> None:
    keep, vectors = permutation(seed, 2, 12, 5), random(seed, 2, 12, 3)
    read = PatchMap(vectors, (3, 4)).at(PatchMap(vectors[:, :5], (3, 4), keep))
    assert torch.equal(read, vectors.gather(1, keep[:, :, None].expand(-1, -1, 3)))


def test_maps_of_the_very_same_patches_meet_as_they_are() -> None:
    keep = permutation(0, 2, 12, 5)
    ours, its = (PatchMap(random(seed, 2, 5, 3), (3, 4), keep) for seed in (1, 2))
    assert ours.at(its) is ours.vectors
    for other in (
        PatchMap(its.vectors, (3, 4), keep.flip(1)),
        PatchMap(its.vectors, (4, 3), keep),
        PatchMap(random(0, 2, 12, 3), (3, 4)),
    ):
        with pytest.raises(AssertionError):
            ours.at(other)
