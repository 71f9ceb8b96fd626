"""Patches of two networks brought to the same places: by position between unequal grids, then onto
the patches that were seen.
"""

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
