"""Patches of two networks brought to the same places: by position between unequal grids, then onto
the patches that were seen.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which products of float32 tensors stay float32, whatever the autocast around
    it.
    """
    device = tensor.device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


@dataclass(frozen=True)
class PatchMap:
    """Vectors of an image's patches, and where they are.

    Attributes:
        vectors: ``(B, K, D)``, one a patch that was seen.
        grid: rows and columns of the whole grid.
        keep: ``(B, K)`` row-major indices into the grid; None: every patch, in order.
    """

    vectors: Float[Tensor, "B K D"]
    grid: tuple[int, int]
    keep: Int[Tensor, "B K"] | None = None

    def at(self, places: "PatchMap") -> Float[Tensor, "B M D"]:
        """This map's vectors where ``places`` has its own; this map has to be whole, or of the very
        same patches.
        """
        if self.keep is not None:
            assert self.keep is places.keep and self.grid == places.grid
            return self.vectors
        return gather_patches(resample_patches(self.vectors, self.grid, places.grid), places.keep)


def resample_patches(
    vectors: Float[Tensor, "B N D"], grid: tuple[int, int], to_grid: tuple[int, int]
) -> Float[Tensor, "B M D"]:
    """A whole grid's vectors on another grid over the same image, by position: bilinear, averaging
    where the new grid is coarser.
    """
    if grid == to_grid:
        return vectors
    image = vectors.float().transpose(1, 2).unflatten(2, grid)
    return (
        F.interpolate(image, to_grid, mode="bilinear", align_corners=False, antialias=True)
        .flatten(2)
        .transpose(1, 2)
    )


def gather_patches(
    values: Shaped[Tensor, "B N *rest"], keep: Int[Tensor, "B K"] | None
) -> Shaped[Tensor, "B K *rest"]:
    """The rows of ``values`` at the kept patches; all of them where ``keep`` is None."""
    if keep is None:
        return values
    return values[torch.arange(len(values), device=values.device)[:, None], keep]


def num_kept_patches(num_patches: int, keep_rate: float) -> int:
    """How many of N patches a keep rate means: the paper's counts.

    The rate times N, rounded to the nearest multiple of 8 on grids of 128 patches and more, where a
    fraction of a percent is not worth an odd shape, and to the nearest whole number on smaller
    ones. A divisor of N (a half, a third, a quarter... of the patches) is never rounded across:
    such a fraction is exact, and a higher rate never keeps fewer. A rate below 1 always drops at
    least one patch, and at least one is always kept. So 196 patches at 75 / 50 / 40 / 25 % keep 144
    / 98 / 80 / 49, and 256 at 75 / 50 % keep 192 / 128.

    Source: the counts behind the cost column of arXiv 2302.10494 ("75 %" is 144 = 12 x 12 there,
    not 147; "40 %" is 80, not 78).

    Example:
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
