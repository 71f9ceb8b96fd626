"""Logit distillation: soft (Hinton et al., arXiv 1503.02531) and hard (DeiT, arXiv 2012.12877)."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, Set
from ..option import option
from ..vit.network import Network
from ..vit.output import ViTOutput
from .base import Scalar, TeacherObjective, Truth
from .cross_entropy import head_logits, heads_read

Logits = Float[Tensor, "B C"]


def kd_loss(student_logits: Logits, teacher_logits: Logits, temperature: float = 1.0) -> Scalar:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, in float32.

    Summed over classes, mean over the batch. No gradient reaches the teacher.

    Source: arXiv 1503.02531; effl-lab/MaskedKD@96d052d (``batchmean``).
    """
    check_logits(student_logits, teacher_logits, temperature)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def standardize(logits: Logits) -> Logits:
    """Return ``(v - mean(v)) / (std(v) + 1e-7)`` of each image's logits, in float32.

    Mean and (unbiased) standard deviation are over the classes, so a student need only match the
    order and proportions of its teacher's logits, not their scale. Equal logits become 0.

    Source: "Logit Standardization in Knowledge Distillation", Sun et al., CVPR 2024, arXiv
        2403.01427, eq. 9 and algorithm 1; sunshangquan/logit-standardization-KD@f6e5aa5.
    """
    centred = logits.float() - logits.float().mean(-1, keepdim=True)
    # At equal logits its gradient is 0, and that of a standard deviation NaN.
    length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return centred / (length / (logits.shape[-1] - 1) ** 0.5 + 1e-7)


def kl_rows(
    student: Float[Tensor, "*rows L"], teacher: Float[Tensor, "*rows L"]
) -> Float[Tensor, "*rows"]:
    """Return KL(teacher || student) of each row of log-probabilities."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def check_logits(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
    """Raise `ValueError` for logits of unequal shapes, or a temperature that is not above 0."""
    if student_logits.shape != teacher_logits.shape:  # they would broadcast silently
        shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
        raise ValueError(f"the shapes of the student's and the teacher's logits differ: {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}: it has to be above 0")


@dataclass(frozen=True, kw_only=True)
class LogitObjective(TeacherObjective):
    """An objective that compares the logits of a student's head with the teacher's, by class."""

    head: str = option(
        "auto",
        "student head to compare; `all`: the prediction; `auto`: the head named like the teacher,"
        " or else the distillation token's",
    )
    standardize: bool = option(
        False, "standardise each image's logits to mean 0 and deviation 1; published with T 2"
    )

    # The temperatures T at which `compare` reads the softmax of the teacher's logits; as
    # `teacher_temperatures`.
    reads_at: ClassVar[tuple[float, ...] | None] = None

    @property
    def teacher_temperatures(self) -> tuple[float, ...] | None:
        # Mean and deviation need the logits of all classes; the order does not change.
        return None if self.standardize and self.reads_at else self.reads_at

    def check(self, student: Network, teacher: Network) -> None:
        if teacher.num_classes != student.num_classes:
            counts = f"{teacher.num_classes} classes and the student with {student.num_classes}"
            what = (
                f"the {teacher.name} answers with {counts}, and logits are compared class by class"
            )
            fixes = "give a teacher of these classes", "compare features, as vitkd does"
            raise ConfigError(what, fixes, field=f"teachers.{self.teacher}.model")
        if self.standardize and student.num_classes <= 2:
            what = "standardised logits of two classes are the same whatever a teacher says"
            raise ConfigError(what, Set("standardize", False))

    def describe(self, student: Network, teacher: Network, num_keep: int | None) -> str:
        free = "of standardised logits, which leaves the scale of the student's free"
        return free if self.standardize else ""

    def trains_heads(self, student: Network) -> tuple[str, ...]:
        return heads_read(student, self.head, self.teacher)

    @abstractmethod
    def compare(self, student: Logits, teacher: Logits, batch: Truth) -> Scalar:
        """Return the loss of the student head's logits against the teacher's."""

    def loss(self, student: ViTOutput, teacher: ViTOutput, batch: Truth, adapter: None) -> Scalar:
        assert teacher.logits is not None
        logits = head_logits(student, self.head, self.teacher), teacher.logits
        if self.standardize:
            logits = standardize(logits[0]), standardize(logits[1])
        return self.compare(*logits, batch)


@dataclass(frozen=True, kw_only=True)
class SoftLogitObjective(LogitObjective):
    """One that reads the teacher's softmax at a temperature."""

    temperature: float = option(1.0, "T; the loss carries T^2", above=0)

    @property
    def reads_at(self) -> tuple[float, ...]:  # type: ignore[override]
        return (self.temperature,)


@dataclass(frozen=True, kw_only=True)
class SoftKD(SoftLogitObjective):
    """Soft logit distillation. DeiT's T is 1, timm's default 4."""

    formula = "T^2 KL(teacher || student) of the logits, summed over classes, batch mean"
    paper = "KD (Hinton et al., 2015, arXiv 1503.02531)"
    use_when = "The baseline to beat: no labels needed, nothing to tune but the temperature."

    def compare(self, student: Logits, teacher: Logits, batch: Truth) -> Scalar:
        return kd_loss(student, teacher, self.temperature)


@dataclass(frozen=True, kw_only=True)
class HardKD(LogitObjective):
    """Hard distillation: cross-entropy with the teacher's top class."""

    reads_at = ()
    formula = "cross-entropy with the teacher's top class, batch mean"
    paper = "hard distillation (DeiT, Touvron et al., ICML 2021, arXiv 2012.12877)"
    use_when = "With a distillation token, or a teacher whose probabilities are not to be trusted."

    def compare(self, student: Logits, teacher: Logits, batch: Truth) -> Scalar:
        return F.cross_entropy(student.float(), teacher.argmax(-1))
