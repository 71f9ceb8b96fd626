"""Cross-entropy with the ground truth: label smoothing, and the soft labels of mixed images."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from ..method import Labelled, Network, Objective
from ..vit import ViTOutput


def cross_entropy_loss(
    logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"],
    mixed_labels: Int[Tensor, " B"] | None = None,
    lam: Float[Tensor, " B"] | None = None,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in float32, with the smoothed label ``(1 - smoothing) * onehot + smoothing / C``.

    A mixed image has the label ``lam * label + (1 - lam) * mixed_label``, each smoothed, as timm's `Mixup` makes it.
    """
    logits = logits.float()
    if mixed_labels is None or lam is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    first = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    second = F.cross_entropy(logits, mixed_labels, label_smoothing=smoothing, reduction="none")
    return (lam * first + (1 - lam) * second).mean()


def head_logits(output: ViTOutput, head: str) -> Float[Tensor, "B C"]:
    """The logits of one head of a student with a class and a distillation token, or of the prediction (``head="all"``)."""
    if output.head_logits is not None and head != "all":
        return output.head_logits[:, ("class", "distillation").index(head)]
    assert output.logits is not None
    return output.logits


def heads_read(student: Network, head: str, auto: str) -> tuple[str, ...]:
    """The student's heads that ``head`` stands for; ``auto`` names the one it means by itself."""
    chosen = auto if head == "auto" else head
    return student.heads if chosen == "all" or len(student.heads) == 1 else (chosen,)


def check_head(student: Network, head: str) -> None:
    """Raises `ConfigError` when the student does not have the head an objective names."""
    if head != "all" and head != "auto" and (head not in student.heads or len(student.heads) == 1):
        raise ConfigError(f"head={head!r} needs a student with a distillation token: {student.architecture} has one head")


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """Cross-entropy of the student with the ground truth.

    Args:
        smoothing: label smoothing, 0 to below 1.
        head: for students with a distillation token: which head learns from the labels. ``auto``: the class token's, as DeiT trains it.
    """

    smoothing: float = 0.0
    head: Literal["auto", "class", "distillation", "all"] = "auto"

    reads_teacher: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = True
    formula: ClassVar[str] = "cross-entropy with the labels, batch mean"
    paper: ClassVar[str] = "cross-entropy with label smoothing"
    use_when: ClassVar[str] = "Whenever the images have labels; beside every other objective."

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"smoothing is {self.smoothing!r}: give a number from 0 to below 1")

    def check(self, student: Network, teacher: Network | None) -> None:
        check_head(student, self.head)

    def trains_heads(self, student: Network) -> tuple[str, ...]:
        return heads_read(student, self.head, "class")

    def loss(self, student: ViTOutput, teacher: ViTOutput | None, batch: Labelled, adapter: nn.Module | None) -> Float[Tensor, ""]:
        logits = head_logits(student, "class" if self.head == "auto" else self.head)
        return cross_entropy_loss(logits, batch.labels, batch.mixed_labels, batch.lam, self.smoothing)
