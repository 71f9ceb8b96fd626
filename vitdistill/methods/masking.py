"""Random masking of patches, as masked autoencoders draw it.

Source: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022, arXiv 2111.06377,
checked against facebookresearch/mae@efb2a80 and UCSC-VLAA/DMAE@a0f4959.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from ..vit.patches import num_visible as num_visible
from ..vit.patches import random_masking as random_masking
from .base import Masking, require


@dataclass(frozen=True, kw_only=True)
class RandomMasking(Masking):
    """Student and teachers see the same random patches, others for every sample and view.

    Args:
        mask_rate: fraction of the patches that is hidden from the student, 0 to below 1;
            `num_visible` says how many stay.
        teacher_mask_rate: that of the teachers, at most ``mask_rate``; None: the same. A teacher
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
        rate, of_teacher = self.mask_rate, self.teacher_mask_rate
        require(0 <= rate < 1, "masking.mask_rate", rate, "a fraction from 0 to below 1")
        ok = of_teacher is None or 0 <= of_teacher <= rate
        require(ok, "masking.teacher_mask_rate", of_teacher, "a fraction from 0 to mask_rate")

    def count(self, num_patches: int) -> int:
        return num_visible(num_patches, self.mask_rate)

    def teacher_count(self, num_patches: int) -> int:
        rate = self.mask_rate if self.teacher_mask_rate is None else self.teacher_mask_rate
        return num_visible(num_patches, rate)

    def order(self, noise: Float[Tensor, "B N"]) -> Int[Tensor, "B N"]:
        return noise.argsort(dim=1, stable=True)
