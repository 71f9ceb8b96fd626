"""ViTKD: mimic the teacher's first blocks, generate its last features from masked own ones.

Source: "ViTKD: Feature-based Knowledge Distillation for Vision Transformers", Yang et al., CVPRW
2024, arXiv 2209.02432, checked against yzd-v/cls_KD@ad4876f (branch master, which produced the
paper's numbers). What the authors' code cannot do: unequal or non-square grids (the student's
features are resampled to the teacher's patches by position), any prefix tokens, a teacher that sees
some of its patches, networks of any depth, and a mask rate of 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import gather_patches, resample_patches
from .base import TeacherObjective, Truth, block_pairs, describe_alignment, require

PUBLISHED_WEIGHTS = (3e-5, 3e-6)
"""Low and high, on sums over patches and channels; the same for every published pair."""

MEAN_WEIGHTS = (9.0, 0.45)
"""Low and high, on means: what the published ones amount to (9.03 and 0.452) for a teacher 768 wide
with 196 patches.
"""

Reduction = Literal["sum", "mean"]


class ViTKDAdapter(nn.Module):
    """The trainable parts of ViTKD: projections to the teacher's width, mask token, generator.

    Submodules: ``align_low.0``, ``align_low.1``, ... and ``align_high``, absent if the widths
    agree; ``mask_token`` ``(1, 1, Dt)``, zeros at first; ``generation``, a 3x3 convolution, ReLU
    and another 3x3 convolution.

    Args:
        student_dim: width of the student's last features.
        teacher_dim: width of the teacher's.
        low_dims: widths (student, teacher) after each mimicked block; None: two blocks of the same
            widths.
        generates: build the generator.
        masks: build the mask token.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        low_dims: Sequence[tuple[int, int]] | None = None,
        *,
        generates: bool = True,
        masks: bool = True,
    ) -> None:
        super().__init__()
        low_dims = [(student_dim, teacher_dim)] * 2 if low_dims is None else low_dims
        if any(dim != to for dim, to in low_dims):
            self.align_low = nn.ModuleList(
                nn.Identity() if dim == to else nn.Linear(dim, to) for dim, to in low_dims
            )
        if not generates:
            return
        if student_dim != teacher_dim:
            self.align_high = nn.Linear(student_dim, teacher_dim)
        if masks:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, teacher_dim))
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1),
        )

    def low(self, i: int, patches: Float[Tensor, "B K Ds"]) -> Float[Tensor, "B K Dt"]:
        """Project the hidden states of mimicked block number ``i`` to the teacher's width."""
        return self.align_low[i](patches) if hasattr(self, "align_low") else patches

    def generate(
        self, patches: Float[Tensor, "B N Ds"], mask: Tensor | None, grid: tuple[int, int]
    ) -> Float[Tensor, "B N Dt"]:
        """Generate the teacher's features from the student's, whose ``mask`` is hidden."""
        features = self.align_high(patches) if hasattr(self, "align_high") else patches
        if mask is not None:
            features = torch.where(mask[:, :, None], self.mask_token.to(features.dtype), features)
        image = features.transpose(1, 2).unflatten(2, grid)
        return self.generation(image).flatten(2).transpose(1, 2)


def mimicking_loss(
    adapter: ViTKDAdapter,
    student: Sequence[Float[Tensor, "B _ _"]],
    teacher: Sequence[Float[Tensor, "B _ _"]],
    seen: float = 1.0,
    reduction: Reduction = "sum",
) -> Float[Tensor, ""]:
    """Return the squared differences of the first blocks' patches, in float32.

    ``sum``: over blocks, patches and channels, divided by the fraction ``seen`` of the teacher's
    patches, mean over the batch. ``mean``: over all of them.
    """
    total = torch.zeros((), device=teacher[0].device)
    for i, (patches, target) in enumerate(zip(student, teacher, strict=True)):
        error = (adapter.low(i, patches).float() - target.detach().float()).square()
        total = total + (error.mean() if reduction == "mean" else error.sum() / len(target) / seen)
    return total / len(teacher) if reduction == "mean" else total


