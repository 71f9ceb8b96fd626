"""The order of an epoch: a permutation, whose neighbours may be mixed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vitdistill.data.order import (
    Kind,
    Order,
    divide,
    epoch_order,
    epoch_samples,
    evenly,
    pair_partners,
    view_samples,
)

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
    kinds = (Kind(0, 41, 8),)
    plain = list(view_samples(Order(kinds, 3), 2, first, last, batch_size))
    mixed = list(view_samples(Order(kinds, 3, paired=True), 2, first, last, batch_size))
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


# -- images with and without labels ---------------------------------------------------------------


@st.composite
def divided(draw: st.DrawFn) -> tuple[Order, int]:
    """An order of two kinds, and the number of images a micro-batch may have."""
    paired = draw(st.booleans())
    unit, parts = 2 if paired else 1, draw(st.integers(1, 4))
    per_part = [unit * draw(st.integers(1, 4)) for _ in range(2)]
    counts = [parts * count for count in per_part]
    labelled = draw(st.integers(2, 60))
    others = draw(st.integers(max(counts[1], 2), 90))
    labels = np.r_[np.zeros(labelled, np.int64), np.full(others, -1)]
    kinds = divide(labels, sum(counts), counts[0] / sum(counts))
    assert [kind.count for kind in kinds] == counts
    views = draw(st.none() | st.integers(1, 5))
    repeats = draw(st.integers(1, 3)) if views is None else 1
    return Order(kinds, draw(SEEDS), repeats, views, paired), sum(per_part)


@given(divided(), st.integers(0, 4))
def test_every_micro_batch_has_its_share_of_both_kinds(made: tuple[Order, int], epoch: int) -> None:
    order, micro_batch = made
    labelled = order.kinds[0]
    batch_size = sum(kind.count for kind in order.kinds)
    ids, views = epoch_samples(order, epoch)
    assert len(ids) == len(views) == order.steps * batch_size
    share = labelled.count * micro_batch // batch_size
    is_labelled = ids < labelled.size
    assert (is_labelled.reshape(-1, micro_batch).sum(1) == share).all()
    if order.paired:  # partners are of one kind and view, and the two that labels were stored for
        pairs, seen = ids.reshape(-1, 2), views.reshape(-1, 2)
        assert (seen[:, 0] == seen[:, 1]).all() and (pairs[:, 0] != pairs[:, 1]).all()
        if order.repeats == 1:
            for (a, b), view in zip(pairs, seen[:, 0], strict=True):
                assert order.partners(int(view))[[a, b]].tolist() == [b, a]


@given(divided(), st.integers(0, 4))
def test_an_epoch_shows_every_image_as_often_as_another_of_its_kind(made, epoch) -> None:
    order, _ = made
    ids, views = epoch_samples(order, epoch)
    for kind in order.kinds:
        counts = np.bincount(ids, minlength=200)[kind.first : kind.first + kind.size]
        assert counts.sum() == order.steps * kind.count
        if order.repeats == 1 and not (order.paired and kind.size % 2):  # then one is left over
            assert counts.max() - counts.min() <= 1
    seen = list(zip(ids.tolist(), views.tolist(), strict=True))
    if order.num_views is None:  # a new view each time, in this epoch and in the next
        later = zip(*(part.tolist() for part in epoch_samples(order, epoch + 1)), strict=True)
        assert len(set(seen)) == len(seen) and not set(seen) & set(later)
    else:
        assert views.max() < order.num_views


@given(SIZES, st.integers(1, 9), st.integers(0, 5), SEEDS, st.booleans(), st.booleans())
def test_one_kind_is_in_the_order_of_before(size, count, epoch, seed, paired, unlabelled) -> None:
    count = 2 * count if paired else count
    if size < count:
        return
    (kind,) = kinds = divide(np.full(size, -int(unlabelled)), count, 0.25)
    assert (kind.size, kind.count) == (size, count)
    found = epoch_samples(Order(kinds, seed, paired=paired), epoch)
    for part, whole in zip(found, epoch_order(size, seed, epoch), strict=True):
        assert part.tolist() == whole[: size // count * count].tolist()


def test_the_kinds_have_orders_of_their_own() -> None:
    order = Order(divide(np.repeat([0, -1], 40), 8, 0.5), 3)
    first, second = (order.one_pass(kind, 0)[0] - kind.first for kind in order.kinds)
    assert sorted(first) == sorted(second) and first.tolist() != second.tolist()
