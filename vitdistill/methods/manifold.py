"""Manifold distillation: similarities between patches of an image, of images, of a whole batch.

Source: "Learning Efficient Vision Transformers via Fine-Grained Manifold Distillation", Hao et al.,
NeurIPS 2022, arXiv 2107.01378, checked against huawei-noah/Efficient-Computing@421edca
(Distillation/ManifoldKD/losses.py); weights and number of samples from the command in
Hao840/manifold-distillation@1096b82. What differs: no prefix token is compared (the authors drop as
many of the student's leading tokens as it has more than the teacher); unequal grids meet by
position; the drawn patches are the same in every run of a seed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..option import option
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import full_precision, gather_patches
from .base import Scalar, TeacherObjective, Truth, block_pairs, require


def patch_gram_loss(student: Float[Tensor, "G M Ds"], teacher: Float[Tensor, "G M Dt"]) -> Scalar:
    """Return the mean squared difference of ``G`` matrices ``(M, M)`` of cosines, in float32.

    On the patches of each image, this is the term within an image.
    """
    student = F.normalize(student.float(), dim=-1)
    teacher = F.normalize(teacher.detach().float(), dim=-1)
    with full_precision(student):
        difference = student @ student.transpose(-2, -1) - teacher @ teacher.transpose(-2, -1)
    return difference.square().mean()


def sample_gram_loss(
    student: Float[Tensor, "B K Ds"],
    teacher: Float[Tensor, "B K Dt"],
    keep: Int[Tensor, "B K"] | None = None,
) -> Scalar:
    """Compare the cosines between the images' patches at one place: squared error of ``(B, B)``.

    Mean over matrix and places. ``keep`` says which patches were kept, if not all: then the images'
    first kept patches, row by row, are compared with each other, then the second ones, and so on.
    """
    if keep is not None:
        order = keep.argsort(dim=1)
        student, teacher = gather_patches(student, order), gather_patches(teacher, order)
    return patch_gram_loss(student.transpose(0, 1), teacher.transpose(0, 1))


def random_gram_loss(
    student: Float[Tensor, "B K Ds"],
    teacher: Float[Tensor, "B K Dt"],
    uniforms: Float[Tensor, "B K"],
    num_samples: int = 192,
) -> Scalar:
    """Compare the cosines between the ``num_samples`` patches of the largest ``uniforms``."""
    chosen = uniforms.flatten().topk(min(num_samples, uniforms.numel())).indices
    return patch_gram_loss(student.flatten(0, 1)[chosen][None], teacher.flatten(0, 1)[chosen][None])


@dataclass(frozen=True, kw_only=True)
class Manifold(TeacherObjective):
    """Manifold distillation: cosines between patches, with no projection between unequal widths.

    If the teacher sees only some patches, those are compared; between images, in the order of their
    rows. The published run compares the first four blocks and the last four.
    """

    blocks: tuple[int, ...] = option((0, 1, -2, -1), "after which patches are compared")
    teacher_blocks: tuple[int, ...] | None = option(None, "the teacher's; null: the same numbers")
    patch_weight: float = option(4.0, "weight of the term within an image; 0: left out", at_least=0)
    sample_weight: float = option(
        0.1, "weight of the term between images at one place; 0: left out", at_least=0
    )
    random_weight: float = option(
        0.2, "weight of the term between random patches; 0: left out", at_least=0
    )
    num_samples: int = option(192, "how many are drawn, anew after each block", at_least=2)

    terms = ("patch_weight", "sample_weight", "random_weight")
    formula = "weighted mean squared differences of cosines between patches, mean over blocks"
    paper = "Manifold distillation (Hao et al., NeurIPS 2022, arXiv 2107.01378)"
    use_when = "Beside a logit loss, with a teacher of other width or kind: nothing to project."

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.blocks, "blocks", self.blocks, "the student's blocks to compare")
        self._blocks()

    @property
    def couples_images(self) -> bool:  # type: ignore[override]
        """Whether a term that compares images is left in."""
        return self.sample_weight > 0 or self.random_weight > 0

    def _blocks(self) -> list[tuple[int, int]]:
        return block_pairs("blocks", self.blocks, self.teacher_blocks)

    def student_needs(self, student: Network) -> Needs:
        return Needs(hidden=frozenset(self.blocks))

    def teacher_needs(self, teacher: Network) -> Needs:
        return Needs(hidden=frozenset(i for _, i in self._blocks()))

    def loss(self, student: ViTOutput, teacher: ViTOutput, batch: Truth, adapter: None) -> Scalar:
        losses = []
        for i, (block, teacher_block) in enumerate(self._blocks()):
            places = teacher.patches(teacher_block)
            patches, target = student.patches(block).at(places), places.vectors
            if self.patch_weight > 0:
                losses.append(self.patch_weight * patch_gram_loss(patches, target))
            if self.sample_weight > 0:
                losses.append(self.sample_weight * sample_gram_loss(patches, target, places.keep))
            if self.random_weight > 0:
                count = places.grid[0] * places.grid[1]
                uniforms = batch.uniforms((i + 1) * count)[:, i * count :]
                term = random_gram_loss(
                    patches, target, gather_patches(uniforms, places.keep), self.num_samples
                )
                losses.append(self.random_weight * term)
        return torch.stack(losses).sum() / len(self.blocks)