def generation_loss(
    adapter: ViTKDAdapter,
    student: Float[Tensor, "B N Ds"],
    teacher: Float[Tensor, "B K Dt"],
    grid: tuple[int, int],
    keep: Int[Tensor, "B K"] | None = None,
    mask_rate: float = 0.5,
    noise: Float[Tensor, "B N"] | None = None,
    reduction: Reduction = "sum",
) -> Float[Tensor, ""]:
    """Return the squared differences of generated and real features, in float32.

    Compared are the masked patches that the teacher saw. The patches with the largest ``noise`` are
    masked, all but ``int(N (1 - mask_rate))``. ``sum``: over patches and channels, divided by the
    mask rate, ``N / K`` times where the teacher saw K patches, mean over the batch. ``mean``: over
    the channels of the masked patches. At a mask rate of 0 nothing is hidden and every patch is
    compared; the divisor is 1.
    """
    batch, num_patches = student.shape[:2]
    mask, num_masked = None, num_patches
    if mask_rate > 0:
        if noise is None:
            noise = torch.rand(batch, num_patches, device=student.device)
        num_visible = int(num_patches * (1 - mask_rate))
        num_masked = num_patches - num_visible
        mask = noise.argsort(dim=1, stable=True).argsort(dim=1) >= num_visible
    generated = gather_patches(adapter.generate(student, mask, grid), keep)
    error = (generated.float() - teacher.detach().float()).square()
    if mask is not None:
        error = torch.where(gather_patches(mask, keep)[:, :, None], error, 0)
    total = error.sum() / batch * (num_patches / teacher.shape[1])
    return (
        total / (num_masked * teacher.shape[2])
        if reduction == "mean"
        else total / (mask_rate or 1.0)
    )


