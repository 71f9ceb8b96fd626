"""Random masking of patches, as masked autoencoders draw it.

Source: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022, arXiv 2111.06377,
checked against facebookresearch/mae@efb2a80 and UCSC-VLAA/DMAE@a0f4959.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from ..option import check_options, option
from ..vit.patches import num_visible as num_visible
from ..vit.patches import random_masking as random_masking
from .base import Masking, require


@dataclass(frozen=True, kw_only=True)
class RandomMasking(Masking):
    """Student and teachers see the same random patches, drawn anew per sample and view.

    A teacher that sees more is compared at the student's patches alone; the others only inform what
    it says of them.
    """

    mask_rate: float = option(
        0.75, "fraction of patches hidden from the student", at_least=0, below=1
    )
    teacher_mask_rate: float | None = option(
        None, "fraction hidden from teachers; null: the same", at_least=0
    )

    paper = (
        "MAE (He et al., CVPR 2022, arXiv 2111.06377); unequal rates: AMD (CVPR 2024, arXiv"
        " 2311.03149)"
    )
    use_when = "Pre-training with `mae`, whose target the hidden patches are, and with `dmae`."

    def __post_init__(self) -> None:
        check_options(self, "masking")
        rate, ok = self.teacher_mask_rate, self._teacher_rate <= self.mask_rate
        require(ok, "masking.teacher_mask_rate", rate, "a fraction from 0 to mask_rate")

    @property
    def _teacher_rate(self) -> float:
        return self.mask_rate if self.teacher_mask_rate is None else self.teacher_mask_rate

    def count(self, num_patches: int) -> int:
        return num_visible(num_patches, self.mask_rate)

    def teacher_count(self, num_patches: int) -> int:
        return num_visible(num_patches, self._teacher_rate)

    def order(self, noise: Float[Tensor, "B N"]) -> Int[Tensor, "B N"]:
        return noise.argsort(dim=1, stable=True)
