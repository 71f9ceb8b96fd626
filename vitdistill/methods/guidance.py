"""Locality guidance: the stages of a light convolutional network guide the blocks of a ViT.

Source: "Locality Guidance for Improving Vision Transformers on Tiny Datasets", Li et al., ECCV
2022, arXiv 2207.10026; lkhl/tiny-transformers@d2165f7 (its linear transform, the best there). What
differs: any network that has stages teaches, not a ResNet-56 of 32 x 32 pixels alone; a teacher
that sees some of its patches is compared at these.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..option import option
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import PatchMap, resample_patches
from .base import Scalar, TeacherObjective, Truth, require

PAIRS = 3


def spread(count: int, depth: int) -> tuple[int, ...]:
    """Return ``count`` blocks of ``depth``, the first and the last among them, evenly between.

    >>> spread(3, 12), spread(3, 5), spread(1, 12)
    ((0, 6, 11), (0, 2, 4), (11,))
    """
    if count == 1:
        return (depth - 1,)
    return tuple(int(i * (depth - 1) / (count - 1) + 0.5) for i in range(count))


def map_loss(student: PatchMap, teacher: PatchMap, normalize: bool = False) -> Scalar:
    """Return the mean squared difference of two feature maps of equal width, in float32.

    Both are first resampled, bilinear, to the larger number of rows and of columns; where either
    network saw some patches, the student's are compared at the teacher's. ``normalize`` divides the
    difference of each image by the variance of its teacher's map. No gradient reaches the teacher.
    """
    ours, its = student.vectors.float(), teacher.vectors.detach().float()
    if student.keep is None and teacher.keep is None:
        size = max(student.grid[0], teacher.grid[0]), max(student.grid[1], teacher.grid[1])
        ours = resample_patches(ours, student.grid, size)
        its = resample_patches(its, teacher.grid, size)
    else:
        ours = PatchMap(ours, student.grid, student.keep).at(teacher)
    errors = (ours - its).square().mean((1, 2))
    return (errors / (its.var((1, 2), correction=0) + 1e-6) if normalize else errors).mean()


@dataclass(frozen=True, kw_only=True)
class LocalityGuidance(TeacherObjective):
    """Feature maps of a teacher's stages, predicted from a ViT's patches by 1x1 convolutions.

    Stages are those of timm's ``feature_info``, counted from 0, or the blocks of a plain ViT. The
    teacher stops after the last of them. The published weight, beside a cross-entropy of weight 1,
    is 2.5 for a ResNet-56. Maps of larger activations weigh more, those of an EfficientNet-Lite0 a
    hundred times, unless they are normalised.
    """

    blocks: tuple[int, ...] = option(
        (), "student blocks to guide; empty: first to last, one per stage, or three"
    )
    stages: tuple[int, ...] = option((), "teacher's stages, one a block; empty: first to last")
    normalize: bool = option(
        False,
        "divide by the variance of the teacher's map, so that a weight means the same for any"
        " teacher (not in the paper)",
    )

    formula = "sum over pairs of |C(student's patches) - teacher's stage|^2, mean over the map"
    paper = "Locality guidance (Li et al., ECCV 2022, arXiv 2207.10026)"
    use_when = (
        "Few training images and a convolutional teacher; no labels needed: published 78.2 %"
        " against 65.1 % alone (DeiT-Ti from ResNet-56, CIFAR-100)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        equal = not (self.blocks and self.stages) or len(self.blocks) == len(self.stages)
        require(equal, "stages", self.stages, f"one for each of the blocks {self.blocks}")

    @property
    def _count(self) -> int:
        return len(self.blocks) or len(self.stages) or PAIRS

    def guided(self, student: Network) -> tuple[int, ...]:
        return self.blocks or spread(self._count, student.depth)

    def guiding(self, teacher: Network) -> tuple[int, ...]:
        return self.stages or spread(self._count, teacher.depth)

    def student_needs(self, student: Network) -> Needs:
        return Needs(hidden=frozenset(self.guided(student)))

    def teacher_needs(self, teacher: Network) -> Needs:
        return Needs(hidden=frozenset(self.guiding(teacher)))

    def adapter(self, student: Network, teacher: Network) -> nn.ModuleList:
        pairs = zip(self.guided(student), self.guiding(teacher), strict=True)
        return nn.ModuleList(nn.Linear(student.dims[i], teacher.dims[j]) for i, j in pairs)

    def describe(self, student: Network, teacher: Network, num_keep: int | None) -> str:
        pairs = zip(self.guided(student), self.guiding(teacher), strict=True)
        return ", ".join(f"block {i} by the {teacher.name}'s stage {j}" for i, j in pairs)

    def loss(
        self, student: ViTOutput, teacher: ViTOutput, batch: Truth, adapter: nn.ModuleList
    ) -> Scalar:
        losses = []
        pairs = zip(self.guided(student.network), self.guiding(teacher.network), strict=True)
        for convolution, (block, stage) in zip(adapter, pairs, strict=True):
            ours = student.patches(block)
            projected = PatchMap(convolution(ours.vectors), ours.grid, ours.keep)
            losses.append(map_loss(projected, teacher.patches(stage), self.normalize))
        return torch.stack(losses).sum()
