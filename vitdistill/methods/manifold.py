"""Manifold distillation: similarities between patches of an image, of images, of a whole batch.

Source: "Learning Efficient Vision Transformers via Fine-Grained Manifold Distillation", Hao et al.,
NeurIPS 2022, arXiv 2107.01378, checked against huawei-noah/Efficient-Computing@421edca
(Distillation/ManifoldKD/losses.py); weights and number of samples from the command in
Hao840/manifold-distillation@1096b82. What differs: no prefix token is compared (the authors drop as
many of the student's leading tokens as it has more than the teacher); unequal grids meet by
position; the drawn patches are the same in every run of a seed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import full_precision, gather_patches
from .base import TeacherObjective, Truth, block_pairs, check_factors, describe_alignment, require


def gram_difference(
    student: Float[Tensor, "G M Ds"], teacher: Float[Tensor, "G M Dt"]
) -> Float[Tensor, ""]:
    """Return the mean squared difference of ``G`` Gram matrices ``(M, M)``, in float32."""
    with full_precision(student):
        difference = student @ student.transpose(-2, -1) - teacher @ teacher.transpose(-2, -1)
    return difference.square().mean()


def patch_gram_loss(
    student: Float[Tensor, "B K Ds"], teacher: Float[Tensor, "B K Dt"]
) -> Float[Tensor, ""]:
    """Compare the cosines between patches of one image: mean squared difference of ``(K, K)``.

    Mean over the batch.

    Source: arXiv 2107.01378 eq. of the intra-image manifold;
    huawei-noah/Efficient-Computing@421edca.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
        >>> patch_gram_loss(student, torch.tensor([[[1.0], [3.0]]])).item()
        0.5
    """
    return gram_difference(_unit(student), _unit(teacher.detach()))


def sample_gram_loss(
    student: Float[Tensor, "B K Ds"],
    teacher: Float[Tensor, "B K Dt"],
    keep: Int[Tensor, "B K"] | None = None,
) -> Float[Tensor, ""]:
    """Compare the cosines between the images' patches at one place: squared error of ``(B, B)``.

    Mean over matrix and places. ``keep`` says which patches were kept, if not all: then the images'
    first kept patches, row by row, are compared with each other, then the second ones, and so on.

    Source: arXiv 2107.01378 eq. of the inter-image manifold;
    huawei-noah/Efficient-Computing@421edca.
    """
    if keep is not None:
        order = keep.argsort(dim=1)
        student, teacher = gather_patches(student, order), gather_patches(teacher, order)
    return gram_difference(_unit(student).transpose(0, 1), _unit(teacher.detach()).transpose(0, 1))


def random_gram_loss(
    student: Float[Tensor, "B K Ds"],
    teacher: Float[Tensor, "B K Dt"],
    uniforms: Float[Tensor, "B K"],
    num_samples: int = 192,
) -> Float[Tensor, ""]:
    """Compare the cosines between ``num_samples`` patches of the batch (or all, if fewer).

    Drawn are the patches with the largest ``uniforms``.

    Source: arXiv 2107.01378 eq. of the random manifold; huawei-noah/Efficient-Computing@421edca.
    """
    chosen = uniforms.flatten().topk(min(num_samples, uniforms.numel())).indices
    return gram_difference(
        _unit(student.flatten(0, 1)[chosen])[None],
        _unit(teacher.detach().flatten(0, 1)[chosen])[None],
    )


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)


@dataclass(frozen=True, kw_only=True)
class Manifold(TeacherObjective):
    """Manifold distillation: cosines between patches, with no projection between unequal widths.

    With a teacher that sees some of its patches, those are compared; the term between images then
    compares the images' first kept patches, row by row, their second ones, and so on.

    Args:
        blocks: the student's blocks after which patches are compared; negative counts from the end.
            The published run takes the first four and the last four.
        teacher_blocks: the teacher's, in the same order; None: the same numbers.
        patch_weight: of the term within an image; 0: left out.
        sample_weight: of the term between images at the same place; 0: left out.
        random_weight: of the term between patches drawn from the batch; 0: left out.
        num_samples: how many patches are drawn, anew after each block.
    """

    blocks: tuple[int, ...] = (0, 1, -2, -1)
    teacher_blocks: tuple[int, ...] | None = None
    patch_weight: float = 4.0
    sample_weight: float = 0.1
    random_weight: float = 0.2
    num_samples: int = 192

    formula: ClassVar[str] = (
        "patch_weight * within images + sample_weight * between images + random_weight * between"
        " drawn patches: mean squared differences of cosines, mean over blocks"
    )
    paper: ClassVar[str] = (
        "Manifold distillation (Hao et al., NeurIPS 2022,"
        " [2107.01378](https://arxiv.org/abs/2107.01378))"
    )
    use_when: ClassVar[str] = (
        "Beside a logit loss, when the whole teacher runs anyway and its width or kind is far from"
        " the student's: no projection to train."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factors(
            patch_weight=self.patch_weight,
            sample_weight=self.sample_weight,
            random_weight=self.random_weight,
        )
        require(bool(self.blocks), "blocks", self.blocks, "the student's blocks to compare")
        block_pairs("blocks", self.blocks, self.teacher_blocks)
        require(self.num_samples >= 2, "num_samples", self.num_samples, "at least 2")

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

    def describe(self, student: Network, teacher: Network | None, num_keep: int | None) -> str:
        assert teacher is not None
        return describe_alignment(student, teacher, num_keep)

    def loss(
        self, student: ViTOutput, teacher: ViTOutput | None, batch: Truth, adapter: nn.Module | None
    ) -> Float[Tensor, ""]:
        assert teacher is not None
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
