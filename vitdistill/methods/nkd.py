"""NKD: a loss for the label's class and one for the rest; what such losses do with mixed images.

Source: "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels", Yang et al., ICCV 2023, arXiv 2303.13005, checked
against yzd-v/cls_KD@ad4876f. Between July and October 2023 that code kept the label's class among
the rest by mistake; this is the corrected form.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..option import option
from .base import Scalar, Truth
from .kd import Logits, SoftLogitObjective, check_logits

PerImage = Float[Tensor, " B"]
Classes = Int[Tensor, " B"]
Reduction = Literal["mean", "none"]


def label_classes(labels: Classes | Logits, logits: Logits) -> Classes:
    """Return one class an image: a soft label's class with the largest share, the first of equals.

    Raises `ValueError` unless the labels fit ``logits`` of at least two classes.
    """
    batch, classes = logits.shape
    if classes < 2:
        raise ValueError("the logits have one class: there is no rest beside the label's class")
    if labels.shape != ((batch,) if labels.ndim == 1 else (batch, classes)):
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    return labels.long() if labels.ndim == 1 else labels.argmax(-1)


def of_label(values: Logits, labels: Classes) -> PerImage:
    """Return each image's value at its label's class."""
    return values.gather(1, labels[:, None])[:, 0]


def other_classes(labels: Classes, num_classes: int) -> Int[Tensor, "B _"]:
    """Return the classes besides each image's label, in their order, to gather values at them."""
    # Gathered, not masked: the number a mask fills in leaks into a softmax.
    others = torch.arange(num_classes - 1, device=labels.device)
    return others + (others >= labels[:, None])


def nkd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Classes | Logits,
    gamma: float = 1.0,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Scalar | PerImage:
    """Return ``-p_T[y] log p_S[y] - gamma T^2 sum_i q_T[i] log q_S[i]``, in float32.

    p is the softmax over all classes at temperature 1; q is the softmax over the C - 1 classes that
    are not y, at temperature T, so neither network's logit of y is in it. These are
    cross-entropies, not divergences: the loss of equal logits is not 0. No gradient reaches the
    teacher.

    Args:
        labels: y, or soft labels, of which the class with the largest share is y (the first of
            equal ones).
        reduction: ``mean`` over the batch, or ``none``.
    """
    check_logits(student_logits, teacher_logits, temperature)
    label = label_classes(labels, student_logits)
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    target = of_label(teacher.softmax(-1), label) * of_label(F.log_softmax(student, dim=-1), label)
    others = other_classes(label, student.shape[1])
    rest = F.softmax(teacher.gather(1, others) / temperature, dim=-1) * F.log_softmax(
        student.gather(1, others) / temperature, dim=-1
    )
    losses = -target - gamma * temperature**2 * rest.sum(-1)
    return losses.mean() if reduction == "mean" else losses


@dataclass(frozen=True, kw_only=True)
class TargetObjective(SoftLogitObjective):
    """A logit loss that treats the label's class apart from the rest."""

    mixed: Literal["dominant", "both"] = option(
        "dominant",
        "what counts in a mixed image: `dominant`, as the authors train: the class of the larger"
        " share (of two halves, the lower class); `both`: each by its share (not in the papers)",
    )

    reads_labels: ClassVar[bool] = True

    @abstractmethod
    def per_image(self, student: Logits, teacher: Logits, labels: Classes) -> PerImage:
        """Return the loss of each image, with one label each."""

    def compare(self, student: Logits, teacher: Logits, batch: Truth) -> Scalar:
        labels, other, lam = batch.labels, batch.mixed_labels, batch.lam
        if other is None or lam is None:
            return self.per_image(student, teacher, labels).mean()
        if self.mixed == "both":
            first = self.per_image(student, teacher, labels)
            return (lam * first + (1 - lam) * self.per_image(student, teacher, other)).mean()
        lower = torch.minimum(labels, other)
        dominant = torch.where(lam > 0.5, labels, torch.where(lam < 0.5, other, lower))
        return self.per_image(student, teacher, dominant).mean()


@dataclass(frozen=True, kw_only=True)
class NKD(TargetObjective):
    """NKD: match the label's class as far as the teacher believes in it, and the rest on its own.

    The authors train ViTs on ImageNet with gamma 1 and T 1, CNNs on ImageNet with 1.5 and 1, CNNs
    on CIFAR-100 with 3.5 and 3, each beside the cross-entropy with the labels. The label's class is
    compared at temperature 1.
    """

    gamma: float = option(1.0, "the weight of the other classes", at_least=0)

    formula = "-p_T[y] log p_S[y] + gamma T^2 cross-entropy of the other classes, batch mean"
    paper = "NKD (Yang et al., ICCV 2023, arXiv 2303.13005)"
    use_when = (
        "In place of kd when the images have labels: published 76.68 % against 76.01 % with kd"
        " (DeiT-Ti from DeiT III-S, ImageNet)."
    )

    @property
    def reads_at(self) -> tuple[float, ...]:  # type: ignore[override]
        return tuple({1.0, self.temperature})

    def per_image(self, student: Logits, teacher: Logits, labels: Classes) -> PerImage:
        return nkd_loss(student, teacher, labels, self.gamma, self.temperature, "none")
