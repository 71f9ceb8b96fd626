"""Crops, flips, resizing and affine maps of a batch, each image with its own parameters.

The arithmetic is Pillow's, down to its fixed-point coefficients and its rounding to 8 bits after
each pass: a batch on any device gets the very pixels that Pillow would give one by one (the tests
compare them). Resizing goes along the rows first; Pillow 13 goes along the columns first where that
is cheaper, which moves some pixels by one level. The coefficients are integers below 2**23 and the
sums stay below 2**53, so float64 products are exact in any order of summation: a sample does not
depend on who shares its batch.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ...keyed import F64, I64

CROP_ATTEMPTS = 10
CROP_UNIFORMS = 2 * CROP_ATTEMPTS + 2  # that `random_boxes` takes for a sample

_FIXED_POINT = float(1 << 22)
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Return the host's numbers on ``device``, without waiting for it."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def send_images(images: Tensor, device: torch.device) -> Tensor:
    """Return the host's images on ``device``; a GPU copies pinned memory without a wait."""
    if device.type == "cuda":
        images = images.pin_memory()
    return images.to(device, non_blocking=True)


def random_boxes(
    uniforms: F64, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[I64, I64, I64, I64]:
    """Draw RandomResizedCrop's boxes ``(top, left, height, width)``, int64 (B,) each.

    ``uniforms`` is (B, `CROP_UNIFORMS`). Ten tries of a random area and a log-uniform aspect ratio,
    then the largest central crop.
    """
    draws = uniforms[:, :-2].reshape(-1, CROP_ATTEMPTS, 2)
    area = (scale[0] + (scale[1] - scale[0]) * draws[..., 0]) * (height * width)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * draws[..., 1])
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (widths <= width) & (heights <= height) & (widths > 0) & (heights > 0)
    row, first = np.arange(len(draws)), fits.argmax(axis=1)
    found = fits[row, first]
    whole_h, whole_w = _largest_box(height, width, ratio)
    h = np.where(found, heights[row, first], whole_h)
    w = np.where(found, widths[row, first], whole_w)
    places = np.floor(uniforms[:, -2:].T * (height - h + 1, width - w + 1)).astype(np.int64)
    top, left = np.where(found, places, ((height - h) // 2, (width - w) // 2))
    return top, left, h, w


def _largest_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    if width / height < ratio[0]:
        return round(width / ratio[0]), width
    if width / height > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def inside_boxes(boxes: Int[Tensor, "B 4"], height: int, width: int) -> Bool[Tensor, "B 1 H W"]:
    """Return which pixels lie in each image's box ``(top, bottom, left, right)``."""
    y = torch.arange(height, device=boxes.device)[:, None]
    x = torch.arange(width, device=boxes.device)
    top, bottom, left, right = boxes[:, :, None, None, None].unbind(1)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def crop_and_flip(
    images: UInt8[Tensor, "B C H W"],
    top: Int[Tensor, " B"],
    left: Int[Tensor, " B"],
    flip: Int[Tensor, " B"],
    padding: int,
) -> UInt8[Tensor, "B C H W"]:
    """Pad with black pixels, cut out H x W at ``(top, left)``, mirror it where ``flip`` is 1."""
    _, channels, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding)) if padding else images
    x = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None] == 1, width - 1 - x, x)
    rows = top[:, None] + torch.arange(height, device=images.device)
    index = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).flatten(1)
    pixels = padded.flatten(2).gather(2, index[:, None].expand(-1, channels, -1))
    return pixels.view(images.shape)


def resize_boxes(
    images: UInt8[Tensor, "B C H W"],
    boxes: Int[Tensor, "B 4"],
    size: tuple[int, int],
    interpolation: str,
) -> UInt8[Tensor, "B C h w"]:
    """Resize each image's box ``(top, left, height, width)`` to ``size`` as Pillow's ``resize``."""
    top, left, height, width = boxes.unbind(1)
    columns = _coefficients(left, width, images.shape[3], size[1], interpolation)
    rows = _coefficients(top, height, images.shape[2], size[0], interpolation)
    wide = torch.bmm(images.flatten(1, 2).double(), columns.transpose(1, 2))
    wide = _from_fixed_point(wide).view(*images.shape[:3], size[1])
    return _from_fixed_point(torch.matmul(rows[:, None], wide)).to(torch.uint8)


