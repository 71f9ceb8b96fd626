"""NKD: the label's class and the rest of the classes, each with a loss of its own; and what such
losses do with mixed images.

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
from torch import Tensor, nn

from ..errors import ConfigError
from ..vit.network import Network
from ..vit.output import ViTOutput
from .base import Labelled
from .kd import LogitObjective, check_factors, check_logits, check_temperature


def label_classes(
    labels: Int[Tensor, " B"] | Float[Tensor, "B C"], logits: Float[Tensor, "B C"]
) -> Int[Tensor, " B"]:
    """One class an image: ``labels`` itself, or the class with the largest share of a soft label,
    the first of equal ones.

    Raises `ValueError` for labels that do not fit ``logits``, or logits of one class, which have no
    rest.
    """
    batch, classes = logits.shape
    if classes < 2:
        raise ValueError("the logits have one class: there is no rest beside the label's class")
    if labels.shape != ((batch,) if labels.ndim == 1 else (batch, classes)):
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}: give a class or"
            " C shares for each image"
        )
    return labels.long() if labels.ndim == 1 else labels.argmax(-1)


def of_label(values: Float[Tensor, "B C"], labels: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Each image's value at its label's class."""
    return values.gather(1, labels[:, None])[:, 0]


def of_rest(values: Float[Tensor, "B C"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B C-1"]:
    """Each image's values at all the other classes, in their order. Gathered, not masked: a mask's
    number leaks into a softmax.
    """
    others = torch.arange(values.shape[1] - 1, device=values.device)
    return values.gather(1, others + (others >= labels[:, None]))


def _nkd(
    student_logits: Float[Tensor, "B C"],
    teacher_logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"] | Float[Tensor, "B C"],
    gamma: float,
    temperature: float,
) -> Float[Tensor, " B"]:
    check_logits(student_logits, teacher_logits, temperature)
    label = label_classes(labels, student_logits)
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    target = of_label(teacher.softmax(-1), label) * of_label(F.log_softmax(student, dim=-1), label)
    rest = F.softmax(of_rest(teacher, label) / temperature, dim=-1) * F.log_softmax(
        of_rest(student, label) / temperature, dim=-1
    )
    return -target - gamma * temperature**2 * rest.sum(-1)


def nkd_loss(
    student_logits: Float[Tensor, "B C"],
    teacher_logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"] | Float[Tensor, "B C"],
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """``-p_T[y] log p_S[y] - gamma T^2 sum_i q_T[i] log q_S[i]``: mean over the batch, in float32.

    p is the softmax over all classes at temperature 1; q is the softmax over the C - 1 classes that
    are not y, at temperature T, so that neither network's logit of y is in it. Cross-entropies, not
    divergences: the loss of equal logits is not 0.

    Args:
        student_logits, teacher_logits: no gradient reaches the teacher.
        labels: y, or soft labels, of which the class with the largest share is y (the first of
            equal ones).
        gamma: the weight of the other classes.
        temperature: T.

    Raises `ValueError` when the shapes do not fit, when there is one class only, or when
    ``temperature`` is not above 0.

    Source: arXiv 2303.13005 (L_NKD); yzd-v/cls_KD@ad4876f.

    Example:
        >>> import torch
        >>> loss = nkd_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0, 1]))
        >>> round(loss.item(), 4)  # log(2) / 2
        0.3466
    """
    return _nkd(student_logits, teacher_logits, labels, gamma, temperature).mean()


@dataclass(frozen=True, kw_only=True)
class TargetObjective(LogitObjective):
    """A logit loss that treats the label's class apart from the rest, so that a mixed image needs
    one class that counts.

    Args:
        mixed: what counts in a mixed image. ``dominant``: the class with the larger share, the
            lower class of two halves, as the authors train; ``both``: each of its classes in turn,
            by its share (not in the papers).
    """

    mixed: Literal["dominant", "both"] = "dominant"

    reads_labels: ClassVar[bool] = True

    def check(self, student: Network, teacher: Network | None) -> None:
        super().check(student, teacher)
        if student.num_classes < 2:
            raise ConfigError(
                f"{type(self).__name__} sets the label's class against the rest, and the student"
                " has one class: use another objective"
            )

    @abstractmethod
    def per_image(
        self,
        student_logits: Float[Tensor, "B C"],
        teacher_logits: Float[Tensor, "B C"],
        labels: Int[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        """The loss of each image, with one label each."""

    def loss(
        self,
        student: ViTOutput,
        teacher: ViTOutput | None,
        batch: Labelled,
        adapter: nn.Module | None,
    ) -> Float[Tensor, ""]:
        assert teacher is not None and teacher.logits is not None
        ours, theirs = self.student_logits(student), teacher.logits
        labels, other, lam = batch.labels, batch.mixed_labels, batch.lam
        if other is None or lam is None:
            return self.per_image(ours, theirs, labels).mean()
        if self.mixed == "both":
            return (
                lam * self.per_image(ours, theirs, labels)
                + (1 - lam) * self.per_image(ours, theirs, other)
            ).mean()
        halves = torch.minimum(labels, other)
        return self.per_image(
            ours, theirs, torch.where(lam > 0.5, labels, torch.where(lam < 0.5, other, halves))
        ).mean()


@dataclass(frozen=True, kw_only=True)
class NKD(TargetObjective):
    """NKD: the label's class is matched as far as the teacher believes in it, the rest as a
    distribution of its own.

    The authors train ViTs on ImageNet with gamma 1 and T 1, CNNs on ImageNet with 1.5 and 1, CNNs
    on CIFAR-100 with 3.5 and 3, each beside the cross-entropy with the labels.

    Args:
        gamma: the weight of the other classes, 0 or more.
        temperature: T of the other classes, above 0; their term carries T^2. The label's class is
            compared at temperature 1.
    """

    gamma: float = 1.0
    temperature: float = 1.0

    formula: ClassVar[str] = (
        "-p_T[y] log p_S[y] + gamma T^2 cross-entropy of the other classes, batch mean"
    )
    paper: ClassVar[str] = (
        "NKD (Yang et al., ICCV 2023, [2303.13005](https://arxiv.org/abs/2303.13005))"
    )
    use_when: ClassVar[str] = (
        "In place of kd when the images have labels: published 76.68 % against 76.01 % with kd"
        " (DeiT-Ti from DeiT III-S, ImageNet)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factors(target=1.0, gamma=self.gamma)
        check_temperature(self.temperature)

    @property
    def teacher_temperatures(self) -> tuple[float, ...]:
        return tuple({1.0, self.temperature})

    def per_image(
        self,
        student_logits: Float[Tensor, "B C"],
        teacher_logits: Float[Tensor, "B C"],
        labels: Int[Tensor, " B"],
    ) -> Float[Tensor, " B"]:
        return _nkd(student_logits, teacher_logits, labels, self.gamma, self.temperature)
