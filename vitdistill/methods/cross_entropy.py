"""Cross-entropy with the ground truth: label smoothing, and the soft labels of mixed images."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError, Set
from ..messages import suggest
from ..option import option
from ..vit.network import Network
from ..vit.output import ViTOutput
from .base import Objective, Scalar, Truth


def cross_entropy_loss(
    logits: Float[Tensor, "B C"],
    labels: Int[Tensor, " B"],
    mixed_labels: Int[Tensor, " B"] | None = None,
    lam: Float[Tensor, " B"] | None = None,
    smoothing: float = 0.0,
) -> Scalar:
    """Return the mean cross-entropy with smoothed labels, in float32.

    A smoothed label is ``(1 - smoothing) * onehot + smoothing / C``. A mixed image has the label
    ``lam * label + (1 - lam) * mixed_label``, each smoothed, as timm's `Mixup` makes it.
    """
    logits = logits.float()
    if mixed_labels is None or lam is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    first = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    second = F.cross_entropy(logits, mixed_labels, label_smoothing=smoothing, reduction="none")
    return (lam * first + (1 - lam) * second).mean()


def chosen_head(
    heads: tuple[str, ...], head: str, teacher: str | None = None, student: str = "the student"
) -> str:
    """Return the head that ``head`` stands for: one of ``heads``, or ``all`` for the prediction.

    ``auto`` is the only head there is; otherwise ``class`` for the labels (no ``teacher``), and for
    a teacher the head named like it, or else ``distillation``.

    Raises:
        ConfigError: the student has no such head, or none that ``auto`` could mean.
    """
    if head == "all" or head in heads:
        return head
    if head != "auto":
        what = f"{student} has no head called {head!r}"
        raise ConfigError(what, suggest(head, (*heads, "all", "auto")), field="head")
    if len(heads) == 1:
        return heads[0]
    for name in ("class",) if teacher is None else (teacher, "distillation"):
        if name in heads:
            return name
    what = f"{student} has the heads {', '.join(heads)}, and none for the teacher {teacher!r}"
    fix = "name the teacher after the head that learns from it", Set("head", heads[-1])
    raise ConfigError(what, fix, field="head")


def head_logits(output: ViTOutput, head: str, teacher: str | None = None) -> Float[Tensor, "B C"]:
    """Return the logits of the head of `chosen_head`, or (``all``, single heads) the prediction."""
    chosen = chosen_head(output.heads, head, teacher)
    if output.head_logits is not None and chosen != "all":
        return output.head_logits[:, output.heads.index(chosen)]
    assert output.logits is not None
    return output.logits


def heads_read(student: Network, head: str, teacher: str | None = None) -> tuple[str, ...]:
    """Return the student's heads that ``head`` stands for; raise as `chosen_head` does."""
    chosen = chosen_head(student.heads, head, teacher, student.architecture)
    return student.heads if chosen == "all" else (chosen,)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """Cross-entropy of the student with the ground truth."""

    smoothing: float = option(0.0, "label smoothing", at_least=0, below=1)
    head: str = option(
        "auto",
        "head that learns from the labels; `all`: the prediction; `auto`: the class token's head",
    )

    reads_teacher: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = True
    formula = "cross-entropy with the labels, batch mean"
    paper = "cross-entropy with label smoothing"
    use_when = "Whenever the images have labels; beside every other objective."

    def trains_heads(self, student: Network) -> tuple[str, ...]:
        return heads_read(student, self.head)

    def loss(self, student: ViTOutput, teacher: None, batch: Truth, adapter: None) -> Scalar:
        logits = head_logits(student, self.head)
        return cross_entropy_loss(
            logits, batch.labels, batch.mixed_labels, batch.lam, self.smoothing
        )
