"""RandAugment on a batch of uint8 images, each with its own operation.

A layer gives every image one operation, equal to Pillow's function pixel for pixel: eight kinds are
look-up tables, one an image; the affine kinds share one resampling; colour and sharpness are
blends. A policy is read from timm's own transform, so its configuration strings mean the same here.

Source: Cubuk et al., "RandAugment", 2020, in timm's form with increasing strengths.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from timm.data import auto_augment
from torch import Tensor

from ... import keyed
from ...keyed import F64, I64, U64
from .geometry import affine, send


class Kind(IntEnum):
    """What is done to an image; the comment says what the operation's value means."""

    NOTHING = 0
    AUTOCONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4  # bits kept
    SOLARIZE = 5  # threshold
    SOLARIZE_ADD = 6  # addend, below 128
    BRIGHTNESS = 7  # factor
    CONTRAST = 8  # factor
    COLOR = 9  # factor
    SHARPNESS = 10  # factor
    ROTATE = 11  # degrees, counter-clockwise
    SHEAR_X = 12  # pixels a row
    SHEAR_Y = 13  # pixels a column
    TRANSLATE_X = 14  # fraction of the width
    TRANSLATE_Y = 15  # fraction of the height


_LAST_TABLE = Kind.CONTRAST
_FIRST_AFFINE = Kind.ROTATE
_LEVELS = 10.0
_LAYER_DRAWS = 6


@dataclass(frozen=True)
class Operation:
    """One layer: ``kind`` int64 (B,) of `Kind`, ``value`` float64 (B,), both on the host."""

    kind: I64
    value: F64


Level = Callable[[F64, F64], F64]
"""Turns timm's level over 10 and a sign of +1 or -1 into an operation's value."""


def _constant(level: F64, sign: F64) -> F64:
    return np.zeros_like(level)


def _signed(largest: float) -> Level:
    return lambda level, sign: level * largest * sign


def _enhance(level: F64, sign: F64) -> F64:
    return np.maximum(0.1, 1.0 + sign * (level * 0.9))


OPERATIONS: dict[str, tuple[Kind, Level]] = {
    "AutoContrast": (Kind.AUTOCONTRAST, _constant),
    "Equalize": (Kind.EQUALIZE, _constant),
    "Invert": (Kind.INVERT, _constant),
    "Rotate": (Kind.ROTATE, _signed(30.0)),
    "PosterizeIncreasing": (Kind.POSTERIZE, lambda level, _: 4 - np.trunc(level * 4)),
    "SolarizeIncreasing": (Kind.SOLARIZE, lambda level, _: (256 - np.trunc(level * 256)).clip(0)),
    "SolarizeAdd": (Kind.SOLARIZE_ADD, lambda level, _: np.trunc(level * 110).clip(0, 128)),
    "ColorIncreasing": (Kind.COLOR, _enhance),
    "ContrastIncreasing": (Kind.CONTRAST, _enhance),
    "BrightnessIncreasing": (Kind.BRIGHTNESS, _enhance),
    "SharpnessIncreasing": (Kind.SHARPNESS, _enhance),
    "ShearX": (Kind.SHEAR_X, _signed(0.3)),
    "ShearY": (Kind.SHEAR_Y, _signed(0.3)),
    "TranslateXRel": (Kind.TRANSLATE_X, _signed(0.45)),
    "TranslateYRel": (Kind.TRANSLATE_Y, _signed(0.45)),
}
"""timm's operations that run on batches, by timm's names."""


