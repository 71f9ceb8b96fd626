"""The order of an epoch: a permutation, whose neighbours may be mixed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vitdistill.data.order import epoch_order, evenly, pair_partners, view_samples

SIZES, SEEDS = st.integers(2, 60), st.integers(-(2**70), 2**70)


@given(SIZES, st.integers(1, 4), st.integers(0, 3), SEEDS)
def test_epoch_order(size: int, repeats: int, epoch: int, seed: int) -> None:
    ids, views = epoch_order(size, seed, epoch, repeats)
    assert len(set(zip(ids.tolist(), views.tolist(), strict=True))) == len(ids)
    assert set((views // repeats).tolist()) == {epoch}
    distinct, counts = np.unique(ids, return_counts=True)
    assert (counts == repeats).all()
    assert abs(len(distinct) - -(-size // repeats)) <= 1
    first, second = ids[: len(ids) // 2 * 2].reshape(-1, 2).T
    assert (first != second).all()
    first, second = views[: len(ids) // 2 * 2].reshape(-1, 2).T
    assert (first == second).all()


@given(SIZES, st.integers(1, 4), st.integers(0, 9), SEEDS)
def test_views_come_back_in_the_same_pairs(size, num_views, later, seed):
    def pairs(epoch: int) -> list[list[int]]:
        ids, views = epoch_order(size, seed, epoch, num_views=num_views)
        assert sorted(ids.tolist()) == list(range(size))
        assert set(views.tolist()) == {epoch % num_views}
        return ids[: size // 2 * 2].reshape(-1, 2).tolist()

    assert sorted(pairs(num_views + later)) == sorted(pairs(later % num_views))


def test_views_come_back_in_an_order_of_each_epoch() -> None:
    orders = {
        tuple(epoch_order(40, 3, epoch, num_views=2)[0].tolist()) for epoch in range(0, 12, 2)
    }
    assert len(orders) == 6


def test_repeats_follow_the_documented_order() -> None:
    ids, views = epoch_order(12, 7, 2, 3)
    p = ids[[0, 1, 6, 7]]
    assert ids.tolist() == [*([p[0], p[1]] * 3), *([p[2], p[3]] * 3)]
    assert views.tolist() == [6, 6, 7, 7, 8, 8] * 2


@given(st.integers(1, 60), SEEDS, st.integers(0, 9))
def test_partners_are_the_neighbours_of_the_order(size: int, seed: int, view: int) -> None:
    partners = pair_partners(size, seed, view)
    assert (partners[partners] == np.arange(size)).all()
    assert (partners == np.arange(size)).sum() == size % 2
    first, second = epoch_order(size, seed, view)[0][: size // 2 * 2].reshape(-1, 2).T
    assert (partners[first] == second).all()


@given(first=st.integers(0, 20), count=st.integers(0, 20), batch_size=st.integers(1, 9))
def test_samples_of_a_view_come_in_order(first: int, count: int, batch_size: int) -> None:
    last, partners = first + count, pair_partners(41, 3, 2)
    plain = list(view_samples(41, 3, 2, first, last, batch_size, mixed=False))
    mixed = list(view_samples(41, 3, 2, first, last, batch_size, mixed=True))
    assert [i for it in plain for i in it.ids.tolist()] == list(range(first, last))
    for alone, pair in zip(plain, mixed, strict=True):
        assert len(alone.ids) <= batch_size and (pair.views == 2).all()
        assert (pair.ids[::2] == alone.ids).all() and (pair.ids[1::2] == partners[alone.ids]).all()


@given(
    num=st.integers(1, 6),
    size=st.integers(1, 200),
    count=st.integers(1, 60),
    order=st.sampled_from(["sorted", "in turn", "mixed"]),
)
def test_a_part_has_every_class_in_its_share(num: int, size: int, count: int, order: str) -> None:
    labels = np.arange(size, dtype=np.int64) % num
    if order == "sorted":
        labels.sort()
    elif order == "mixed":
        labels = labels[np.random.default_rng(size).permutation(size)]
    part = evenly(labels, count)
    assert len(part) == min(count, size) and part.tolist() == sorted(set(part.tolist()))
    assert part.tolist() == evenly(labels, count).tolist()
    for label in set(labels.tolist()):
        share = (labels == label).sum() * len(part) / size
        assert abs((labels[part] == label).sum() - share) < 1
