"""DMAE: hidden states of a pre-trained masked autoencoder, aligned on the visible patches, from a
teacher that stops at the aligned block.

Source: "Masked Autoencoders Enable Efficient Knowledge Distillers", Bai et al., CVPR 2023, arXiv
2208.12256, checked against UCSC-VLAA/DMAE@a0f4959. The authors' code is followed by default: L1
between features that are scaled to unit length first; the paper's formula, as it is transcribed,
has no such scaling (``normalize=False``), which multiplies the term by about the length of a token:
more the wider the teacher. What their code cannot do: it runs the whole teacher and its decoder and
throws them away, takes blocks beyond the depth for no distillation at all, pairs blocks in depth
order whatever order they are given in, and fails with a projection of two layers.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from .base import Labelled, TeacherObjective, describe_alignment
from .masking import random_masking

__all__ = ["DMAE", "DMAEAdapter", "alignment_loss", "random_masking", "three_quarters"]

Distance = Literal["l1", "l2", "smooth_l1"]
Projection = Literal["linear", "mlp", "none"]


def three_quarters(depth: int) -> int:
    """The block at three quarters of the depth, counted from 0: 8 of 12, 17 of 24.

    Source: pretrain.sh of UCSC-VLAA/DMAE@a0f4959.
    """
    return max(3 * depth // 4 - 1, 0)


def alignment_loss(
    student: Float[Tensor, "B T D"],
    teacher: Float[Tensor, "B T D"],
    distance: Distance = "l1",
    normalize: bool = True,
    beta: float = 1.0,
) -> Float[Tensor, ""]:
    """Between projected student and teacher tokens, in float32: mean over batch, tokens and
    channels. No gradient reaches the teacher.

    ``normalize`` scales every token to unit length first. ``l1`` is |d|, ``l2`` d^2, ``smooth_l1``
    d^2 / (2 beta) below ``beta`` and |d| - beta / 2 above. A channel of two tokens of unit length
    differs by 2 at most and by about width^-0.5 as a rule, so that ``smooth_l1`` with a ``beta`` of
    1 is almost always half of ``l2`` there.

    Source: arXiv 2208.12256 eq. 2; UCSC-VLAA/DMAE@a0f4959.

    Example:
        >>> import torch
        >>> alignment_loss(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 5.0]]])).item()
        1.0
    """
    student, teacher = _wide(student), _wide(teacher.detach())
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    if distance == "smooth_l1":
        return F.smooth_l1_loss(student, teacher, beta=beta)
    return F.l1_loss(student, teacher) if distance == "l1" else F.mse_loss(student, teacher)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


class DMAEAdapter(nn.Module):
    """One projection from the student's to the teacher's width for every aligned pair:
    ``projections.0``, ``projections.1``, ...

    Args:
        dims: widths of student and teacher at every pair.
        projection: ``linear``: one layer with bias, in PyTorch's own initialisation; ``mlp``: two,
            with GELU between them.
    """

    def __init__(
        self, dims: list[tuple[int, int]], projection: Literal["linear", "mlp"] = "linear"
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            (
                nn.Linear(ours, its)
                if projection == "linear"
                else nn.Sequential(nn.Linear(ours, its), nn.GELU(), nn.Linear(its, its))
            )
            for ours, its in dims
        )


@dataclass(frozen=True, kw_only=True)
class DMAE(TeacherObjective):
    """Hidden states of one or several pairs of blocks, on the patches both networks see and their
    class tokens.

    The teacher runs to the last aligned block and no further. The terms of several pairs are
    summed.

    Args:
        student_blocks: the student's aligned blocks, counted from 0 (negative: from the end);
            empty: the one at 3/4 of its depth.
        teacher_blocks: the teacher's, one for each of the student's; empty: the one at 3/4 of its
            depth.
        projection: of the student's features to the teacher's width: ``linear``, ``mlp`` or
            ``none`` (widths have to agree).
        distance: ``l1`` as published, ``l2`` (mean squared) or ``smooth_l1``.
        beta: where ``smooth_l1`` turns from squared to absolute. Tokens of unit length differ by
            width^-0.5 a channel as a rule and by 2 at most: a beta well above that gives ``l2`` /
            (2 beta).
        normalize: scale every token to unit length first. null: where there is a projection, as the
            authors' code; the paper's formula does not.
        any_teacher: accept a teacher with a classifier. The paper has none in this place; its
            baseline, a fine-tuned teacher that is distilled while the student is fine-tuned, is 1.2
            points worse.
    """

    student_blocks: tuple[int, ...] = ()
    teacher_blocks: tuple[int, ...] = ()
    projection: Projection = "linear"
    distance: Distance = "l1"
    beta: float = 1.0
    normalize: bool | None = None
    any_teacher: bool = False

    goes_with: ClassVar[tuple[str, ...]] = ("mae", "random_masking")
    formula: ClassVar[str] = (
        "|P(z_student) - z_teacher| at the aligned blocks, mean over channels, tokens and batch,"
        " pairs summed"
    )
    paper: ClassVar[str] = (
        "DMAE (Bai et al., CVPR 2023, [2208.12256](https://arxiv.org/abs/2208.12256))"
    )
    use_when: ClassVar[str] = (
        "The teacher is a pre-trained masked autoencoder, and the student is pre-trained with `mae`"
        " and `random_masking` beside it: labels are not needed, and the teacher costs little,"
        " since it sees few patches and stops early."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            len(self.student_blocks) != len(self.teacher_blocks)
            and self.student_blocks
            and self.teacher_blocks
        ):
            raise ConfigError(
                f"student_blocks names {len(self.student_blocks)} and teacher_blocks"
                f" {len(self.teacher_blocks)}: give pairs"
            )
        if max(len(self.student_blocks), len(self.teacher_blocks)) > 1 and not (
            self.student_blocks and self.teacher_blocks
        ):
            raise ConfigError(
                "several blocks are aligned in pairs: give both student_blocks and teacher_blocks"
            )
        if self.projection not in ("linear", "mlp", "none"):
            raise ConfigError(f"projection is {self.projection!r}: give linear, mlp or none")
        if self.distance not in ("l1", "l2", "smooth_l1"):
            raise ConfigError(f"distance is {self.distance!r}: give l1, l2 or smooth_l1")
        if self.beta != 1.0 and self.distance != "smooth_l1":
            raise ConfigError(
                f"beta is {self.beta:g}, which only the distance smooth_l1 reads: leave it out"
            )
        if not self.beta > 0:
            raise ConfigError(f"beta is {self.beta!r}: give a number above 0")
        if self._normalizes and self.beta >= 2:
            raise ConfigError(
                f"beta is {self.beta:g}, and channels of tokens of unit length differ by 2 at most,"
                f" so that smooth_l1 would be l2 / {2 * self.beta:g}: give a beta below 2,"
                " distance=l2, or normalize=false"
            )

    @property
    def _normalizes(self) -> bool:
        return self.projection != "none" if self.normalize is None else self.normalize

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """The aligned blocks of student and teacher, as they are given."""
        ours = self.student_blocks or (three_quarters(student_depth),)
        its = self.teacher_blocks or (three_quarters(teacher_depth),)
        return list(zip(ours, its, strict=True))

    def student_needs(self, student: Network) -> Needs:
        return Needs(hidden=frozenset(self.student_blocks or (three_quarters(student.depth),)))

    def teacher_needs(self, teacher: Network) -> Needs:
        return Needs(hidden=frozenset(self.teacher_blocks or (three_quarters(teacher.depth),)))

    def check(self, student: Network, teacher: Network | None) -> None:
        assert teacher is not None
        if teacher.num_classes and not self.any_teacher:
            raise ConfigError(
                f"the {teacher.name} ({teacher.architecture}) is a classifier of"
                f" {teacher.num_classes} classes, and DMAE learns from a network pre-trained by"
                " masked autoencoding: give that one, or accept this one (--set"
                " objectives.NAME.any_teacher=true; NAME is the objective's)"
            )
        if self.projection == "none" and student.dims and teacher.dims:
            for ours, its in self._dims(student, teacher):
                if ours != its:
                    raise ConfigError(
                        f"projection is none, but the student is {ours} wide and the {teacher.name}"
                        f" {its}: give linear or mlp"
                    )

    def _dims(self, student: Network, teacher: Network) -> list[tuple[int, int]]:
        """Widths at the pairs; of blocks that do not exist the plan speaks."""
        exist = [
            (ours, its)
            for ours, its in self.pairs(student.depth, teacher.depth)
            if -student.depth <= ours < student.depth and -teacher.depth <= its < teacher.depth
        ]
        return [(student.dims[ours], teacher.dims[its]) for ours, its in exist]

    def adapter(self, student: Network, teacher: Network | None) -> nn.Module | None:
        assert teacher is not None
        return (
            None
            if self.projection == "none"
            else DMAEAdapter(self._dims(student, teacher), self.projection)
        )

    def describe(self, student: Network, teacher: Network | None, num_keep: int | None) -> str:
        assert teacher is not None
        pairs = self.pairs(student.depth, teacher.depth)
        parts = [
            ", ".join(
                f"block {ours} of the student with block {its} of the {teacher.name}"
                for ours, its in pairs
            )
        ]
        if student.has_class_token != teacher.has_class_token:
            parts.append("patches alone: one of the networks has no class token")
        parts.append(describe_alignment(student, teacher, num_keep))
        return ", ".join(part for part in parts if part)

    def loss(
        self,
        student: ViTOutput,
        teacher: ViTOutput | None,
        batch: Labelled,
        adapter: nn.Module | None,
    ) -> Float[Tensor, ""]:
        assert teacher is not None
        terms = []
        for i, (ours, its) in enumerate(self.pairs(student.depth, teacher.depth)):
            places = teacher.patches(its)
            z_student, z_teacher = student.patches(ours).at(places), places.vectors
            if student.has_class_token and teacher.has_class_token:
                z_student = torch.cat(
                    [student.hidden[ours % student.depth][:, :1], z_student], dim=1
                )
                z_teacher = torch.cat(
                    [teacher.hidden[its % teacher.depth][:, :1], z_teacher], dim=1
                )
            if isinstance(adapter, DMAEAdapter):
                z_student = adapter.projections[i](z_student)
            terms.append(
                alignment_loss(z_student, z_teacher, self.distance, self._normalizes, self.beta)
            )
        return torch.stack(terms).sum()
