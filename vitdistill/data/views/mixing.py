"""Mixup and CutMix of neighbours: positions 2j and 2j + 1 of an epoch's order are partners.

How a pair is mixed is a pure function of (seed, view, the smaller sample id), whatever the batch,
the process or the step. DeiT draws one weight for a whole batch; here every pair has its own.

Source: Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019; boxes and the corrected
weight as in timm's ``Mixup``.
"""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ... import keyed
from ...keyed import F64, I64, U64, Stream
from ..augment import Augment
from ..order import Samples
from .geometry import inside_boxes, send

_GAMMA_ATTEMPTS = 32
_GAMMA_DRAWS = 1 + 3 * _GAMMA_ATTEMPTS


def mix(
    images: Float[Tensor, "B 3 H W"], labels: Int[Tensor, " B"], augment: Augment, shown: Samples
) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Mix neighbours; B is even.

    Returns the mixed images, each one's partner's label, and the weight of its own.
    """
    (height, width), device = images.shape[2:], images.device
    lam, cut, boxes = draw_mixing(augment, shown, height, width)
    partner = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    mixed = images
    weight = send(np.repeat(lam, 2).astype(np.float32), device)
    blended, pasted = np.flatnonzero(np.repeat(~cut, 2)), np.flatnonzero(np.repeat(cut, 2))
    if len(blended):
        rows = send(blended, device)
        share = weight[rows, None, None, None]
        mixed = mixed.index_copy(0, rows, mixed[rows] * share + partner[rows] * (1.0 - share))
    if len(pasted):
        rows = send(pasted, device)
        inside = inside_boxes(send(boxes[pasted // 2], device), height, width)
        cut_in = torch.where(inside, partner[rows], images[rows])
        mixed = mixed.index_copy(0, rows, cut_in)
    return mixed, labels.unflatten(0, (-1, 2)).flip(1).flatten(), weight


def draw_mixing(
    augment: Augment, shown: Samples, height: int, width: int
) -> tuple[F64, npt.NDArray[np.bool_], I64]:
    """Draw how each pair of neighbours is mixed: ``(lam, cut, boxes)``, one row a pair.

    ``lam`` is the weight of an image against its partner (1: not mixed), ``cut`` says whether the
    box ``(top, bottom, left, right)`` is pasted. The weight of a cut pair is corrected to the area
    that was really pasted.
    """
    smaller = shown.ids.reshape(-1, 2).min(axis=1)
    keys = keyed.keys(shown.seed, shown.views[::2], smaller, Stream.MIX)
    draws = keyed.uniforms(keys, 4)
    switched = draws[:, 1] < augment.mixup_switch_prob
    both = augment.mixup and augment.cutmix
    cut = switched if both else np.full(len(keys), augment.cutmix > 0.0)
    alpha = np.where(cut, augment.cutmix, augment.mixup)
    drawn = symmetric_beta(keys, alpha, start=4)
    lam = np.where(draws[:, 0] < augment.mixup_prob, drawn, 1.0)
    side = np.sqrt(1.0 - lam)
    boxes = np.stack([*_span(draws[:, 2], side, height), *_span(draws[:, 3], side, width)], axis=1)
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    return np.where(cut, 1.0 - area / float(height * width), lam), cut, boxes


def _span(draw: F64, side: F64, length: int) -> tuple[I64, I64]:
    cut = np.trunc(length * side).astype(np.int64)
    centre = np.floor(draw * length).astype(np.int64)
    return np.clip(centre - cut // 2, 0, length), np.clip(centre + (cut + 1) // 2, 0, length)


def symmetric_beta(keys: U64, alpha: F64, start: int = 0) -> F64:
    """Draw a Beta(alpha, alpha) number a key: X / (X + Y) of two gamma numbers, by logarithms."""
    x = _log_gamma_variate(keys, alpha, start)
    y = _log_gamma_variate(keys, alpha, start + _GAMMA_DRAWS)
    return 1.0 / (1.0 + np.exp(np.clip(y - x, -700.0, 700.0)))


def _log_gamma_variate(keys: U64, alpha: F64, start: int) -> F64:
    """Draw logarithms of Gamma(alpha) numbers.

    Source: Marsaglia and Tsang, "A simple method for generating gamma variables", 2000. Alpha is
    raised by one and the result multiplied by U^(1/alpha), which also serves alpha < 1. An attempt
    fails with a probability below 0.05.
    """
    d = alpha + 1.0 - 1.0 / 3.0
    c = 1.0 / np.sqrt(9.0 * d)
    x = keyed.normals(keys, _GAMMA_ATTEMPTS, start)
    u = 1.0 - keyed.uniforms(keys, _GAMMA_ATTEMPTS, start + 2 * _GAMMA_ATTEMPTS)
    v = (1.0 + c[:, None] * x) ** 3
    positive = np.where(v > 0.0, v, 1.0)
    accepted = (v > 0.0) & (np.log(u) < 0.5 * x * x + d[:, None] * (1.0 - v + np.log(positive)))
    first = accepted.argmax(axis=1)
    chosen = positive[np.arange(len(keys)), first]
    boost = np.log1p(-keyed.uniforms(keys, 1, start + 3 * _GAMMA_ATTEMPTS)[:, 0])
    return np.log(d * chosen) + boost / np.where(alpha > 0.0, alpha, 1.0)
