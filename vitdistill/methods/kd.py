"""Logit distillation: soft (Hinton et al., arXiv 1503.02531) and hard (DeiT, arXiv 2012.12877)."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..vit.network import Network
from ..vit.output import ViTOutput
from .base import TeacherObjective, Truth, require
from .cross_entropy import head_logits, heads_read


def kd_loss(
    student_logits: Float[Tensor, "B C"],
    teacher_logits: Float[Tensor, "B C"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, in float32.

    Summed over classes, mean over the batch. No gradient reaches the teacher.

    Raises:
        ValueError: the shapes differ, or ``temperature`` is not above 0.

    Source: arXiv 1503.02531; arXiv 2302.10494 eq. of the KD term, checked against
    effl-lab/MaskedKD@96d052d (``batchmean``).

    Example:
        >>> import torch
        >>> kd_loss(torch.zeros(2, 3), torch.zeros(2, 3)).item()
        0.0
    """
    check_logits(student_logits, teacher_logits, temperature)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def check_logits(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    """Raise `ValueError` for logits of unequal shapes, or a temperature that is not above 0."""
    if student_logits.shape != teacher_logits.shape:  # they would broadcast silently
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits"
            f" {tuple(teacher_logits.shape)} differ"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}: it has to be above 0")


def check_temperature(temperature: float) -> None:
    """Raise `ConfigError` for a temperature that is not a finite number above 0."""
    require(0 < temperature < math.inf, "temperature", temperature, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class LogitObjective(TeacherObjective):
    """An objective that compares the logits of a student's head with the teacher's, class by class.

    Args:
        head: for students with several heads: the name of the one that learns from the teacher, or
            ``all``: their prediction. ``auto``: the head named like the teacher, or else the
            distillation token's.
    """

    head: str = "auto"

    def check(self, student: Network, teacher: Network | None) -> None:
        heads_read(student, self.head, self.teacher)
        if teacher is not None and teacher.num_classes != student.num_classes:
            raise ConfigError(
                f"the {teacher.name} answers with {teacher.num_classes} classes and the student"
                f" with {student.num_classes}: logits can only be compared class by class",
                field=f"teachers.{self.teacher}.model",
            )

    def trains_heads(self, student: Network) -> tuple[str, ...]:
        return heads_read(student, self.head, self.teacher)

    @abstractmethod
    def compare(
        self, student: Float[Tensor, "B C"], teacher: Float[Tensor, "B C"], batch: Truth
    ) -> Float[Tensor, ""]:
        """Return the loss of the student head's logits against the teacher's."""

    def loss(
        self, student: ViTOutput, teacher: ViTOutput | None, batch: Truth, adapter: nn.Module | None
    ) -> Float[Tensor, ""]:
        assert teacher is not None and teacher.logits is not None
        return self.compare(head_logits(student, self.head, self.teacher), teacher.logits, batch)


@dataclass(frozen=True, kw_only=True)
class SoftKD(LogitObjective):
    """Soft logit distillation.

    Args:
        temperature: T, above 0; the loss carries T^2, so that its gradient does not shrink with T.
            DeiT uses 1, timm's default is 4.
    """

    temperature: float = 1.0

    formula: ClassVar[str] = (
        "T^2 KL(teacher || student) of the logits, summed over classes, batch mean"
    )
    paper: ClassVar[str] = (
        "KD (Hinton et al., 2015, [1503.02531](https://arxiv.org/abs/1503.02531))"
    )
    use_when: ClassVar[str] = (
        "The baseline to beat: no labels needed, nothing to tune but the temperature."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)

    @property
    def teacher_temperatures(self) -> tuple[float, ...]:
        return (self.temperature,)

    def compare(
        self, student: Float[Tensor, "B C"], teacher: Float[Tensor, "B C"], batch: Truth
    ) -> Float[Tensor, ""]:
        return kd_loss(student, teacher, self.temperature)


@dataclass(frozen=True, kw_only=True)
class HardKD(LogitObjective):
    """Hard distillation: cross-entropy with the teacher's top class."""

    formula: ClassVar[str] = "cross-entropy with the teacher's top class, batch mean"
    paper: ClassVar[str] = (
        "hard distillation (DeiT, Touvron et al., ICML 2021,"
        " [2012.12877](https://arxiv.org/abs/2012.12877))"
    )
    use_when: ClassVar[str] = (
        "With a distillation token, or a convolutional teacher whose probabilities are not to be"
        " trusted."
    )

    @property
    def teacher_temperatures(self) -> tuple[float, ...]:
        return ()

    def compare(
        self, student: Float[Tensor, "B C"], teacher: Float[Tensor, "B C"], batch: Truth
    ) -> Float[Tensor, ""]:
        return F.cross_entropy(student.float(), teacher.argmax(-1))
