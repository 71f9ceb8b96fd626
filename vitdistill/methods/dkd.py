"""DKD: logit distillation, decoupled into the label's class against the rest, and the rest.

Source: "Decoupled Knowledge Distillation", Zhao et al., CVPR 2022, arXiv 2203.08679, checked
against megvii-research/mdistiller@e8c5bb3. Their code removes the label's class by subtracting 1000
from its logit, and takes the logarithm of a probability that may be 0; here both are exact for
logits of any size. They also raise the weight from 0 over the first epochs (20 of 240 on
CIFAR-100), which is an objective's ``schedule`` here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .base import check_factors
from .kd import check_logits, check_temperature
from .nkd import TargetObjective, label_classes, of_label, of_rest


def _against_the_rest(
    log_probs: Float[Tensor, "B C"], labels: Int[Tensor, " B"]
) -> Float[Tensor, "B 2"]:
    """Return ``log p_y`` and ``log(1 - p_y)``."""
    # The latter from the others: 1 - p_y is 0 in float32 long before they are.
    rest = of_rest(log_probs, labels).logsumexp(-1)
    return torch.stack([of_label(log_probs, labels), rest], dim=-1)


def _kl(student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _dkd(
    student_logits: Float[Tensor, "B C"],
    teacher_logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"] | Float[Tensor, "B C"],
    alpha: float,
    beta: float,
    temperature: float,
) -> Float[Tensor, " B"]:
    check_logits(student_logits, teacher_logits, temperature)
    label = label_classes(labels, student_logits)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    target = _kl(_against_the_rest(student, label), _against_the_rest(teacher, label))
    rest = _kl(
        F.log_softmax(of_rest(student, label), dim=-1),
        F.log_softmax(of_rest(teacher, label), dim=-1),
    )
    return temperature**2 * (alpha * target + beta * rest)


def dkd_loss(
    student_logits: Float[Tensor, "B C"],
    teacher_logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"] | Float[Tensor, "B C"],
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """Return ``T^2 (alpha TCKD + beta NCKD)``, a mean over the batch, in float32.

    TCKD is ``KL((p_T[y], 1 - p_T[y]) || (p_S[y], 1 - p_S[y]))``, NCKD is ``KL(q_T || q_S)``; p is
    the softmax over all classes and q over the C - 1 that are not y, both at temperature T. The
    ordinary divergence of an image is ``TCKD + (1 - p_T[y]) NCKD``.

    Args:
        student_logits, teacher_logits: no gradient reaches the teacher.
        labels: y, or soft labels, of which the class with the largest share is y (the first of
            equal ones).
        alpha, beta: the weights of the two terms.
        temperature: T.

    Raises:
        ValueError: the shapes do not fit, there is one class only, or ``temperature`` is not above
            0.

    Source: arXiv 2203.08679 (DKD in terms of TCKD and NCKD); megvii-research/mdistiller@e8c5bb3.

    Example:
        >>> import torch
        >>> dkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1])).item()
        0.0
    """
    return _dkd(student_logits, teacher_logits, labels, alpha, beta, temperature).mean()


@dataclass(frozen=True, kw_only=True)
class DKD(TargetObjective):
    """Decoupled logit distillation.

    Args:
        alpha: the weight of the label's class against the rest, 0 or more.
        beta: the weight of the rest among themselves, 0 or more; the authors use 8 on CIFAR-100 (6
            to 2 with some students) and 0.5 on ImageNet, at T 1 there.
        temperature: T, above 0; the loss carries T^2.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0

    formula: ClassVar[str] = (
        "T^2 (alpha KL of the label's class against the rest + beta KL of the rest), batch mean"
    )
    paper: ClassVar[str] = (
        "DKD (Zhao et al., CVPR 2022, [2203.08679](https://arxiv.org/abs/2203.08679))"
    )
    use_when: ClassVar[str] = (
        "In place of kd when the images have labels and the teacher is so sure of them that little"
        " of the other classes gets through."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factors(alpha=self.alpha, beta=self.beta)
        check_temperature(self.temperature)

    @property
    def teacher_temperatures(self) -> tuple[float, ...]:
        return (self.temperature,)

    def per_image(
        self,
        student_logits: Float[Tensor, "B C"],
        teacher_logits: Float[Tensor, "B C"],
        labels: Int[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        return _dkd(student_logits, teacher_logits, labels, self.alpha, self.beta, self.temperature)
