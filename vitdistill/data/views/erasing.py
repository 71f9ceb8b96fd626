"""Random erasing on a normalised batch: a rectangle of normal noise in some of the images.

Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, in the form of timm's
``RandomErasing(mode="pixel", max_count=1)``.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ... import keyed
from ...keyed import I64, Stream
from ..order import Samples
from .geometry import inside_boxes, send

_ATTEMPTS = 10
_AREA = (0.02, 1 / 3)
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))


def erase(
    images: Float[Tensor, "B 3 H W"], prob: float, shown: Samples
) -> Float[Tensor, "B 3 H W"]:
    """Fill a keyed rectangle of each chosen image with keyed noise, in place."""
    if prob == 0.0:
        return images
    (height, width), device = images.shape[2:], images.device
    rows, top, left, h, w = _draw(prob, shown, height, width)
    if not len(rows):
        return images
    boxes = send(np.stack([top, top + h, left, left + w], axis=1), device)
    index = send(rows, device)
    # Draw noise for whole images and keep the box: shapes do not depend on the boxes drawn, so
    # nothing here waits for the device.
    keys = keyed.to_torch(shown.keys(Stream.ERASE_NOISE)[rows], device)
    address = torch.arange(images[0].numel(), device=device).view(images.shape[1:])
    address = address.expand(len(rows), -1, -1, -1)
    noise = keyed.torch_normals(keys[:, None, None, None].expand_as(address), address)
    inside = inside_boxes(boxes, height, width)
    images[index] = torch.where(inside, noise, images[index])
    return images


def erased_boxes(prob: float, shown: Samples, height: int, width: int) -> I64:
    """Return each image's erased ``(top, left, height, width)``, zeros where nothing is erased."""
    boxes = np.zeros((len(shown.ids), 4), dtype=np.int64)
    rows, *box = _draw(prob, shown, height, width)
    boxes[rows] = np.stack(box, axis=1)
    return boxes


def _draw(prob: float, shown: Samples, height: int, width: int) -> tuple[I64, I64, I64, I64, I64]:
    """Draw which images are erased, and where: ``(rows, top, left, height, width)``.

    A rectangle that does not fit is drawn again, ten times at most, as in timm.
    """
    draws = keyed.uniforms(shown.keys(Stream.ERASE), 3 + 2 * _ATTEMPTS)
    tries = draws[:, 3:].reshape(-1, _ATTEMPTS, 2)
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * tries[..., 0]) * (height * width)
    aspect = np.exp(_LOG_ASPECT[0] + (_LOG_ASPECT[1] - _LOG_ASPECT[0]) * tries[..., 1])
    heights = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    widths = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (heights < height) & (widths < width) & (heights > 0) & (widths > 0)
    first = fits.argmax(axis=1)
    rows = np.flatnonzero((draws[:, 0] <= prob) & fits.any(axis=1))
    h, w = heights[rows, first[rows]], widths[rows, first[rows]]
    top = np.floor(draws[rows, 1] * (height - h + 1)).astype(np.int64)
    left = np.floor(draws[rows, 2] * (width - w + 1)).astype(np.int64)
    return rows, top, left, h, w
