"""Random masking of patches, as masked autoencoders draw it: which patches stay visible, and how
many.

Source: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022, arXiv 2111.06377,
checked against facebookresearch/mae@efb2a80 and UCSC-VLAA/DMAE@a0f4959.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError
from .base import Masking


def num_visible(num_patches: int, mask_rate: float) -> int:
    """How many of N patches stay visible: ``int(N * (1 - mask_rate))`` in binary floating point,
    the authors' count.

    It is a floor, and of the binary product: 100 patches at 0.8 leave 19, not 20. Raises
    `ConfigError` when ``mask_rate`` is not from 0 to below 1, or when no patch is left.

    Source: ``random_masking`` of facebookresearch/mae@efb2a80.

    Example:
        >>> [num_visible(196, rate) for rate in (0.75, 0.9, 0.95, 0.98)]
        [49, 19, 9, 3]
    """
    if not 0 <= mask_rate < 1:
        raise ConfigError(
            f"mask_rate is {mask_rate!r}: give the fraction of patches to hide, from 0 to below 1"
        )
    visible = int(num_patches * (1 - mask_rate))
    if visible < 1:
        highest = _highest_rate(num_patches)
        raise ConfigError(
            f"mask_rate {mask_rate!r} leaves none of {num_patches} patches visible: the highest"
            f" that leaves one is {highest}"
        )
    return visible


def _highest_rate(num_patches: int) -> float:
    """The highest mask rate that leaves one patch, rounded down to one digit more than the number
    of patches has.
    """
    scale = 10 ** (len(str(num_patches)) + 1)
    steps = math.floor(scale * (1 - 1 / max(num_patches, 1)))
    while steps > 0 and int(num_patches * (1 - steps / scale)) < 1:
        steps -= 1
    return steps / scale


def random_masking(
    noise: Float[Tensor, "B N"], mask_rate: float
) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B N"], Float[Tensor, "B N"]]:
    """Patches with the lowest noise stay visible.

    Args:
        noise: uniform in [0, 1), one number a patch, in row-major order.
        mask_rate: fraction of patches to hide, 0 to below 1; see `num_visible` for the count.

    Returns:
        ``keep``: the visible patches, lowest noise first. ``restore``: where each patch is in the
            order of the noise, so that it undoes
        that order. ``mask``: float32, 1 at hidden patches and 0 at visible ones.

    Source: arXiv 2111.06377 section 3; ``random_masking`` of facebookresearch/mae@efb2a80 (the sort
        is stable here).
    """
    visible = num_visible(noise.shape[1], mask_rate)
    order = noise.argsort(dim=1, stable=True)
    keep = order[:, :visible]
    mask = torch.ones(noise.shape, device=noise.device).scatter(1, keep, 0.0)
    return keep, order.argsort(dim=1), mask


@dataclass(frozen=True, kw_only=True)
class RandomMasking(Masking):
    """Student and teachers see random patches, the same ones, others for every sample and view.

    Args:
        mask_rate: fraction of the patches that is hidden from the student, 0 to below 1;
            `num_visible` says how many stay.
        teacher_mask_rate: that of the teachers, at most ``mask_rate``; null: the same. A teacher
            that sees more is compared at the student's patches alone; the others only inform what
            it says of them.
    """

    mask_rate: float = 0.75
    teacher_mask_rate: float | None = None

    paper: ClassVar[str] = (
        "MAE (He et al., CVPR 2022, [2111.06377](https://arxiv.org/abs/2111.06377)); unequal rates:"
        " AMD (CVPR 2024, [2311.03149](https://arxiv.org/abs/2311.03149))"
    )
    use_when: ClassVar[str] = (
        "The student is pre-trained: with `mae`, whose target the hidden patches are, and with"
        " `dmae`."
    )

    def __post_init__(self) -> None:
        for name, rate in (
            ("mask_rate", self.mask_rate),
            ("teacher_mask_rate", self.teacher_mask_rate),
        ):
            if rate is not None and not 0 <= rate < 1:
                raise ConfigError(
                    f"{name} is {rate!r}: give the fraction of patches to hide, from 0 to below 1"
                )
        if self.teacher_mask_rate is not None and self.teacher_mask_rate > self.mask_rate:
            raise ConfigError(
                f"teacher_mask_rate is {self.teacher_mask_rate:g} and mask_rate {self.mask_rate:g}:"
                " a teacher sees at least what the student sees"
            )

    def count(self, num_patches: int) -> int:
        return num_visible(num_patches, self.mask_rate)

    def teacher_count(self, num_patches: int) -> int:
        return (
            self.count(num_patches)
            if self.teacher_mask_rate is None
            else num_visible(num_patches, self.teacher_mask_rate)
        )

    def order(self, noise: Float[Tensor, "B N"]) -> Int[Tensor, "B N"]:
        return noise.argsort(dim=1, stable=True)