def vitkd_loss(
    adapter: ViTKDAdapter,
    student_low: Float[Tensor, "B blocks N Ds"],
    student_high: Float[Tensor, "B N Ds"],
    teacher_low: Float[Tensor, "B blocks K Dt"],
    teacher_high: Float[Tensor, "B K Dt"],
    *,
    low_weight: float = PUBLISHED_WEIGHTS[0],
    high_weight: float = PUBLISHED_WEIGHTS[1],
    mask_rate: float = 0.5,
    noise: Float[Tensor, "B N"] | None = None,
    grid: tuple[int, int] | None = None,
    keep: Int[Tensor, "B K"] | None = None,
    reduction: Reduction = "sum",
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the two weighted terms of ViTKD, mimicking and generation; the loss is their sum.

    Args:
        adapter: its projections, mask token and generator.
        student_low: patches after the mimicked blocks, on the teacher's grid.
        student_high: patches after the final norm, on the teacher's grid.
        teacher_low, teacher_high: the teacher's at the patches it saw; they get no gradient.
        low_weight: alpha of the paper.
        high_weight: beta of the paper.
        mask_rate: lambda, 0 to below 1.
        noise: uniform numbers that choose the masked patches; None: drawn here.
        grid: rows and columns of the N patches; None: a square.
        keep: row-major indices of the K patches the teacher saw; None: all.
        reduction: ``sum`` as published, ``mean`` for weights that do not depend on N, K and Dt.

    Raises:
        ValueError: shapes do not fit, or the mask rate is out of range.

    Source: arXiv 2209.02432 eq. 3-6; yzd-v/cls_KD@ad4876f.
    """
    num_patches = student_high.shape[1]
    if grid is None:
        side = math.isqrt(num_patches)
        grid = (side, side)
    if grid[0] * grid[1] != num_patches:
        raise ValueError(
            f"{num_patches} patches are not a grid of {grid[0]} x {grid[1]}: give grid"
        )
    if not 0 <= mask_rate < 1:
        raise ValueError(f"mask_rate is {mask_rate!r}: it has to be from 0 to below 1")
    num_seen = num_patches if keep is None else keep.shape[1]
    if (
        teacher_high.shape[1] != num_seen
        or teacher_low.shape[2] != num_seen
        or student_low.shape[2] != num_patches
    ):
        raise ValueError(
            f"the student has {student_low.shape[2]} and {num_patches} patches and the teacher"
            f" {teacher_low.shape[2]} and {teacher_high.shape[1]}, where {num_seen} were seen"
        )
    patches = [gather_patches(block, keep) for block in student_low.unbind(1)]
    low = low_weight * mimicking_loss(
        adapter, patches, teacher_low.unbind(1), num_seen / num_patches, reduction
    )
    high = high_weight * generation_loss(
        adapter, student_high, teacher_high, grid, keep, mask_rate, noise, reduction
    )
    return low, high


@dataclass(frozen=True, kw_only=True)
class ViTKD(TeacherObjective):
    """Feature distillation: the first blocks are mimicked, the last features generated from masked
    ones.

    Args:
        low_blocks: the student's blocks whose output is mimicked; empty: none.
        teacher_low_blocks: the teacher's, in the same order; None: the same numbers.
        mask_rate: lambda, the fraction of patches hidden from the generator, 0 to below 1.
        reduction: ``sum`` over patches and channels, as published: a weight then grows with the
            teacher's patches and width. ``mean``: weights keep their meaning at any resolution,
            width and number of kept patches.
        low_weight: of the mimicking term, 0 leaves it out; None: 3e-5 as published for ``sum``, 9
            for ``mean``.
        high_weight: of the generation term, 0 leaves it out; None: 3e-6 as published for ``sum``,
            0.45 for ``mean``.
    """

    low_blocks: tuple[int, ...] = (0, 1)
    teacher_low_blocks: tuple[int, ...] | None = None
    mask_rate: float = 0.5
    reduction: Reduction = "sum"
    low_weight: float | None = None
    high_weight: float | None = None

    formula: ClassVar[str] = (
        "low_weight |S - T|^2 of the first blocks' patches + high_weight |G(masked S) - T|^2 of the"
        " last features at masked patches"
    )
    paper: ClassVar[str] = (
        "ViTKD (Yang et al., CVPRW 2024, [2209.02432](https://arxiv.org/abs/2209.02432))"
    )
    use_when: ClassVar[str] = (
        "Beside a logit loss, when the whole teacher runs anyway: published gain 1.1 points on top"
        " of NKD (DeiT-Ti from DeiT III-S)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.mask_rate < 1, "mask_rate", self.mask_rate, "a fraction from 0 to below 1"
        )
        for name in ("low_weight", "high_weight"):
            value = getattr(self, name)
            ok = value is None or 0 <= value < math.inf
            require(ok, name, value, "a number that is not negative, or null")
        block_pairs("low_blocks", self.low_blocks, self.teacher_low_blocks)
        if not self._mimics and not self._generates:
            raise ConfigError(
                "ViTKD has nothing to compare",
                fix=("give low_blocks and a low_weight", "give a high_weight above 0"),
                field="low_blocks",
            )

    @property
    def _weights(self) -> tuple[float, float]:
        low, high = PUBLISHED_WEIGHTS if self.reduction == "sum" else MEAN_WEIGHTS
        return low if self.low_weight is None else self.low_weight, (
            high if self.high_weight is None else self.high_weight
        )

    @property
    def _mimics(self) -> bool:
        return bool(self.low_blocks) and self._weights[0] > 0

    @property
    def _generates(self) -> bool:
        return self._weights[1] > 0

    @property
    def needs_every_patch(self) -> bool:  # type: ignore[override]
        """Whether it generates: the generator is a convolution over the student's whole map."""
        return self._generates

    def _blocks(self) -> list[tuple[int, int]]:
        if not self._mimics:
            return []
        return block_pairs("low_blocks", self.low_blocks, self.teacher_low_blocks)

    def student_needs(self, student: Network) -> Needs:
        return Needs(hidden=frozenset(i for i, _ in self._blocks()), features=self._generates)

    def teacher_needs(self, teacher: Network) -> Needs:
        return Needs(hidden=frozenset(i for _, i in self._blocks()), features=self._generates)

    def adapter(self, student: Network, teacher: Network | None) -> nn.Module | None:
        assert teacher is not None
        low_dims = [(student.dims[i], teacher.dims[j]) for i, j in self._blocks()]
        return ViTKDAdapter(
            student.dims[-1],
            teacher.dims[-1],
            low_dims,
            generates=self._generates,
            masks=self.mask_rate > 0,
        )

    def describe(self, student: Network, teacher: Network | None, num_keep: int | None) -> str:
        assert teacher is not None
        low, high = self._weights
        parts = [
            f"low_weight {low:g}, high_weight {high:g} on {self.reduction}s",
            describe_alignment(student, teacher, num_keep),
        ]
        if num_keep is not None and self.reduction == "sum":
            parts.append(f"sums times {teacher.num_patches / num_keep:.3g} to keep their scale")
        return ", ".join(part for part in parts if part)

    def loss(
        self, student: ViTOutput, teacher: ViTOutput | None, batch: Truth, adapter: nn.Module | None
    ) -> Float[Tensor, ""]:
        assert teacher is not None and isinstance(adapter, ViTKDAdapter)
        low_weight, high_weight = self._weights
        loss = torch.zeros((), device=batch.labels.device)
        if self._mimics:
            pairs = [(student.patches(i), teacher.patches(j)) for i, j in self._blocks()]
            patches = [of_student.at(places) for of_student, places in pairs]
            keep, grid = pairs[0][1].keep, pairs[0][1].grid
            seen = 1.0 if keep is None else keep.shape[1] / (grid[0] * grid[1])
            loss = loss + low_weight * mimicking_loss(
                adapter, patches, [places.vectors for _, places in pairs], seen, self.reduction
            )
        if self._generates:
            of_student, places = student.feature_patches, teacher.feature_patches
            whole = resample_patches(of_student.vectors, of_student.grid, places.grid)
            noise = batch.uniforms(whole.shape[1]) if self.mask_rate > 0 else None
            loss = loss + high_weight * generation_loss(
                adapter,
                whole,
                places.vectors,
                places.grid,
                places.keep,
                self.mask_rate,
                noise,
                self.reduction,
            )
        return loss
