"""Logit matching: the squared difference of two answers, in place of a divergence."""

from dataclasses import dataclass

import torch.nn.functional as F

from vitdistill.methods.base import Scalar, Truth
from vitdistill.methods.kd import LogitObjective, Logits
from vitdistill.option import option


@dataclass(frozen=True, kw_only=True)
class LogitMSE(LogitObjective):
    """KD by the mean squared difference of logits.

    It is what ``T^2 KL`` becomes for large T, up to the difference of the rows' means, which
    ``centred`` leaves out.

    Source: "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge
    Distillation", Kim et al., IJCAI 2021, arXiv 2105.08919, eq. 5.
    """

    centred: bool = option(False, "compare logits less their mean over an image's classes")

    formula = "|student - teacher|^2 of the logits, mean over classes and batch"
    paper = "Logit matching (Kim et al., IJCAI 2021, arXiv 2105.08919)"
    use_when = "In place of kd when there is no time to find a temperature."

    def compare(self, student: Logits, teacher: Logits, batch: Truth) -> Scalar:
        student, teacher = student.float(), teacher.detach().float()
        if self.centred:
            student, teacher = (z - z.mean(-1, keepdim=True) for z in (student, teacher))
        return F.mse_loss(student, teacher)
