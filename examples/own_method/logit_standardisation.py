"""Logit standardisation: KD that compares the order and the shape of two answers and leaves their
scale to each network.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitdistill.errors import ConfigError
from vitdistill.methods.base import Labelled
from vitdistill.methods.kd import LogitObjective, check_temperature, kd_loss
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput


@dataclass(frozen=True, kw_only=True)
class LogitStandardisation(LogitObjective):
    """KD on standardised logits: ``T^2 KL(softmax(z(teacher) / T) || softmax(z(student) / T))``,
    batch mean.

    ``z`` takes from each image's logits their mean over classes and divides by their standard
    deviation. The authors' CIFAR-100 commands give it weight 9 at T = 2. Their code adds 1e-7 to
    the (unbiased) deviation; here 1e-5 is added to the variance, as in a layer norm, so that the
    gradient of a student that answers nothing yet stays small.

    Args:
        temperature: T, above 0, in standard deviations.
        head: for students with a distillation token: which head learns from the teacher. ``auto``:
            the distillation token's.

    Source: "Logit Standardization in Knowledge Distillation", Sun et al., CVPR 2024, arXiv
        2403.01427; checked against
    sunshangquan/logit-standardization-KD@6083e2d ``mdistiller/distillers/KD.py``.
    """

    temperature: float = 2.0

    formula: ClassVar[str] = (
        "T^2 KL(teacher || student) of standardised logits, summed over classes, batch mean"
    )
    paper: ClassVar[str] = (
        "Logit standardisation (Sun et al., CVPR 2024,"
        " [2403.01427](https://arxiv.org/abs/2403.01427))"
    )
    use_when: ClassVar[str] = (
        "In place of kd when the teacher's logits are much larger than the student can make them."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)

    def check(self, student: Network, teacher: Network | None) -> None:
        super().check(student, teacher)  # the heads, and as many classes
        if student.num_classes < 3:
            raise ConfigError(
                f"standardised logits of {student.num_classes} classes say only which is larger:"
                " use kd for them"
            )

    def loss(
        self,
        student: ViTOutput,
        teacher: ViTOutput | None,
        batch: Labelled,
        adapter: nn.Module | None,
    ) -> Float[Tensor, ""]:
        assert teacher is not None and teacher.logits is not None
        return kd_loss(
            standardise(self.student_logits(student)), standardise(teacher.logits), self.temperature
        )


def standardise(logits: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Each row with mean 0 and standard deviation 1, in float32."""
    return F.layer_norm(logits.float(), logits.shape[-1:])
