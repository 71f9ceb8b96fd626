"""DMAE: align hidden states with a pre-trained masked autoencoder's, on the visible patches.

Source: "Masked Autoencoders Enable Efficient Knowledge Distillers", Bai et al., CVPR 2023, arXiv
2208.12256, checked against UCSC-VLAA/DMAE@a0f4959. The authors' code is followed by default: L1
between features that are scaled to unit length first. The paper's formula, as transcribed, has no
such scaling (``normalize=False``), which multiplies the term by about the length of a token: more
the wider the teacher. What their code does otherwise: it runs the whole teacher and its decoder and
discards the rest, takes blocks beyond the depth for no distillation at all, pairs blocks in depth
order whatever order they are given in, and fails with a projection of two layers. Here the teacher
stops at the last aligned block.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from .base import TeacherObjective, Truth, describe_alignment, require
from .masking import random_masking

__all__ = ["DMAE", "DMAEAdapter", "alignment_loss", "random_masking", "three_quarters"]

Distance = Literal["l1", "l2", "smooth_l1"]
Projection = Literal["linear", "mlp", "none"]


def three_quarters(depth: int) -> int:
    """Return the block at three quarters of the depth, counted from 0: 8 of 12, 17 of 24.

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
    """Compare projected student and teacher tokens, in float32: mean over batch, tokens, channels.

    No gradient reaches the teacher. ``normalize`` scales every token to unit length first. ``l1``
    is |d|, ``l2`` d^2, ``smooth_l1`` d^2 / (2 beta) below ``beta`` and |d| - beta / 2 above. Tokens
    of unit length differ by 2 a channel at most and by about width^-0.5 as a rule, so ``smooth_l1``
    with a ``beta`` of 1 is almost always half of ``l2`` there.

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
    """A projection to the teacher's width for every aligned pair: ``projections.0``, ...

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
            nn.Linear(dim, to)
            if projection == "linear"
            else nn.Sequential(nn.Linear(dim, to), nn.GELU(), nn.Linear(to, to))
            for dim, to in dims
        )


@dataclass(frozen=True, kw_only=True)
class DMAE(TeacherObjective):
    """Hidden states of pairs of blocks, on the patches both networks see and their class tokens.

    The teacher runs to the last aligned block and no further. The terms of pairs are summed.

    Args:
        student_blocks: the student's aligned blocks, counted from 0 (negative: from the end);
            empty: the one at 3/4 of its depth.
        teacher_blocks: the teacher's, one for each of the student's; empty: the one at 3/4 of its
            depth.
        projection: of the student's features to the teacher's width: ``linear``, ``mlp`` or
            ``none`` (widths have to agree).
        distance: ``l1`` as published, ``l2`` (mean squared) or ``smooth_l1``.
        beta: where ``smooth_l1`` turns from squared to absolute. Tokens of unit length differ by
            width^-0.5 a channel as a rule: a beta well above that gives ``l2`` / (2 beta).
        normalize: scale every token to unit length first. None: if there is a projection, as the
            authors' code; the paper's formula does not.
        any_teacher: accept a teacher with a classifier. The paper uses none here; its baseline, a
            fine-tuned teacher distilled while the student is fine-tuned, is 1.2 points worse.
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
        blocks = self.student_blocks, self.teacher_blocks
        counts = {len(given) for given in blocks}
        pairs = len(counts) == 1 or counts == {0, 1}
        require(pairs, "teacher_blocks", blocks[1], f"one for each student block {blocks[0]}")
        ok = self.projection in get_args(Projection)
        require(ok, "projection", self.projection, "linear, mlp or none")
        require(
            self.distance in get_args(Distance), "distance", self.distance, "l1, l2 or smooth_l1"
        )
        require(self.beta > 0, "beta", self.beta, "a number above 0")
        if self.beta != 1.0 and self.distance != "smooth_l1":
            raise ConfigError(
                f"beta is {self.beta:g}, which only the distance smooth_l1 reads",
                fix="leave beta out",
                field="beta",
            )
        if self._normalizes and self.beta >= 2:
            raise ConfigError(
                f"beta is {self.beta:g}, and channels of tokens of unit length differ by 2 at most,"
                f" so smooth_l1 would be l2 / {2 * self.beta:g}",
                fix=("give a beta below 2", "take the distance l2", "set normalize to false"),
                field="beta",
            )

    @property
    def _normalizes(self) -> bool:
        return self.projection != "none" if self.normalize is None else self.normalize

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return the aligned blocks of student and teacher, as they are given."""
        of_student = self.student_blocks or (three_quarters(student_depth),)
        of_teacher = self.teacher_blocks or (three_quarters(teacher_depth),)
        return list(zip(of_student, of_teacher, strict=True))

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
                " masked autoencoding",
                fix=("give that one", "accept this one by the objective's any_teacher"),
                field="any_teacher",
            )
        if self.projection == "none" and student.dims and teacher.dims:
            for dim, to in self._dims(student, teacher):
                wanted = f"linear or mlp: the student is {dim} wide and the {teacher.name} {to}"
                require(dim == to, "projection", self.projection, wanted)

    def _dims(self, student: Network, teacher: Network) -> list[tuple[int, int]]:
        """Return the widths at the pairs; the plan refuses blocks that do not exist."""
        return [
            (student.dims[i], teacher.dims[j])
            for i, j in self.pairs(student.depth, teacher.depth)
            if -student.depth <= i < student.depth and -teacher.depth <= j < teacher.depth
        ]

    def adapter(self, student: Network, teacher: Network | None) -> nn.Module | None:
        assert teacher is not None
        if self.projection == "none":
            return None
        return DMAEAdapter(self._dims(student, teacher), self.projection)

    def describe(self, student: Network, teacher: Network | None, num_keep: int | None) -> str:
        assert teacher is not None
        pairs = self.pairs(student.depth, teacher.depth)
        parts = [f"block {i} of the student with block {j} of the {teacher.name}" for i, j in pairs]
        if student.has_class_token != teacher.has_class_token:
            parts.append("patches alone: one of the networks has no class token")
        parts.append(describe_alignment(student, teacher, num_keep))
        return ", ".join(part for part in parts if part)

    def loss(
        self, student: ViTOutput, teacher: ViTOutput | None, batch: Truth, adapter: nn.Module | None
    ) -> Float[Tensor, ""]:
        assert teacher is not None
        terms = []
        for n, (i, j) in enumerate(self.pairs(student.depth, teacher.depth)):
            places = teacher.patches(j)
            z_student, z_teacher = student.patches(i).at(places), places.vectors
            if student.has_class_token and teacher.has_class_token:
                of_student = student.hidden[i % student.depth]
                of_teacher = teacher.hidden[j % teacher.depth]
                z_student = torch.cat([of_student[:, :1], z_student], dim=1)
                z_teacher = torch.cat([of_teacher[:, :1], z_teacher], dim=1)
            if isinstance(adapter, DMAEAdapter):
                z_student = adapter.projections[n](z_student)
            terms.append(
                alignment_loss(z_student, z_teacher, self.distance, self._normalizes, self.beta)
            )
        return torch.stack(terms).sum()
