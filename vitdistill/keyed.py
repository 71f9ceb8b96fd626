"""Randomness that is addressed, not drawn: every number is a pure function of what it is for.

The address is ``(seed, view, sample id, stream, index)``. The first four are folded into a 64-bit
key, the state of a SplitMix64 generator of which ``index`` picks one output. So a sample's view is
the same in any order and any process, a run can start at any step, and no generator's state is
saved. Parameters are drawn in numpy on the host (a few numbers an image); pixel noise is drawn in
torch on the device, by the same integer arithmetic.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (the
mixing function is Stafford's Mix13).
"""

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Stream(IntEnum):
    """What a random number is for. A new purpose gets a new number; no number is ever reused."""

    ORDER = 1
    LIBRARIES = 2
    CROP = 3
    FLIP = 4
    AUGMENT = 5
    ERASE = 6
    ERASE_NOISE = 7
    MIX = 8
    SUBSET = 9
    PATCHES = 10
    DROPOUT = 11
    OBJECTIVE = 12
    PAIRS = 13  # 14 was a label encoding's, now removed
    SPLIT = 15
    UNLABELLED = 16


def _mix(x: Any) -> Any:
    """Mix the 64 bits of a uint64 array, or of an int: `torch.compile` takes it as a constant."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _fold(state: Any, value: Any) -> Any:
    return _mix(((state ^ value) + _GOLDEN) & _MASK)


def _word(value: int | np.ndarray) -> U64:
    """Return ``value`` modulo 2**64 as an array: numpy scalars would warn of overflow."""
    if isinstance(value, int):
        return np.array([value & _MASK], dtype=np.uint64)
    return np.atleast_1d(value).astype(np.int64).view(np.uint64)


def keys(seed: int, view: int | np.ndarray, sample_ids: int | np.ndarray, stream: Stream) -> U64:
    """Return one 64-bit key a sample, (B,); ``view`` and ``sample_ids`` broadcast."""
    start = _fold(_fold(0, seed & _MASK), int(stream))
    found: U64 = _fold(_fold(start, _word(view)), _word(sample_ids))
    return found


def bits(keys: U64, index: int | np.ndarray) -> U64:
    """Return SplitMix64's output number ``index`` from the state ``keys``; the two broadcast."""
    words: U64 = _mix(keys + (_word(index) + np.uint64(1)) * np.uint64(_GOLDEN))
    return words


def uniforms(keys: U64, count: int, start: int = 0) -> F64:
    """Return numbers in [0, 1), (B, ``count``): every key's indices from ``start`` on."""
    index = np.arange(start, start + count, dtype=np.int64)
    words = bits(keys[:, None], index[None, :]) >> np.uint64(11)
    numbers: F64 = words.astype(np.float64) * 2.0**-53
    return numbers


def normals(keys: U64, count: int, start: int = 0) -> F64:
    """Return standard normal numbers, (B, ``count``), by Box-Muller: two indices each."""
    pairs = uniforms(keys, 2 * count, start).reshape(len(keys), count, 2)
    radius = np.sqrt(-2.0 * np.log1p(-pairs[..., 0]))
    numbers: F64 = radius * np.cos(2.0 * np.pi * pairs[..., 1])
    return numbers


def permutation(seed: int, view: int, size: int, stream: Stream = Stream.ORDER) -> I64:
    """Return a random order of ``range(size)``: sample ids sorted by their keys."""
    sample_keys = keys(seed, view, np.arange(size, dtype=np.int64), stream)
    return np.argsort(sample_keys, kind="stable").astype(np.int64)


def library_seeds(seed: int, views: int | np.ndarray, sample_ids: int | np.ndarray) -> list[int]:
    """Return seeds in [0, 2**63) for the libraries' generators, one a view of a sample."""
    seeds: list[int] = (keys(seed, views, sample_ids, Stream.LIBRARIES) >> np.uint64(1)).tolist()
    return seeds


def _shift(x: Tensor, places: int) -> Tensor:
    """Shift the 64-bit pattern in ``x`` to the right, logically: torch's ``>>`` copies the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def to_torch(keys: U64, device: torch.device | str = "cpu") -> Int[Tensor, " B"]:
    """Return keys as the same 64-bit patterns in an int64 tensor on ``device``."""
    return torch.from_numpy(np.ascontiguousarray(keys).view(np.int64)).to(device, non_blocking=True)


def _torch_mix(x: Tensor, last: bool = True) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31) if last else x


def torch_bits(keys: Int[Tensor, "*shape"], index: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Do `bits` in torch: equal 64-bit patterns, on any device."""
    return _torch_mix(keys + (index + 1) * _signed(_GOLDEN))


def torch_keys(
    seed: int, views: Int[Tensor, " B"], sample_ids: Int[Tensor, " B"], stream: Stream
) -> Int[Tensor, " B"]:
    """Do `keys` in torch: equal 64-bit patterns, on the tensors' device."""
    golden = _signed(_GOLDEN)
    start = _fold(_fold(0, seed & _MASK), int(stream))
    state = _torch_mix((views ^ _signed(start)) + golden)
    return _torch_mix((state ^ sample_ids) + golden)


def torch_uniforms(keys: Int[Tensor, " B"], count: int) -> Float[Tensor, "B {count}"]:
    """Return float32 numbers in [0, 1): the first 24 bits of each key's first outputs."""
    index = torch.arange(1, count + 1, device=keys.device) * _signed(_GOLDEN)
    # `torch_bits` without its last shift by 31, which leaves the first 24 bits alone.
    return _shift(_torch_mix(keys[:, None] + index, last=False), 40).float() * 2.0**-24


def torch_normals(
    keys: Int[Tensor, "*shape"], index: Int[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return a standard normal float32 number an address.

    Devices agree up to the rounding of their logarithm and cosine.
    """
    word = torch_bits(keys, index)
    radius = (_shift(word, 40).float() + 0.5) * 2.0**-24
    angle = (word & 0xFFFFFF).float() * (2.0 * torch.pi * 2.0**-24)
    return (radius.log() * -2.0).sqrt() * angle.cos()
