"""DMAE: align hidden states with a pre-trained masked autoencoder's, on the visible patches.

Source: "Masked Autoencoders Enable Efficient Knowledge Distillers", Bai et al., CVPR 2023, arXiv
2208.12256, checked against UCSC-VLAA/DMAE@a0f4959. The authors' code is followed by default: L1
between features that are scaled to unit length first. The paper's formula, as transcribed, has no
such scaling (``normalize=False``), which multiplies the term by about the length of a token: more
the wider the teacher. Their code runs the whole teacher and its decoder, and pairs blocks in depth
order whatever order they are given in; here the teacher stops at the last aligned block.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, Set
from ..option import option
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from .base import Scalar, TeacherObjective, Truth, require
from .masking import random_masking as random_masking

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
) -> Scalar:
    """Compare projected student and teacher tokens, in float32: mean over batch, tokens, channels.

    No gradient reaches the teacher. ``normalize`` scales every token to unit length first. ``l1``
    is |d|, ``l2`` d^2, ``smooth_l1`` d^2 / (2 beta) below ``beta`` and |d| - beta / 2 above. Tokens
    of unit length differ by about width^-0.5 a channel, far below a ``beta`` of 1.

    Source: eq. 2 of the paper.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.detach().to(wide)
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    if distance == "smooth_l1":
        return F.smooth_l1_loss(student, teacher, beta=beta)
    return F.l1_loss(student, teacher) if distance == "l1" else F.mse_loss(student, teacher)


class DMAEAdapter(nn.Module):
    """A projection to the teacher's width for every aligned pair: ``projections.0``, ..."""

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
    """

    student_blocks: tuple[int, ...] = option((), "aligned blocks; empty: at 3/4 of the depth")
    teacher_blocks: tuple[int, ...] = option((), "the teacher's; empty: at 3/4 of its depth")
    projection: Projection = option("linear", "to the teacher's width; `none`: they have to agree")
    distance: Distance = option("l1", "`l1` as published, `l2` (mean squared) or `smooth_l1`")
    beta: float = option(1.0, "where `smooth_l1` turns from squared to absolute", above=0)
    normalize: bool | None = option(
        None, "scale tokens to unit length (in the code, not in the paper); null: if projected"
    )
    any_teacher: bool = option(
        False,
        "accept a teacher with a classifier, from which the paper's result is 1.2 points less",
    )

    goes_with = ("mae", "random_masking")
    formula = "|P(z_student) - z_teacher| at the aligned blocks, mean over channels, tokens, batch"
    paper = "DMAE (Bai et al., CVPR 2023, arXiv 2208.12256)"
    use_when = (
        "Pre-training without labels from a masked autoencoder, which costs little: it sees few"
        " patches and stops early."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        student, teacher = self.student_blocks, self.teacher_blocks
        pairs = len(student) == len(teacher) or {len(student), len(teacher)} == {0, 1}
        require(pairs, "teacher_blocks", teacher, f"one for each student block {student}")
        wanted = "the distance smooth_l1 with it, which alone reads it"
        require(self.beta == 1.0 or self.distance == "smooth_l1", "beta", self.beta, wanted)

    @property
    def _normalizes(self) -> bool:
        return self.projection != "none" if self.normalize is None else self.normalize

    def pairs(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return the aligned blocks of student and teacher, as they are given."""
        of_student = self.student_blocks or (three_quarters(student_depth),)
        of_teacher = self.teacher_blocks or (three_quarters(teacher_depth),)
        return list(zip(of_student, of_teacher, strict=True))

    def student_needs(self, student: Network) -> Needs:
        return Needs(hidden=frozenset(i for i, _ in self.pairs(student.depth, 0)))

    def teacher_needs(self, teacher: Network) -> Needs:
        return Needs(hidden=frozenset(j for _, j in self.pairs(0, teacher.depth)))

    def check(self, student: Network, teacher: Network) -> None:
        if teacher.num_classes and not self.any_teacher:
            what = f"the {teacher.name} ({teacher.architecture}) has a classifier"
            fix = "give one pre-trained by masked autoencoding", Set("any_teacher", True)
            raise ConfigError(f"{what}, and DMAE learns from features", fix, field="any_teacher")
        for dim, to in self._dims(student, teacher):
            wanted = f"linear or mlp: the student is {dim} wide and the {teacher.name} {to}"
            require(self.projection != "none" or dim == to, "projection", "none", wanted)

    def _dims(self, student: Network, teacher: Network) -> list[tuple[int, int]]:
        pairs = self.pairs(student.depth, teacher.depth)
        return [(student.dims[i], teacher.dims[j]) for i, j in pairs]

    def adapter(self, student: Network, teacher: Network) -> DMAEAdapter | None:
        if self.projection == "none":
            return None
        return DMAEAdapter(self._dims(student, teacher), self.projection)

    def describe(self, student: Network, teacher: Network, num_keep: int | None) -> str:
        pairs = self.pairs(student.depth, teacher.depth)
        return ", ".join(f"block {i} with the {teacher.name}'s block {j}" for i, j in pairs)

    def loss(
        self, student: ViTOutput, teacher: ViTOutput, batch: Truth, adapter: DMAEAdapter | None
    ) -> Scalar:
        terms = []
        for n, (i, j) in enumerate(self.pairs(student.depth, teacher.depth)):
            places = teacher.patches(j)
            z_student, z_teacher = student.patches(i).at(places), places.vectors
            of_student, of_teacher = student.class_token(i), teacher.class_token(j)
            if of_student is not None and of_teacher is not None:
                z_student = torch.cat([of_student, z_student], dim=1)
                z_teacher = torch.cat([of_teacher, z_teacher], dim=1)
            if adapter is not None:
                z_student = adapter.projections[n](z_student)
            terms.append(
                alignment_loss(z_student, z_teacher, self.distance, self._normalizes, self.beta)
            )
        return torch.stack(terms).sum()
