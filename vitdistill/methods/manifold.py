"""Manifold distillation: similarities between patches, within an image, between images, and between
patches drawn from the whole batch.

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

from ..errors import ConfigError
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import full_precision, gather_patches
from .base import Labelled, TeacherObjective, describe_alignment
from .kd import check_factors


def gram_difference(
    ours: Float[Tensor, "G M Ds"], its: Float[Tensor, "G M Dt"]
) -> Float[Tensor, ""]:
    """Mean squared difference of the two sets of ``G`` Gram matrices ``(M, M)``, in float32
    whatever the autocast.
    """
    with full_precision(ours):
        difference = ours @ ours.transpose(-2, -1) - its @ its.transpose(-2, -1)
    return difference.square().mean()


def patch_gram_loss(
    student: Float[Tensor, "B K Ds"], teacher: Float[Tensor, "B K Dt"]
) -> Float[Tensor, ""]:
    """Cosines between the patches of one image: mean squared difference of ``(K, K)``, mean over
    the batch.

    Source: arXiv 2107.01378 eq. of the intra-image manifold;
    huawei-noah/Efficient-Computing@421edca.

    Example:
        >>> import torch
        >>> ours, its = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0], [3.0]]])
        >>> patch_gram_loss(ours, its).item()
        0.5
    """
    return gram_difference(_unit(student), _unit(teacher.detach()))


def sample_gram_loss(
    student: Float[Tensor, "B K Ds"],
    teacher: Float[Tensor, "B K Dt"],
    keep: Int[Tensor, "B K"] | None = None,
) -> Float[Tensor, ""]:
    """Cosines between the images' patches of one place: mean squared difference of ``(B, B)``, mean
    over the places.

    ``keep`` are the places of the patches, where they are not all: then the first of each image,
    row by row, are compared with each other, the second, and so on.

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
    """Cosines between the ``num_samples`` patches of the batch with the largest ``uniforms`` (all,
    if there are fewer).

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
    """Manifold distillation: the cosines between patches after some blocks, which needs no
    projection between unequal widths.

    With a teacher that sees some of its patches, those are compared; the term between images then
    compares the first kept patches of all images, the second, and so on, in rows.

    Args:
        blocks: the student's blocks after which patches are compared; negative counts from the end.
            The published run takes the first four and the last four.
        teacher_blocks: the teacher's, in the same order; None: the same numbers.
        patch_weight: of the term within an image; 0: left out.
        sample_weight: of the term between images at the same place; 0: left out.
        random_weight: of the term between patches drawn from the batch; 0: left out.
        num_samples: how many patches are drawn, after each block anew.
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
        if not self.blocks:
            raise ConfigError(
                "blocks is empty, so that nothing is compared: give the student's blocks, or leave"
                " the objective out"
            )
        if self.teacher_blocks is not None and len(self.teacher_blocks) != len(self.blocks):
            raise ConfigError(
                f"blocks names {len(self.blocks)} blocks of the student and teacher_blocks"
                f" {len(self.teacher_blocks)} of the teacher: give as many of both"
            )
        if (
            isinstance(self.num_samples, bool)
            or not isinstance(self.num_samples, int)
            or self.num_samples < 2
        ):
            raise ConfigError(
                f"num_samples is {self.num_samples!r}: give the number of patches to draw, at"
                " least 2"
            )

    @property
    def couples_images(self) -> bool:  # type: ignore[override]
        """Whether a term that compares images is left in."""
        return self.sample_weight > 0 or self.random_weight > 0

    def _blocks(self) -> list[tuple[int, int]]:
        """Student's and teacher's block of each pair."""
        return list(
            zip(
                self.blocks,
                self.blocks if self.teacher_blocks is None else self.teacher_blocks,
                strict=True,
            )
        )

    def student_needs(self, student: Network) -> Needs:
        return Needs(hidden=frozenset(self.blocks))

    def teacher_needs(self, teacher: Network) -> Needs:
        return Needs(hidden=frozenset(its for _, its in self._blocks()))

    def describe(self, student: Network, teacher: Network | None, num_keep: int | None) -> str:
        assert teacher is not None
        return describe_alignment(student, teacher, num_keep)

    def loss(
        self,
        student: ViTOutput,
        teacher: ViTOutput | None,
        batch: Labelled,
        adapter: nn.Module | None,
    ) -> Float[Tensor, ""]:
        assert teacher is not None
        losses = []
        for i, (mine, other) in enumerate(self._blocks()):
            places = teacher.patches(other)
            ours, its = student.patches(mine).at(places), places.vectors
            if self.patch_weight > 0:
                losses.append(self.patch_weight * patch_gram_loss(ours, its))
            if self.sample_weight > 0:
                losses.append(self.sample_weight * sample_gram_loss(ours, its, places.keep))
            if self.random_weight > 0:
                num_patches = places.grid[0] * places.grid[1]
                uniforms = gather_patches(
                    batch.uniforms((i + 1) * num_patches)[:, i * num_patches :], places.keep
                )
                losses.append(
                    self.random_weight * random_gram_loss(ours, its, uniforms, self.num_samples)
                )
        return torch.stack(losses).sum() / len(self.blocks)
