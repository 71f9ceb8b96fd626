"""Token relations: similarities of the tokens' queries, keys and values in one block.

Source: "TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models", Ren et al., CVPR 2023,
arXiv 2301.01296, checked against OliverRensu/TinyMIM@e41cc2a; relation heads after "MiniLMv2", Wang
et al., ACL Findings 2021, arXiv 2012.15828. What differs: the relations' losses are averaged
(TinyMIM adds them: its weight is 2 here for its two relations); any number of relation heads is
read off any networks (TinyMIM builds the student's last block with as many heads as the teacher
has); unequal grids, registers and teachers that see some of their patches.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..option import option
from ..vit.network import Network
from ..vit.output import ViTOutput
from .attention_maps import BlockObjective, shared_vectors, token_scores
from .base import Scalar, Truth, require
from .kd import kl_rows


def relation_loss(
    student_rows: Float[Tensor, "B L Ws"],
    student_columns: Float[Tensor, "B L Ws"],
    teacher_rows: Float[Tensor, "B L Wt"],
    teacher_columns: Float[Tensor, "B L Wt"],
    num_heads: int,
) -> Scalar:
    """Return KL(R_teacher || R_student) of ``R = softmax(rows columns^T (W / num_heads)^-0.5)``.

    R is taken in each of ``num_heads`` slices of the width W. Summed over columns, mean over the
    batch, relation heads and rows, in float32. No gradient reaches the teacher.

    Rows and columns are two of the queries, keys and values, all heads side by side, of both
    networks at the same tokens; ``num_heads`` divides both widths.
    """
    student = token_scores(student_rows, student_columns, num_heads)
    teacher = token_scores(teacher_rows.detach(), teacher_columns.detach(), num_heads)
    return kl_rows(student.log_softmax(-1), teacher.log_softmax(-1)).mean()


def relation_heads(student_dim: int, teacher_dim: int, teacher_heads: int) -> int:
    """Return the largest number of heads, at most the teacher's, that divides both widths."""
    return max(
        heads
        for heads in range(1, teacher_heads + 1)
        if student_dim % heads == 0 and teacher_dim % heads == 0
    )


@dataclass(frozen=True, kw_only=True)
class Relations(BlockObjective):
    """Token relations of one block: rows of softmax(q k^T), softmax(v v^T) and the like.

    Each row of relations is a softmax over the compared tokens. TinyMIM compares block 17 of a
    ViT-L's 24; MiniLMv2 the relations ``qq``, ``kk`` and ``vv``.
    """

    relations: tuple[str, ...] = option(
        ("qk", "vv"),
        "two letters of q, k and v each: `qk` is attention, `vv` values with values",
    )
    num_heads: int | None = option(
        None,
        "heads into which the queries, keys and values are split anew; divides both widths. null:"
        " as many as the teacher has, or the largest smaller number that divides both",
        at_least=1,
    )

    formula = "KL(teacher || student) of the softmax, mean over relations, heads, rows and batch"
    paper = (
        "TinyMIM (Ren et al., CVPR 2023, arXiv 2301.01296), relation heads of MiniLMv2 (Wang et"
        " al., ACL Findings 2021, arXiv 2012.15828)"
    )
    use_when = "Pre-training without labels from a masked-image-modelling teacher of any width."

    def __post_init__(self) -> None:
        super().__post_init__()
        each = "two letters of q, k and v each, such as qk or vv, and each once"
        names = self.relations
        ok = names and all(len(name) == 2 and set(name) <= set("qkv") for name in names)
        require(ok and len(set(names)) == len(names), "relations", list(names), each)

    def check(self, student: Network, teacher: Network) -> None:
        for network in (student, teacher):
            wanted = f"null, or a divisor of both widths: the {network.name} is {network.dim} wide"
            splits = network.dim % (self.num_heads or 1) == 0
            require(splits, "num_heads", self.num_heads, wanted)

    def loss(self, student: ViTOutput, teacher: ViTOutput, batch: Truth, adapter: None) -> Scalar:
        of_student = student.qkv[self.blocks[0] % student.depth]
        of_teacher = teacher.qkv[self.blocks[1] % teacher.depth]
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