def _from_fixed_point(sums: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return sums.add_(_FIXED_POINT / 2).mul_(1 / _FIXED_POINT).floor_().clamp_(0, 255)


def _coefficients(
    start: Int[Tensor, " B"],
    length: Int[Tensor, " B"],
    in_size: int,
    out_size: int,
    interpolation: str,
) -> Float[Tensor, "B out in"]:
    """Return the weight of each input pixel of an axis in each output pixel, times 2**22.

    The weights are whole numbers, 0 outside the box.
    """
    device = start.device
    length = length.double()[:, None, None]
    # Divide by a tensor: GPUs turn division by a number into a product, which rounds differently.
    scale = length / torch.full_like(length, out_size)
    stretch = scale.clamp(min=1.0)
    support = _SUPPORT[interpolation] * stretch
    centre = (torch.arange(out_size, device=device, dtype=torch.float64)[:, None] + 0.5) * scale
    first = (centre - support + 0.5).floor().clamp(min=0.0)
    last = torch.minimum((centre + support + 0.5).floor(), length)
    pixel = torch.arange(in_size, device=device, dtype=torch.float64)
    position = pixel - start.double()[:, None, None]
    weights = _kernel((position - centre + 0.5) * (1.0 / stretch), interpolation)
    weights = weights * ((position >= first) & (position < last))
    weights = weights / weights.sum(2, keepdim=True)
    return (weights.abs() * _FIXED_POINT + 0.5).floor() * weights.sign()


def _kernel(x: Float[Tensor, "..."], interpolation: str) -> Float[Tensor, "..."]:
    """Evaluate Pillow's resampling kernel; the cubic one has a = -0.5."""
    x = x.abs()
    if interpolation == "bilinear":
        return (1.0 - x).clamp(min=0.0)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, torch.zeros_like(x)))


def affine(
    images: UInt8[Tensor, "B C H W"],
    matrix: Float[Tensor, "B 6"],
    fill: UInt8[Tensor, " C"],
    interpolation: str,
) -> UInt8[Tensor, "B C H W"]:
    """Do Pillow's ``Image.transform(AFFINE)``.

    Output (x, y) shows input (a x + b y + c, d x + e y + f), with pixel centres at 0.5; ``matrix``
    is float64, and pixels from outside become ``fill``. The cubic kernel has a = -1 here, unlike in
    resizing.
    """
    _, channels, height, width = images.shape
    x = torch.arange(width, device=images.device, dtype=torch.float64)[None, None, :] + 0.5
    y = torch.arange(height, device=images.device, dtype=torch.float64)[None, :, None] + 0.5
    a, b, c, d, e, f = (m[:, None, None] for m in matrix.unbind(1))
    from_x = (a * x + b * y + c).flatten(1)
    from_y = (d * x + e * y + f).flatten(1)
    outside = (from_x < 0) | (from_x >= width) | (from_y < 0) | (from_y >= height)
    from_x, from_y = from_x - 0.5, from_y - 0.5
    left, top = from_x.floor(), from_y.floor()
    dx, dy = (from_x - left)[:, None], (from_y - top)[:, None]
    taps = (0, 1) if interpolation == "bilinear" else (-1, 0, 1, 2)
    columns = [(left.long() + t).clamp(0, width - 1) for t in taps]
    rows = [(top.long() + t).clamp(0, height - 1) * width for t in taps]
    pixels = images.flatten(2)

    def pixel(row: Tensor, column: Tensor) -> Tensor:
        return pixels.gather(2, (row + column)[:, None].expand(-1, channels, -1)).double()

    blend = _linear if interpolation == "bilinear" else _cubic
    value = blend([blend([pixel(r, c) for c in columns], dx) for r in rows], dy)
    value = value.clamp_(0, 255).to(torch.uint8)
    return torch.where(outside[:, None], fill[:, None], value).view(images.shape)


def _linear(v: list[Tensor], d: Tensor) -> Tensor:
    return v[0] + (v[1] - v[0]) * d


def _cubic(v: list[Tensor], d: Tensor) -> Tensor:
    p2 = v[2] - v[0]
    p3 = 2 * (v[0] - v[1]) + v[2] - v[3]
    p4 = -v[0] + v[1] - v[2] + v[3]
    return v[1] + d * (p2 + d * (p3 + d * p4))
