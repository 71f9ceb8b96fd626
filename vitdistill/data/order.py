"""Which samples come when: pure functions of the seed, the epoch and the sizes.

The order of an epoch is a keyed permutation; step ``k`` of epoch ``e`` takes its ``k``-th slice,
process ``r`` the ``r``-th part of that slice, micro-batch ``m`` the ``m``-th part of that. Nothing
is carried from one step to the next, so a run resumes at any step.

Images with and without labels are two kinds, each with permutations of its own and a fixed number
of places in a step. The places are spread so that any micro-batch has its share of both.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from .. import keyed
from ..keyed import I64, U64, Stream


@dataclass(frozen=True)
class Samples:
    """What a micro-batch shows: the address of everything that is random in it."""

    ids: I64  # the samples' numbers in the source, (B,)
    views: I64  # which view of each sample, (B,)
    seed: int = 0  # of the run's data
    epoch: int = 0

    def keys(self, stream: Stream) -> U64:
        """Return a key for the random numbers of each sample, (B,)."""
        return keyed.keys(self.seed, self.views, self.ids, stream)


@dataclass(frozen=True)
class Kind:
    """``size`` images from number ``first`` on, of which a step shows ``count``."""

    first: int
    size: int
    count: int
    stream: Stream = Stream.ORDER


def divide(labels: I64, batch_size: int, labelled_share: float) -> tuple[Kind, ...]:
    """Divide images by whether they have labels, those with labels first; one kind is left whole.

    ``labels`` are -1 where there are none.
    """
    size, labelled = len(labels), int((labels >= 0).sum())
    if labelled in (0, size):
        return (Kind(0, size, batch_size),)
    assert (labels[:labelled] >= 0).all()
    count = round(batch_size * labelled_share)
    others = Kind(labelled, size - labelled, batch_size - count, Stream.UNLABELLED)
    return Kind(0, labelled, count), others


@dataclass(frozen=True)
class Order:
    """The order of a run's training images; ``paired``: neighbours are mixed.

    An epoch is the longest pass over a kind, without an incomplete last step. The other kind fills
    it with several passes, each in another order and view, the last one cut short.
    """

    kinds: tuple[Kind, ...]
    seed: int
    repeats: int = 1
    num_views: int | None = None
    paired: bool = False

    @cached_property
    def steps(self) -> int:
        return max(len(self.one_pass(kind, 0)[0]) // kind.count for kind in self.kinds)

    def describe(self) -> str:
        """Say how many of each kind a step shows, and how often an epoch; "" for one kind."""
        if len(self.kinds) == 1:
            return ""
        parts = [
            f"{kind.count} of {kind.size:,} images {what} labels"
            f" ({self.steps * kind.count / kind.size:.3g} passes an epoch)"
            for kind, what in zip(self.kinds, ("with", "without"), strict=True)
        ]
        return f"each step: {' and '.join(parts)}"

    def one_pass(self, kind: Kind, number: int) -> tuple[I64, I64]:
        """Return the (sample ids, view ids) of a pass over a kind; ``paired``: whole pairs only."""
        ids, views = epoch_order(
            kind.size, self.seed, number, self.repeats, self.num_views, kind.stream
        )
        end = len(ids) // 2 * 2 if self.paired else len(ids)
        return kind.first + ids[:end], views[:end]

    def places(self) -> I64:
        """Return the number of the kind at each place of a step, int64 (batch size,)."""
        unit = 2 if self.paired else 1
        first, *others = (kind.count // unit for kind in self.kinds)
        total = first + sum(others)
        # The first kind gets a place wherever its share of the places so far grows by one.
        share = np.arange(total + 1, dtype=np.int64) * first // total
        return np.repeat(1 - np.diff(share), unit)

    def partners(self, view: int) -> I64:
        """Return, for each sample, the one of its kind that it is mixed with in ``view``."""
        found = ((k.first, pair_partners(k.size, self.seed, view, k.stream)) for k in self.kinds)
        return np.concatenate([first + partners for first, partners in found])


@lru_cache(maxsize=2)
def epoch_samples(order: Order, epoch: int) -> tuple[I64, I64]:
    """Return the (sample ids, view ids) of an epoch's steps, int64 (steps x batch size,) each."""
    places = order.places()
    ids, views = np.zeros((2, order.steps, len(places)), dtype=np.int64)
    for number, kind in enumerate(order.kinds):
        wanted = order.steps * kind.count
        passes = -(-wanted // len(order.one_pass(kind, 0)[0]))
        made = [order.one_pass(kind, epoch * passes + i) for i in range(passes)]
        for whole, parts in zip((ids, views), zip(*made, strict=True), strict=True):
            whole[:, places == number] = np.concatenate(parts)[:wanted].reshape(order.steps, -1)
    return ids.flatten(), views.flatten()


@lru_cache(maxsize=2)
def epoch_order(
    size: int,
    seed: int,
    epoch: int,
    repeats: int = 1,
    num_views: int | None = None,
    stream: Stream = Stream.ORDER,
) -> tuple[I64, I64]:
    """Return the (sample ids, view ids) of an epoch, int64 (N,) each; treat them as read-only.

    With ``num_views`` V, epoch ``e`` shows view ``e mod V``: up to epoch V - 1 in that epoch's
    usual order, later with the same pairs of neighbours, which may be mixed, in a new order.

    With ``repeats`` R > 1, ceil(size / R) images (made even) come R times each, in the order p0 p1
    p0' p1' p0'' p1'' p2 p3 ..., so that neighbours, which may be mixed, are different images.
    Repeat ``r`` of epoch ``e`` is view ``e R + r``.
    """
    if num_views is not None and epoch >= num_views:
        assert repeats == 1
        view = epoch % num_views
        order = keyed.permutation(seed, view, size, stream)
        couples = order[: size // 2 * 2].reshape(-1, 2)
        shuffled = couples[keyed.permutation(seed, epoch, len(couples), Stream.PAIRS)].flatten()
        ids = np.concatenate([shuffled, order[len(shuffled) :]])
        return ids, np.full(size, view, dtype=np.int64)
    order = keyed.permutation(seed, epoch, size, stream)
    if repeats == 1:
        return order, np.full(size, epoch, dtype=np.int64)
    distinct = math.ceil(size / repeats)
    distinct += distinct % 2 if distinct < size else -(distinct % 2)
    pairs = order[:distinct].reshape(-1, 1, 2)
    views = epoch * repeats + np.arange(repeats, dtype=np.int64)[None, :, None]
    shape = (len(pairs), repeats, 2)
    return np.broadcast_to(pairs, shape).flatten(), np.broadcast_to(views, shape).flatten()


@lru_cache(maxsize=2)
def pair_partners(size: int, seed: int, view: int, stream: Stream = Stream.ORDER) -> I64:
    """Return, for each sample, the one it is mixed with in ``view``; treat it as read-only.

    With an odd ``size``, the sample left over is its own partner.
    """
    order = keyed.permutation(seed, view, size, stream)
    partners = np.arange(size, dtype=np.int64)
    pairs = order[: size // 2 * 2].reshape(-1, 2)
    partners[pairs[:, 0]], partners[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    return partners


def evenly(labels: I64, count: int) -> I64:
    """Choose at most ``count`` samples, always the same, in order, with each class's share."""
    size = len(labels)
    # Laid out class by class, shuffled within each, and taken at equal steps.
    shuffled = keyed.permutation(0, 0, size, Stream.SUBSET)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    count = min(size, count)
    return np.sort(by_class[np.arange(count, dtype=np.int64) * size // max(count, 1)])


def view_samples(
    order: Order, view: int, first: int, last: int, batch_size: int
) -> Iterator[Samples]:
    """Yield the samples ``first`` to ``last - 1`` in one view, each followed by its partner if the
    order is ``paired``.
    """
    partners = order.partners(view) if order.paired else None
    for start in range(first, last, batch_size):
        ids = np.arange(start, min(start + batch_size, last), dtype=np.int64)
        if partners is not None:
            ids = np.stack([ids, partners[ids]], axis=1).flatten()
        yield Samples(ids, np.full(len(ids), view, dtype=np.int64), order.seed, view)
