"""Token relations: similarities of the tokens' queries, keys and values in one block.

Source: "TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models", Ren et al., CVPR 2023,
arXiv 2301.01296, checked against OliverRensu/TinyMIM@e41cc2a; relation heads after "MiniLMv2", Wang
et al., ACL Findings 2021, arXiv 2012.15828. What differs: the relations' losses are averaged
(TinyMIM adds them: its weight is 2 here for its two relations); any number of relation heads is
read off any networks (TinyMIM builds the student's last block with as many heads as the teacher
has); unequal grids, registers and teachers that see some of their patches; logarithms of the
softmax are exact.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from .attention_maps import rows_kl, shared_vectors, token_scores
from .base import TeacherObjective, Truth, describe_alignment, require


def relation_loss(
    student_rows: Float[Tensor, "B L Ws"],
    student_columns: Float[Tensor, "B L Ws"],
    teacher_rows: Float[Tensor, "B L Wt"],
    teacher_columns: Float[Tensor, "B L Wt"],
    num_heads: int,
) -> Float[Tensor, ""]:
    """Return KL(R_teacher || R_student) of ``R = softmax(rows columns^T (W / num_heads)^-0.5)``.

    R is taken in each of ``num_heads`` slices of the width W. Summed over columns, mean over the
    batch, relation heads and rows, in float32. No gradient reaches the teacher.

    Args:
        student_rows, student_columns: two of the student's queries, keys and values, all heads side
            by side.
        teacher_rows, teacher_columns: the same two of the teacher, at the same tokens.
        num_heads: divides both widths.

    Source: arXiv 2012.15828 eq. 5 to 7; arXiv 2301.01296 eq. of the token relation;
    OliverRensu/TinyMIM@e41cc2a.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> round(relation_loss(tokens, tokens, tokens, tokens, 1).item(), 6)
        0.0
    """
    student = token_scores(student_rows, student_columns, num_heads)
    teacher = token_scores(teacher_rows.detach(), teacher_columns.detach(), num_heads)
    return rows_kl(student.log_softmax(-1), teacher.log_softmax(-1))


def relation_heads(student_dim: int, teacher_dim: int, teacher_heads: int) -> int:
    """Return the largest number of heads, at most the teacher's, that divides both widths.

    Example:
        >>> relation_heads(192, 768, 12), relation_heads(192, 1280, 20)
        (12, 16)
    """
    return max(
        heads
        for heads in range(1, teacher_heads + 1)
        if student_dim % heads == 0 and teacher_dim % heads == 0
    )


@dataclass(frozen=True, kw_only=True)
class Relations(TeacherObjective):
    """Token relations of one block: rows of softmax(q k^T), softmax(v v^T) and the like.

    Compared are the class token, if both networks have one, and the patches both saw; each row of
    relations is a softmax over them.

    Args:
        block: the student's block; negative counts from the end.
        teacher_block: the teacher's; None: the same number. TinyMIM takes block 17 of a ViT-L's 24.
        relations: what is related with what, two letters of q, k and v each: ``qk`` is attention,
            ``vv`` values with values. MiniLMv2 takes ``qq``, ``kk`` and ``vv``.
        num_heads: relation heads, into which the queries, keys and values of all heads are split
            anew; divides both widths. None: as many as the teacher has, or the largest smaller
            number that divides both widths.
    """

    block: int = -1
    teacher_block: int | None = None
    relations: tuple[str, ...] = ("qk", "vv")
    num_heads: int | None = None

    formula: ClassVar[str] = (
        "KL(teacher || student) of the relations' softmax, mean over relations, relation heads,"
        " rows and batch"
    )
    paper: ClassVar[str] = (
        "TinyMIM (Ren et al., CVPR 2023, [2301.01296](https://arxiv.org/abs/2301.01296)), relation"
        " heads of MiniLMv2 (Wang et al., ACL Findings 2021,"
        " [2012.15828](https://arxiv.org/abs/2012.15828))"
    )
    use_when: ClassVar[str] = (
        "The student is pre-trained without labels from a masked-image-modelling teacher of any"
        " width; fine-tune it afterwards."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        each = "two letters of q, k and v each, such as qk or vv, and each once"
        names = self.relations
        ok = names and all(len(name) == 2 and set(name) <= set("qkv") for name in names)
        require(bool(ok) and len(set(names)) == len(names), "relations", list(names), each)
        ok = self.num_heads is None or self.num_heads >= 1
        require(ok, "num_heads", self.num_heads, "the number of relation heads, or null")

    @property
    def _teacher_block(self) -> int:
        return self.block if self.teacher_block is None else self.teacher_block

    def student_needs(self, student: Network) -> Needs:
        return Needs(qkv=frozenset({self.block}))

    def teacher_needs(self, teacher: Network) -> Needs:
        return Needs(qkv=frozenset({self._teacher_block}))

    def check(self, student: Network, teacher: Network | None) -> None:
        for network in (student, teacher):
            if self.num_heads is not None and network is not None and network.dim % self.num_heads:
                raise ConfigError(
                    f"the {network.name} is {network.dim} wide, which does not split into"
                    f" {self.num_heads} relation heads",
                    fix="give a num_heads that divides both widths, or null",
                    field="num_heads",
                )

    def describe(self, student: Network, teacher: Network | None, num_keep: int | None) -> str:
        assert teacher is not None
        count = self.num_heads or relation_heads(
            student.dim, teacher.dim, max(teacher.num_heads, 1)
        )
        parts = [
            f"{' and '.join(self.relations)} in {count} relation heads",
            describe_alignment(student, teacher, num_keep),
        ]
        return ", ".join(part for part in parts if part)

    def loss(
        self, student: ViTOutput, teacher: ViTOutput | None, batch: Truth, adapter: nn.Module | None
    ) -> Float[Tensor, ""]:
        assert teacher is not None
        of_student = student.qkv[self.block % student.depth]
        of_teacher = teacher.qkv[self._teacher_block % teacher.depth]
        pairs = {
            part: shared_vectors(
                student, teacher, getattr(of_student, part), getattr(of_teacher, part)
            )
            for part in sorted(set("".join(self.relations)))
        }
        width, teacher_width = (vectors.shape[2] for vectors in next(iter(pairs.values())))
        count = self.num_heads or relation_heads(width, teacher_width, of_teacher.q.shape[1])
        losses = []
        for relation in self.relations:
            (rows, teacher_rows), (columns, teacher_columns) = (pairs[part] for part in relation)
            losses.append(relation_loss(rows, columns, teacher_rows, teacher_columns, count))
        return torch.stack(losses).mean()
