"""ViTKD: the student mimics the teacher's first blocks and generates its last features from masked
ones of its own.

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
from .base import Labelled, TeacherObjective, describe_alignment

PUBLISHED_WEIGHTS = (3e-5, 3e-6)
"""Low and high, on sums over patches and channels; the same for every published pair."""

MEAN_WEIGHTS = (9.0, 0.45)
"""Low and high, on means: what the published ones amount to for a teacher 768 wide with 196 patches
(9.03 and 0.452).
"""


class ViTKDAdapter(nn.Module):
    """The trainable parts of ViTKD: projections to the teacher's width, the mask token, and the
    generator.

    Submodules: ``align_low.0``, ``align_low.1``, ... and ``align_high``, absent where the widths
    agree; ``mask_token`` ``(1, 1, Dt)``, zeros at first; ``generation``, a 3x3 convolution, ReLU
    and another 3x3 convolution.

    Args:
        student_dim: width of the student's last features; teacher_dim: of the teacher's.
        low_dims: widths (student, teacher) after each mimicked block; None: two blocks of the same
            widths.
        generates: with a generator; masks: with a mask token.
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
        if any(ours != its for ours, its in low_dims):
            self.align_low = nn.ModuleList(
                nn.Identity() if ours == its else nn.Linear(ours, its) for ours, its in low_dims
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
        """Hidden states of the mimicked block number ``i`` in the teacher's width."""
        return self.align_low[i](patches) if hasattr(self, "align_low") else patches

    def generate(
        self, patches: Float[Tensor, "B N Ds"], mask: Tensor | None, grid: tuple[int, int]
    ) -> Float[Tensor, "B N Dt"]:
        """The teacher's features, generated from the student's with the patches where ``mask`` is
        true hidden.
        """
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
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, ""]:
    """Squared differences of the first blocks' patches, in float32.

    ``sum``: over blocks, patches and channels, divided by the fraction of the teacher's patches
    that both saw, mean over the batch. ``mean``: over all of them.
    """
    total = torch.zeros((), device=teacher[0].device)
    for i, (ours, its) in enumerate(zip(student, teacher, strict=True)):
        error = (adapter.low(i, ours).float() - its.detach().float()).square()
        total = total + (error.mean() if reduction == "mean" else error.sum() / len(its) / seen)
    return total / len(teacher) if reduction == "mean" else total


def generation_loss(
    adapter: ViTKDAdapter,
    student: Float[Tensor, "B N Ds"],
    teacher: Float[Tensor, "B K Dt"],
    grid: tuple[int, int],
    keep: Int[Tensor, "B K"] | None = None,
    mask_rate: float = 0.5,
    noise: Float[Tensor, "B N"] | None = None,
    reduction: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, ""]:
    """Squared differences of generated and real features at the masked patches the teacher saw, in
    float32.

    The patches with the largest ``noise`` are masked, all but ``int(N (1 - mask_rate))``. ``sum``:
    over patches and channels, divided by the mask rate, ``N / K`` times where the teacher saw K
    patches, mean over the batch. ``mean``: over the channels of the masked patches. At a mask rate
    of 0 nothing is hidden and every patch is compared; the divisor is 1.
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
    reduction: Literal["sum", "mean"] = "sum",
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The two weighted terms of ViTKD, mimicking (low) and generation (high); their sum is the
    loss.

    Args:
        adapter: its projections, mask token and generator.
        student_low: patches after the mimicked blocks; student_high: after the final norm; both on
            the teacher's grid.
        teacher_low: of the teacher, without gradient, at the patches it saw; teacher_high:
            likewise.
        low_weight: alpha of the paper; high_weight: beta.
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
    ours = [gather_patches(block, keep) for block in student_low.unbind(1)]
    low = low_weight * mimicking_loss(
        adapter, ours, teacher_low.unbind(1), num_seen / num_patches, reduction
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
    reduction: Literal["sum", "mean"] = "sum"
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
        if not 0 <= self.mask_rate < 1:
            raise ConfigError(
                f"mask_rate is {self.mask_rate!r}: give the fraction of patches to hide, from 0 to"
                " below 1"
            )
        for name in ("low_weight", "high_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(
                    f"{name} is {value!r}: give a number that is not negative, or null"
                )
        if self.teacher_low_blocks is not None and len(self.teacher_low_blocks) != len(
            self.low_blocks
        ):
            raise ConfigError(
                f"low_blocks names {len(self.low_blocks)} blocks of the student and"
                f" teacher_low_blocks {len(self.teacher_low_blocks)} of the teacher: give as many"
                " of both"
            )
        if not self._mimics and not self._generates:
            raise ConfigError(
                "ViTKD has nothing to compare: give low_blocks and a low_weight, or a high_weight"
                " above 0"
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
        """The generator is a convolution over the student's whole map."""
        return self._generates

    def _blocks(self) -> list[tuple[int, int]]:
        """Student's and teacher's block of each mimicked pair."""
        theirs = self.low_blocks if self.teacher_low_blocks is None else self.teacher_low_blocks
        return list(zip(self.low_blocks, theirs, strict=True)) if self._mimics else []

    def student_needs(self, student: Network) -> Needs:
        return Needs(hidden=frozenset(ours for ours, _ in self._blocks()), features=self._generates)

    def teacher_needs(self, teacher: Network) -> Needs:
        return Needs(hidden=frozenset(its for _, its in self._blocks()), features=self._generates)

    def adapter(self, student: Network, teacher: Network | None) -> nn.Module | None:
        assert teacher is not None
        low_dims = [(student.dims[ours], teacher.dims[its]) for ours, its in self._blocks()]
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
        self,
        student: ViTOutput,
        teacher: ViTOutput | None,
        batch: Labelled,
        adapter: nn.Module | None,
    ) -> Float[Tensor, ""]:
        assert teacher is not None and isinstance(adapter, ViTKDAdapter)
        low_weight, high_weight = self._weights
        loss = torch.zeros((), device=batch.labels.device)
        if self._mimics:
            pairs = [(student.patches(ours), teacher.patches(its)) for ours, its in self._blocks()]
            ours = [mine.at(its) for mine, its in pairs]
            places = pairs[0][1]
            seen = (
                1.0
                if places.keep is None
                else places.keep.shape[1] / (places.grid[0] * places.grid[1])
            )
            loss = loss + low_weight * mimicking_loss(
                adapter, ours, [its.vectors for _, its in pairs], seen, self.reduction
            )
        if self._generates:
            mine, its = student.feature_patches, teacher.feature_patches
            whole = resample_patches(mine.vectors, mine.grid, its.grid)
            noise = batch.uniforms(whole.shape[1]) if self.mask_rate > 0 else None
            loss = loss + high_weight * generation_loss(
                adapter,
                whole,
                its.vectors,
                its.grid,
                its.keep,
                self.mask_rate,
                noise,
                self.reduction,
            )
        return loss
