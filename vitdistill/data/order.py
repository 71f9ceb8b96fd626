"""Which samples come when: pure functions of the seed, the epoch and the sizes.

The order of an epoch is a keyed permutation; step ``k`` of epoch ``e`` takes its ``k``-th slice,
process ``r`` the ``r``-th part of that slice, micro-batch ``m`` the ``m``-th part of that. Nothing
is carried from one step to the next, so a run resumes at any step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .. import keyed
from ..keyed import I64, Stream


@dataclass(frozen=True)
class Samples:
    """What a micro-batch shows."""

    epoch: int
    ids: I64  # the samples' numbers in the source, (B,)
    views: I64  # which view of each sample, (B,)


@lru_cache(maxsize=2)
def epoch_order(
    size: int, seed: int, epoch: int, repeats: int = 1, num_views: int | None = None
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
        order = keyed.permutation(seed, view, size)
        couples = order[: size // 2 * 2].reshape(-1, 2)
        shuffled = couples[keyed.permutation(seed, epoch, len(couples), Stream.PAIRS)].flatten()
        ids = np.concatenate([shuffled, order[len(shuffled) :]])
        return ids, np.full(size, view, dtype=np.int64)
    order = keyed.permutation(seed, epoch, size)
    if repeats == 1:
        return order, np.full(size, epoch, dtype=np.int64)
    distinct = math.ceil(size / repeats)
    distinct += distinct % 2 if distinct < size else -(distinct % 2)
    pairs = order[:distinct].reshape(-1, 1, 2)
    views = epoch * repeats + np.arange(repeats, dtype=np.int64)[None, :, None]
    shape = (len(pairs), repeats, 2)
    return np.broadcast_to(pairs, shape).flatten(), np.broadcast_to(views, shape).flatten()


@lru_cache(maxsize=2)
def pair_partners(size: int, seed: int, view: int) -> I64:
    """Return, for each sample, the one it is mixed with in ``view``; treat it as read-only.

    The sample left over of an odd number is its own partner.
    """
    order = keyed.permutation(seed, view, size)
    partners = np.arange(size, dtype=np.int64)
    pairs = order[: size // 2 * 2].reshape(-1, 2)
    partners[pairs[:, 0]], partners[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    return partners


def evenly(labels: I64, count: int) -> I64:
    """Return the same ``count`` samples or fewer, in order, each class with its share."""
    size = len(labels)
    # Laid out class by class, shuffled within each, and taken at equal steps.
    shuffled = keyed.permutation(0, 0, size, Stream.SUBSET)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    count = min(size, count)
    return np.sort(by_class[np.arange(count, dtype=np.int64) * size // max(count, 1)])


def view_samples(
    size: int, seed: int, view: int, first: int, last: int, batch_size: int, *, mixed: bool
) -> Iterator[Samples]:
    """Yield the samples ``first`` to ``last - 1`` in one view, each followed by its partner if
    ``mixed``.
    """
    for start in range(first, last, batch_size):
        ids = np.arange(start, min(start + batch_size, last), dtype=np.int64)
        if mixed:
            ids = np.stack([ids, pair_partners(size, seed, view)[ids]], axis=1).flatten()
        yield Samples(view, ids, np.full(len(ids), view, dtype=np.int64))
