"""Logit standardisation: KD that compares the shape of two answers, whatever their scale."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitdistill.errors import ConfigError
from vitdistill.methods.base import Truth
from vitdistill.methods.kd import LogitObjective, check_temperature, kd_loss
from vitdistill.vit import Network


@dataclass(frozen=True, kw_only=True)
class LogitStandardisation(LogitObjective):
    """KD of logits less their mean over classes, over their standard deviation.

    The authors' CIFAR-100 commands give it weight 9 at T = 2. Their code adds 1e-7 to the
    deviation; here 1e-5 is added to the variance, as in a layer norm, which keeps first gradients
    small.

    Args:
        temperature: T, above 0, in standard deviations.

    Source: "Logit Standardization in Knowledge Distillation", Sun et al., CVPR 2024, arXiv
    2403.01427; checked against sunshangquan/logit-standardization-KD@6083e2d ``KD.py``.
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
                f"standardised logits of {student.num_classes} classes say only which is larger",
                fix="use kd",
            )

    def compare(
        self, student: Float[Tensor, "B C"], teacher: Float[Tensor, "B C"], batch: Truth
    ) -> Float[Tensor, ""]:
        return kd_loss(standardise(student), standardise(teacher), self.temperature)


def standardise(logits: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Return each row with mean 0 and standard deviation 1, in float32."""
    return F.layer_norm(logits.float(), logits.shape[-1:])
