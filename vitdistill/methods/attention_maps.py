"""Attention distillation: the class token's row (AttnDistill) or every row (MAE-Lite).

Source: "Attention Distillation: self-supervised vision transformer students need more guidance",
Wang et al., BMVC 2022, arXiv 2210.00944, checked against wangkai930418/attndistill@b6ca113; "A
Closer Look at Self-Supervised Lightweight Vision Transformers", Wang et al., ICML 2023, arXiv
2205.14443, checked against wangsr126/MAE-Lite@5bf439a.

What differs from AttnDistill's code: the loss is a mean over heads (theirs a sum, at weight 0.1:
with H heads their weight is 0.1 H here); the student's row is resampled to the teacher's patches,
bilinear (theirs the other way round, bicubic); unequal heads meet as means of the probabilities
(theirs as the normalised product of all heads, at temperature 10); probabilities are clamped at
1e-12 (theirs at 1e-5); its loss on the class token is the objective `tokens`. From MAE-Lite's:
unequal heads meet as means (theirs through a trained 1x1 map).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..option import option
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import PatchMap, full_precision, gather_patches, resample_patches
from .base import Scalar, TeacherObjective, Truth
from .kd import kl_rows

SMALLEST = 1e-12  # of probabilities, so that their logarithm is finite

Divergence = Literal["kl", "mse"]


def shared_vectors(
    student: ViTOutput,
    teacher: ViTOutput,
    of_student: Float[Tensor, "B Hs Ls ds"],
    of_teacher: Float[Tensor, "B Ht Lt dt"],
) -> tuple[Float[Tensor, "B L Ws"], Float[Tensor, "B L Wt"]]:
    """Return vectors of both networks at the compared tokens, heads side by side, in float32.

    No gradient reaches the teacher.
    """
    tokens = of_student.float().transpose(1, 2).flatten(2)
    target = of_teacher.detach().float().transpose(1, 2).flatten(2)
    places = PatchMap(target[:, teacher.num_prefix_tokens :], teacher.grid, teacher.keep)
    whole = PatchMap(tokens[:, student.num_prefix_tokens :], student.grid, student.keep)
    patches = whole.at(places)
    if not (student.has_class_token and teacher.has_class_token):
        return patches, places.vectors
    return (
        torch.cat([tokens[:, :1], patches], dim=1),
        torch.cat([target[:, :1], places.vectors], dim=1),
    )


def shared_rows(
    student: ViTOutput,
    teacher: ViTOutput,
    of_student: Float[Tensor, "B Hs Ls"],
    of_teacher: Float[Tensor, "B Ht Lt"],
) -> tuple[Float[Tensor, "B Hs L"], Float[Tensor, "B Ht L"]]:
    """Return each network's row of attention over the compared tokens, summing to 1.

    Resampling to another grid keeps the patches' total.
    """
    row, target = of_student.float(), of_teacher.detach().float()
    patches = row[:, :, student.num_prefix_tokens :]
    if student.grid != teacher.grid:
        moved = resample_patches(patches.transpose(1, 2), student.grid, teacher.grid)
        moved = moved.transpose(1, 2)
        total = patches.sum(-1, keepdim=True)
        patches = moved * (total / moved.sum(-1, keepdim=True).clamp_min(SMALLEST))
    if student.keep is None:
        patches = gather_patches(patches.transpose(1, 2), teacher.keep).transpose(1, 2)
    target_patches = target[:, :, teacher.num_prefix_tokens :]
    if student.has_class_token and teacher.has_class_token:
        patches = torch.cat([row[:, :, :1], patches], -1)
        target_patches = torch.cat([target[:, :, :1], target_patches], -1)
    return _normalised(patches), _normalised(target_patches)


def _normalised(rows: Tensor) -> Tensor:
    return rows / rows.sum(-1, keepdim=True).clamp_min(SMALLEST)


def token_scores(
    rows: Float[Tensor, "B L W"], columns: Float[Tensor, "B L W"], num_heads: int
) -> Float[Tensor, "B H L L"]:
    """Return ``rows columns^T d^-0.5`` in each of ``num_heads`` slices of width d, in float32."""
    q, k = (
        vectors.float().unflatten(2, (num_heads, -1)).transpose(1, 2) for vectors in (rows, columns)
    )
    with full_precision(rows):
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


def class_attention_loss(
    student: Float[Tensor, "B Hs L"],
    teacher: Float[Tensor, "B Ht L"],
    divergence: Divergence = "kl",
) -> Scalar:
    """Compare rows of attention over the same tokens, in float32, mean over batch and heads.

    ``kl``: KL(teacher || student). ``mse``: the squared difference, summed over tokens. Unequal
    heads are replaced by their mean. No gradient reaches the teacher.
    """
    student, teacher = student.float(), teacher.detach().float()
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    if divergence == "mse":
        return (student - teacher).square().sum(-1).mean()
    return kl_rows(student.clamp_min(SMALLEST).log(), teacher.clamp_min(SMALLEST).log()).mean()


def attention_loss(
    student: Float[Tensor, "B Hs L L"],
    teacher: Float[Tensor, "B Ht L L"],
    divergence: Divergence = "mse",
) -> Scalar:
    """Compare scores ``q k^T d^-0.5`` of the same tokens, before the softmax, in float32.

    Mean over batch, heads and rows. ``kl``: KL(teacher || student) of their softmax; unequal heads
    are replaced by the mean of their probabilities. ``mse``: the squared difference of the scores
    themselves, as in MAE-Lite's code, mean over tokens too; unequal heads are replaced by the mean
    of their scores. No gradient reaches the teacher.
    """
    student, teacher = student.float(), teacher.detach().float()
    unequal = student.shape[1] != teacher.shape[1]
    if divergence == "mse":
        if unequal:
            student, teacher = student.mean(1), teacher.mean(1)
        return (student - teacher).square().mean()
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    if unequal:
        student, teacher = student.exp().mean(1), teacher.exp().mean(1)
        student, teacher = student.clamp_min(SMALLEST).log(), teacher.clamp_min(SMALLEST).log()
    return kl_rows(student, teacher).mean()


@dataclass(frozen=True, kw_only=True)
class BlockObjective(TeacherObjective):
    """One that compares the tokens of one block of each network with each other.

    Compared are the class token, if both networks have one, and the patches both saw.
    """

    block: int = option(-1, "the student's block; negative counts from the end")
    teacher_block: int | None = option(None, "the teacher's; null: the same number")

    @property
    def blocks(self) -> tuple[int, int]:
        return self.block, self.block if self.teacher_block is None else self.teacher_block

    def student_needs(self, student: Network) -> Needs:
        return self.reads(self.blocks[0])

    def teacher_needs(self, teacher: Network) -> Needs:
        return self.reads(self.blocks[1])

    def reads(self, block: int) -> Needs:
        """Return what is read of a block of either network."""
        return Needs(qkv=frozenset({block}))


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(BlockObjective):
    """Attention distillation: how the tokens of one block attend to each other.

    Attention is renormalised over the compared tokens in both networks. Heads are compared one by
    one if their number agrees, else their means. A network without a class token gives a stand-in
    for its row: its attention pool's, or the mean of all rows.
    """

    rows: Literal["class", "all"] = option(
        "class",
        "`class`: the class token's alone, which costs next to nothing. `all`: every token's, in"
        " matrices of heads x tokens x tokens",
    )
    divergence: Divergence = option(
        "kl",
        "`kl`: KL(teacher || student) of each row. `mse`: squared differences of a class row's"
        " probabilities, summed over tokens, or of all rows' scores before the softmax, their mean",
    )

    formula = "KL(teacher || student) of attention, mean over rows, heads, batch; or squared error"
    paper = (
        "AttnDistill (Wang et al., BMVC 2022, arXiv 2210.00944); with all rows, MAE-Lite (Wang et"
        " al., ICML 2023, arXiv 2205.14443)"
    )
    use_when = "A self-supervised teacher with as many heads, to learn where it looks."

    def reads(self, block: int) -> Needs:
        return Needs(attention=frozenset({block})) if self.rows == "class" else super().reads(block)

    def describe(self, student: Network, teacher: Network, num_keep: int | None) -> str:
        if student.num_heads == teacher.num_heads:
            return ""
        return f"means of {student.num_heads} and {teacher.num_heads} heads"

    def loss(self, student: ViTOutput, teacher: ViTOutput, batch: Truth, adapter: None) -> Scalar:
        block, teacher_block = self.blocks[0] % student.depth, self.blocks[1] % teacher.depth
        if self.rows == "class":
            attention = student.attention[block], teacher.attention[teacher_block]
            return class_attention_loss(*shared_rows(student, teacher, *attention), self.divergence)
        of_student, of_teacher = student.qkv[block], teacher.qkv[teacher_block]
        q, teacher_q = shared_vectors(student, teacher, of_student.q, of_teacher.q)
        k, teacher_k = shared_vectors(student, teacher, of_student.k, of_teacher.k)
        scores = token_scores(q, k, of_student.q.shape[1])
        teacher_scores = token_scores(teacher_q, teacher_k, of_teacher.q.shape[1])
        return attention_loss(scores, teacher_scores, self.divergence)
