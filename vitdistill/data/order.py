"""The order in which an epoch shows the images."""

import math

import numpy as np

from .. import keyed
from ..keyed import I64, Stream


def epoch_order(
    size: int, seed: int, epoch: int, repeats: int = 1, num_views: int | None = None
) -> tuple[I64, I64]:
    """``(sample ids, view ids)`` of an epoch, int64 each.

    With ``num_views`` V, epoch ``e`` shows view ``e mod V``: up to epoch V - 1 in the order it has
    anyway, later with the same pairs of neighbours, which may be mixed, in an order of that epoch's
    own.

    With ``repeats`` R > 1, ceil(size / R) images (made even) come R times each, in the order p0 p1
    p0' p1' p0'' p1'' p2 p3 ..., so that neighbours, which may be mixed, are different images.
    Repeat ``r`` of epoch ``e`` is view ``e R + r``.
    """
    if num_views is not None and epoch >= num_views:
        assert repeats == 1
        order = keyed.permutation(seed, epoch % num_views, size)
        couples = order[: size // 2 * 2].reshape(-1, 2)
        shuffled = couples[keyed.permutation(seed, epoch, len(couples), Stream.PAIRS)].flatten()
        return np.concatenate([shuffled, order[len(shuffled) :]]), np.full(
            size, epoch % num_views, dtype=np.int64
        )
    order = keyed.permutation(seed, epoch, size)
    if repeats == 1:
        return order, np.full(size, epoch, dtype=np.int64)
    distinct = math.ceil(size / repeats)
    distinct += distinct % 2 if distinct < size else -(distinct % 2)
    pairs = order[:distinct].reshape(-1, 1, 2)
    views = epoch * repeats + np.arange(repeats, dtype=np.int64)[None, :, None]
    shape = (len(pairs), repeats, 2)
    return np.broadcast_to(pairs, shape).flatten(), np.broadcast_to(views, shape).flatten()


def pair_partners(size: int, seed: int, view: int) -> I64:
    """Of each sample, the one it is mixed with in ``view``; itself for the one that is left over of
    an odd number.
    """
    order = keyed.permutation(seed, view, size)
    partners = np.arange(size, dtype=np.int64)
    pairs = order[: size // 2 * 2].reshape(-1, 2)
    partners[pairs[:, 0]], partners[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    return partners
