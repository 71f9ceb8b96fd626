"""Patch arithmetic: matching places in two networks, and how many are kept or masked."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..errors import ConfigError, Set


def full_precision(tensor: Tensor) -> torch.autocast:
    """Return a context in which products of float32 tensors stay float32 under any autocast."""
    device = tensor.device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


@dataclass(frozen=True)
class PatchMap:
    """Vectors of an image's patches, and their places.

    Attributes:
        vectors: ``(B, K, D)``, one a patch that was seen.
        grid: rows and columns of the whole grid.
        keep: ``(B, K)`` row-major indices into the grid; None: every patch, in order.
    """

    vectors: Float[Tensor, "B K D"]
    grid: tuple[int, int]
    keep: Int[Tensor, "B K"] | None = None

    def at(self, places: "PatchMap") -> Float[Tensor, "B M D"]:
        """Return this map's vectors at the patches of ``places``.

        This map must be whole, or of the very same patches.
        """
        if self.keep is not None:
            assert self.keep is places.keep and self.grid == places.grid
            return self.vectors
        return gather_patches(resample_patches(self.vectors, self.grid, places.grid), places.keep)


def resample_patches(
    vectors: Float[Tensor, "B N D"], grid: tuple[int, int], to_grid: tuple[int, int]
) -> Float[Tensor, "B M D"]:
    """Resample a whole grid's vectors onto another grid over the same image, by position.

    Bilinear, averaging where the new grid is coarser.
    """
    if grid == to_grid:
        return vectors
    # One matrix product with the weights of torch's interpolation, whose own backward pass is ten
    # times slower, and adds in any order on a GPU.
    with full_precision(vectors):
        return _weights(grid, to_grid, vectors.device) @ vectors.float()


_KNOWN: dict[tuple[Any, ...], Tensor] = {}


@torch.compiler.assume_constant_result
def _weights(
    grid: tuple[int, int], to_grid: tuple[int, int], device: torch.device
) -> Float[Tensor, "M N"]:
    """Return the weight of each place of a grid in each place of another; cached."""
    key = grid, to_grid, device
    if key not in _KNOWN:
        each = torch.eye(grid[0] * grid[1]).unflatten(1, grid)[:, None]
        moved = F.interpolate(each, to_grid, mode="bilinear", align_corners=False, antialias=True)
        _KNOWN[key] = moved.flatten(1).T.contiguous().to(device)
    return _KNOWN[key]


def top_patches(scores: Float[Tensor, "B N"], count: int) -> Int[Tensor, "B {count}"]:
    """Return the patches of the highest scores, highest first; of equal ones, the first.

    Every device gives the same, unlike with `torch.topk`.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def gather_patches(
    values: Shaped[Tensor, "B N *rest"], keep: Int[Tensor, "B K"] | None
) -> Shaped[Tensor, "B K *rest"]:
    """Return the rows of ``values`` at the kept patches; all of them if ``keep`` is None."""
    if keep is None:
        return values
    # The backward pass of gather adds in place; that of indexing sorts all indices first.
    index = keep.reshape(*keep.shape, *(1,) * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)


def show_patches(
    images: Float[Tensor, "B 3 H W"], keep: Int[Tensor, "B K"], grid: tuple[int, int]
) -> Float[Tensor, "B 3 H W"]:
    """Return the images with all but the patches in ``keep`` grey (0)."""
    seen = images.new_zeros(len(images), grid[0] * grid[1]).scatter(1, keep, 1.0)
    return images * F.interpolate(seen.view(-1, 1, *grid), images.shape[-2:])


def num_kept_patches(num_patches: int, keep_rate: float) -> int:
    """Return how many of N patches a keep rate means: the paper's counts.

    The rate times N, rounded to the nearest multiple of 8 on grids of 128 patches and more, where a
    fraction of a percent is not worth an odd shape, and to the nearest whole number on smaller
    ones. Rounding never crosses a divisor of N: a half or a third of the patches is exact, and a
    higher rate never keeps fewer. A rate below 1 drops at least one patch, and at least one is
    kept.

    Source: the counts behind the cost column of arXiv 2302.10494 ("75 %" is 144 = 12 x 12 there).

    >>> [num_kept_patches(196, rate) for rate in (0.75, 0.5, 0.4, 0.25)]
    [144, 98, 80, 49]
    """
    exact = num_patches * keep_rate
    step = 8 if num_patches >= 128 else 1
    divisors = [d for d in range(1, num_patches + 1) if num_patches % d == 0]
    below = max((d for d in divisors if d <= exact + 1e-6), default=1)
    above = min((d for d in divisors if d >= exact - 1e-6), default=num_patches)
    count = min(max(math.floor(exact / step + 0.5) * step, below), above)
    if keep_rate < 1 and count >= num_patches:
        count = num_patches - (num_patches % step or step)
    return max(count, 1)


def num_visible(num_patches: int, mask_rate: float) -> int:
    """Return how many of N patches a mask rate leaves visible: the authors' count.

    A floor of the binary product: 100 patches at 0.8 leave 19, not 20. Raises `ConfigError` if no
    patch is left.

    Source: ``random_masking`` of facebookresearch/mae@efb2a80.

    >>> [num_visible(196, rate) for rate in (0.75, 0.9, 0.95, 0.98)]
    [49, 19, 9, 3]
    """
    visible = int(num_patches * (1 - mask_rate))
    if visible < 1:
        field = "masking.mask_rate"
        what = f"mask_rate {mask_rate!r} leaves none of {num_patches} patches visible"
        fix = Set(field, max(math.floor(1e4 * (1 - 1.01 / num_patches)) / 1e4, 0.0))
        raise ConfigError(what, fix, field=field)
    return visible


def random_masking(
    noise: Float[Tensor, "B N"], mask_rate: float
) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B N"], Float[Tensor, "B N"]]:
    """Choose the patches with the lowest noise to stay visible, `num_visible` of them.

    Returns:
        keep: the visible patches, lowest noise first.
        restore: each patch's place in the order of the noise, which undoes that order.
        mask: float32, 1 at hidden patches and 0 at visible ones.

    Source: arXiv 2111.06377 section 3; ``random_masking`` of facebookresearch/mae@efb2a80.
    """
    visible = num_visible(noise.shape[1], mask_rate)
    order = noise.argsort(dim=1, stable=True)
    keep = order[:, :visible]
    mask = torch.ones(noise.shape, device=noise.device).scatter(1, keep, 0.0)
    return keep, order.argsort(dim=1), mask