@dataclass(frozen=True)
class Policy:
    """A RandAugment: ``layers`` of `OPERATIONS`, each with ``prob`` and noisy strength."""

    layers: int
    prob: float
    magnitude: float
    magnitude_std: float
    magnitude_max: float

    @staticmethod
    @lru_cache(maxsize=16)
    def of(config: str) -> "Policy | None":
        """Read timm's ``config`` string; None where it has operations for single images only."""
        if not config.startswith("rand"):
            return None
        theirs: Any = auto_augment.rand_augment_transform(config, {})
        op = theirs.ops[0]
        known = [op.name for op in theirs.ops] == [*OPERATIONS] and theirs.choice_weights is None
        if not known or math.isinf(op.magnitude_std):
            return None
        strength = op.prob, op.magnitude, op.magnitude_std, op.magnitude_max or _LEVELS
        return Policy(int(theirs.num_layers), *map(float, strength))

    def draw(self, keys: U64) -> list[Operation]:
        """Draw the operations of the samples with these keys, one `Operation` a layer."""
        starts = range(0, _LAYER_DRAWS * self.layers, _LAYER_DRAWS)
        return [self._layer(keys, start) for start in starts]

    def _layer(self, keys: U64, start: int) -> Operation:
        draws = keyed.uniforms(keys, 4, start)
        choice = np.floor(draws[:, 0] * len(OPERATIONS)).astype(np.int64)
        noise = keyed.normals(keys, 1, start + 4)[:, 0]
        magnitude = self.magnitude + self.magnitude_std * noise
        level = np.clip(magnitude, 0.0, self.magnitude_max) / _LEVELS
        sign = np.where(draws[:, 2] > 0.5, -1.0, 1.0)
        kinds, levels = zip(*OPERATIONS.values(), strict=True)
        kind = np.array(kinds, dtype=np.int64)[choice]
        value = np.stack([f(level, sign) for f in levels])[choice, np.arange(len(choice))]
        applied = draws[:, 1] <= self.prob
        return Operation(np.where(applied, kind, Kind.NOTHING), np.where(applied, value, 0.0))


def apply_operation(
    images: UInt8[Tensor, "B 3 H W"],
    operation: Operation,
    fill: UInt8[Tensor, "3"],
    interpolation: str,
) -> UInt8[Tensor, "B 3 H W"]:
    """Apply one layer; affine operations show the colour ``fill`` outside the image."""
    kind, device, (height, width) = operation.kind, images.device, images.shape[2:]

    def transform(chosen: Tensor, kind: I64, value: F64) -> Tensor:
        matrices = _matrices(kind, value, height, width).to(device, non_blocking=True)
        return affine(chosen, matrices, fill.to(device, non_blocking=True), interpolation)

    groups: tuple[tuple[np.ndarray, Callable[[Tensor, I64, F64], Tensor]], ...] = (
        ((kind > Kind.NOTHING) & (kind <= _LAST_TABLE), _through_tables),
        (kind == Kind.COLOR, lambda x, k, v: _blend(_grey(x)[:, None], x, send(v, device))),
        (kind == Kind.SHARPNESS, lambda x, k, v: _blend(_smooth(x), x, send(v, device))),
        (kind >= _FIRST_AFFINE, transform),
    )
    images = images.clone()
    for members, function in groups:
        rows = np.flatnonzero(members)
        if len(rows):
            index = send(rows, device)
            images[index] = function(images[index], kind[rows], operation.value[rows])
    return images


