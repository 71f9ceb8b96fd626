"""DKD: logit distillation, decoupled into the label's class against the rest, and the rest.

Source: "Decoupled Knowledge Distillation", Zhao et al., CVPR 2022, arXiv 2203.08679, checked
against megvii-research/mdistiller@e8c5bb3. Their code removes the label's class by subtracting 1000
from its logit, and takes the logarithm of a probability that may be 0; here both are exact for
logits of any size. They also raise the weight from 0 over the first epochs (20 of 240 on
CIFAR-100), which is an objective's ``schedule`` here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..option import option
from .base import Scalar
from .kd import Logits, check_logits, kl_rows
from .nkd import (
    Classes,
    PerImage,
    Reduction,
    TargetObjective,
    label_classes,
    of_label,
    other_classes,
)


def _against_the_rest(
    log_probs: Logits, labels: Classes, others: Int[Tensor, "B C-1"]
) -> Float[Tensor, "B 2"]:
    """Return ``log p_y`` and ``log(1 - p_y)``."""
    # The latter from the other classes: 1 - p_y is 0 in float32 long before their sum is.
    rest = log_probs.gather(1, others).logsumexp(-1)
    return torch.stack([of_label(log_probs, labels), rest], dim=-1)


def dkd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Classes | Logits,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Scalar | PerImage:
    """Return ``T^2 (alpha TCKD + beta NCKD)``, in float32.

    TCKD is ``KL((p_T[y], 1 - p_T[y]) || (p_S[y], 1 - p_S[y]))``, NCKD is ``KL(q_T || q_S)``; p is
    the softmax over all classes and q over the C - 1 that are not y, both at temperature T. The
    ordinary divergence of an image is ``TCKD + (1 - p_T[y]) NCKD``. ``labels``, ``reduction`` and
    errors are those of `nkd_loss`.
    """
    check_logits(student_logits, teacher_logits, temperature)
    label = label_classes(labels, student_logits)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    others = other_classes(label, student.shape[1])
    target = kl_rows(*(_against_the_rest(it, label, others) for it in (student, teacher)))
    rest = kl_rows(
        F.log_softmax(student.gather(1, others), dim=-1),
        F.log_softmax(teacher.gather(1, others), dim=-1),
    )
    losses = temperature**2 * (alpha * target + beta * rest)
    return losses.mean() if reduction == "mean" else losses


@dataclass(frozen=True, kw_only=True)
class DKD(TargetObjective):
    """Decoupled logit distillation.

    The authors' beta is 8 on CIFAR-100 (6 to 2 with some students), and 0.5 at T 1 on ImageNet.
    """

    alpha: float = option(1.0, "the weight of the label's class against the rest", at_least=0)
    beta: float = option(8.0, "the weight of the rest among themselves", at_least=0)
    temperature: float = option(4.0, "T; the loss carries T^2", above=0)

    terms = ("alpha", "beta")
    formula = "T^2 (alpha KL of the label's class against the rest + beta KL of the rest), mean"
    paper = "DKD (Zhao et al., CVPR 2022, arXiv 2203.08679)"
    use_when = "In place of kd when the teacher is so sure of labels that little else gets through."

    def per_image(self, student: Logits, teacher: Logits, labels: Classes) -> PerImage:
        return dkd_loss(student, teacher, labels, self.alpha, self.beta, self.temperature, "none")
