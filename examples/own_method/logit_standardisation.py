"""Logit standardisation: KD that compares the shape of two answers, whatever their scale."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitdistill.errors import ConfigError
from vitdistill.methods.base import Scalar, Truth
from vitdistill.methods.kd import Logits, SoftLogitObjective, kd_loss
from vitdistill.option import option
from vitdistill.vit import Network


@dataclass(frozen=True, kw_only=True)
class LogitStandardisation(SoftLogitObjective):
    """KD of logits less their mean over classes, over their standard deviation.

    The authors' CIFAR-100 commands give it weight 9 at T = 2. Their code adds 1e-7 to the
    deviation; here 1e-5 is added to the variance, as in a layer norm, which keeps first gradients
    small.

    Source: "Logit Standardization in Knowledge Distillation", Sun et al., CVPR 2024, arXiv
    2403.01427; checked against sunshangquan/logit-standardization-KD@6083e2d ``KD.py``.
    """

    temperature: float = option(2.0, "T, in standard deviations", above=0)

    formula = "T^2 KL(teacher || student) of standardised logits, summed over classes, batch mean"
    paper = "Logit standardisation (Sun et al., CVPR 2024, arXiv 2403.01427)"
    use_when = (
        "In place of kd when the teacher's logits are much larger than the student can make them."
    )

    def check(self, student: Network, teacher: Network | None) -> None:
        super().check(student, teacher)  # the heads, and as many classes
        if student.num_classes < 3:
            raise ConfigError(
                f"standardised logits of {student.num_classes} classes say only which is larger",
                fix="use kd",
            )

    def compare(self, student: Logits, teacher: Logits, batch: Truth) -> Scalar:
        return kd_loss(standardise(student), standardise(teacher), self.temperature)


def standardise(logits: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Return each row with mean 0 and standard deviation 1, in float32."""
    return F.layer_norm(logits.float(), logits.shape[-1:])