def _matrices(kind: I64, value: F64, height: int, width: int) -> Float[Tensor, "B 6"]:
    """Make output-to-input matrices as Pillow does, its rounding of sine and cosine included."""
    matrix = np.tile(np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]), (len(kind), 1))
    for one, column, factor in (
        (Kind.SHEAR_X, 1, 1),
        (Kind.SHEAR_Y, 3, 1),
        (Kind.TRANSLATE_X, 2, width),
        (Kind.TRANSLATE_Y, 5, height),
    ):
        rows = kind == one
        matrix[rows, column] = value[rows] * factor
    rows = kind == Kind.ROTATE
    angle = -np.radians(value[rows] % 360.0)
    cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
    x, y = width / 2.0, height / 2.0
    matrix[rows] = np.stack(
        [cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y], axis=1
    )
    return torch.from_numpy(matrix)


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Do Pillow's ``Image.blend``: base + factor (image - base) in float32, clipped and cut off.

    ``factor`` is one number an image.
    """
    base = base.float()
    factor = factor.float().view(-1, *[1] * (images.ndim - 1))
    mixed = base + factor * (images.float() - base)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _grey(images: UInt8[Tensor, "B 3 H W"]) -> Int[Tensor, "B H W"]:
    red, green, blue = images.int().unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _smooth(images: UInt8[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"]:
    """Apply Pillow's SMOOTH filter, (1 1 1; 1 5 1; 1 1 1) / 13, which leaves the border alone."""
    x = images.int()
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = ((2 * sums + 13) // 26).to(torch.uint8)
    return smooth


def _through_tables(
    images: UInt8[Tensor, "B 3 H W"], kind: I64, value: F64
) -> UInt8[Tensor, "B 3 H W"]:
    """Replace every level of each image by its kind's table, (B, 3, 256)."""
    ramp = torch.arange(256, device=images.device)[None, None]
    tables = torch.empty((len(kind), 3, 256), dtype=torch.uint8, device=images.device)
    for one, make in _TABLES.items():
        rows = np.flatnonzero(kind == one)
        if len(rows):
            index = send(rows, images.device)
            made = make(images[index], ramp, send(value[rows], images.device)[:, None, None])
            tables[index] = made.to(torch.uint8)
    return tables.gather(2, images.flatten(2).long()).view(images.shape)


def _histograms(images: UInt8[Tensor, "B 3 H W"]) -> Int[Tensor, "B 3 256"]:
    count = images.shape[0] * 3
    offsets = torch.arange(count, device=images.device)[:, None] * 256
    index = (images.flatten(2).flatten(0, 1).long() + offsets).flatten()
    counts = torch.zeros(count * 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(0, index, torch.ones_like(index)).view(-1, 3, 256)


def _autocontrast(images: Tensor, ramp: Tensor, value: Tensor) -> Tensor:
    present = _histograms(images) > 0
    low = present.int().argmax(2, keepdim=True)
    high = 255 - present.flip(2).int().argmax(2, keepdim=True)
    # Tensor by tensor: torch divides a number by a tensor through the reciprocal, which is not
    # correctly rounded.
    scale = torch.full_like(low, 255, dtype=torch.float64) / (high - low).clamp(min=1)
    stretched = (ramp * scale + -low * scale).clamp(0, 255).trunc().long()
    return torch.where(high > low, stretched, ramp)


def _equalize(images: Tensor, ramp: Tensor, value: Tensor) -> Tensor:
    counts = _histograms(images)
    last = (255 - (counts > 0).flip(2).int().argmax(2, keepdim=True)).long()
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255
    below = counts.cumsum(2) - counts
    divisor = step.clamp(min=1)
    equal = ((divisor // 2 + below) // divisor).clamp(max=255)
    return torch.where(step > 0, equal, ramp)


def _posterize(images: Tensor, ramp: Tensor, value: Tensor) -> Tensor:
    dropped = (8 - value.long()).clamp(min=0)
    return (ramp >> dropped) << dropped


def _solarize_add(images: Tensor, ramp: Tensor, value: Tensor) -> Tensor:
    return torch.where(ramp < 128, (ramp + value.long()).clamp(max=255), ramp)


def _contrast(images: Tensor, ramp: Tensor, value: Tensor) -> Tensor:
    grey = _grey(images).flatten(1)
    count = grey.shape[1]
    mean = (2 * grey.sum(1) + count) // (2 * count)
    return _blend(mean[:, None, None], ramp, value)


_TABLES: dict[Kind, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    Kind.AUTOCONTRAST: _autocontrast,
    Kind.EQUALIZE: _equalize,
    Kind.INVERT: lambda images, ramp, value: 255 - ramp,
    Kind.POSTERIZE: _posterize,
    Kind.SOLARIZE: lambda images, ramp, value: torch.where(ramp < value.long(), ramp, 255 - ramp),
    Kind.SOLARIZE_ADD: _solarize_add,
    Kind.BRIGHTNESS: lambda images, ramp, value: _blend(torch.zeros_like(ramp), ramp, value),
    Kind.CONTRAST: _contrast,
}
"""From images, all levels and each image's value to what becomes of each level."""
