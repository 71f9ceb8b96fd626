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
from functools import reduce
from operator import add
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..option import option
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import gather_patches, resample_patches
from .base import Scalar, TeacherObjective, Truth, block_pairs, require

# Low and high, on sums over patches and channels; the same for every published pair.
PUBLISHED_WEIGHTS = (3e-5, 3e-6)
# On means: what those amount to (9.03 and 0.452) for a teacher 768 wide with 196 patches.
MEAN_WEIGHTS = (9.0, 0.45)

Reduction = Literal["sum", "mean"]


class ViTKDAdapter(nn.Module):
    """The trainable parts of ViTKD: projections to the teacher's width, mask token, generator.

    Submodules: ``align_low.0``, ``align_low.1``, ... and ``align_high``, absent if the widths
    agree; ``mask_token`` ``(1, 1, Dt)``, zeros at first; ``generation``, a 3x3 convolution, ReLU
    and another 3x3 convolution. ``low_dims`` are the widths (student, teacher) after each mimicked
    block; None: two blocks of the widths of the last features.
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
        """Generate the teacher's features from the student's, with those in ``mask`` hidden."""
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
) -> Scalar:
    """Return the squared differences of the first blocks' patches, in float32.

    ``sum``: over blocks, patches and channels, divided by the fraction ``seen`` of the teacher's
    patches, mean over the batch. ``mean``: over all of them.
    """
    terms = []
    for i, (patches, target) in enumerate(zip(student, teacher, strict=True)):
        error = (adapter.low(i, patches).float() - target.detach().float()).square()
        terms.append(error.mean() if reduction == "mean" else error.sum() / len(target) / seen)
    total = reduce(add, terms)
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
) -> Scalar:
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
    return total / (num_masked * teacher.shape[2] if reduction == "mean" else mask_rate or 1.0)


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
) -> tuple[Scalar, Scalar]:
    """Return the two weighted terms of ViTKD, mimicking and generation; the loss is their sum.

    The student's patches are on the teacher's ``grid`` (None: a square), after the mimicked blocks
    (low) and the final norm (high); the teacher's are those it saw, at the row-major indices
    ``keep`` (None: all). ``low_weight``, ``high_weight`` and ``mask_rate`` are alpha, beta and
    lambda of the paper; the rest is as of `mimicking_loss` and `generation_loss`. Raises
    `ValueError` for shapes or a rate that do not fit.

    Source: arXiv 2209.02432 eq. 3-6; yzd-v/cls_KD@ad4876f.
    """
    num_patches = student_high.shape[1]
    grid = grid or (math.isqrt(num_patches), math.isqrt(num_patches))
    if math.prod(grid) != num_patches:
        raise ValueError(f"{num_patches} patches are not a grid of {grid}: give grid")
    if not 0 <= mask_rate < 1:
        raise ValueError(f"mask_rate is {mask_rate!r}: it has to be from 0 to below 1")
    num_seen = num_patches if keep is None else keep.shape[1]
    counts = student_low.shape[2], teacher_high.shape[1], teacher_low.shape[2]
    if counts != (num_patches, num_seen, num_seen):
        wanted = num_patches, num_seen, num_seen
        raise ValueError(f"there are {counts} patches where {wanted} are needed")
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
    """First blocks are mimicked, the teacher's last features generated from masked ones."""

    low_blocks: tuple[int, ...] = option((0, 1), "blocks that mimic the teacher's; empty: none")
    teacher_low_blocks: tuple[int, ...] | None = option(None, "the teacher's; null: the same")
    mask_rate: float = option(
        0.5, "fraction of patches hidden from the generator", at_least=0, below=1
    )
    reduction: Reduction = option(
        "sum",
        "over patches and channels; `sum`, as published: the loss grows with the teacher's patches"
        " and width; `mean`: a weight means the same for any teacher",
    )
    low_weight: float | None = option(
        None,
        "weight of mimicking; 0: left out; null: 3e-5 for `sum`, as published, or 9 for `mean`",
        at_least=0,
    )
    high_weight: float | None = option(
        None,
        "weight of generation; 0: left out; null: 3e-6 for `sum`, as published, or 0.45 for `mean`",
        at_least=0,
    )

    formula = "low_weight |S - T|^2 of first blocks + high_weight |G(masked S) - T|^2 of the last"
    paper = "ViTKD (Yang et al., CVPRW 2024, arXiv 2209.02432)"
    use_when = "Beside a logit loss: published gain 1.1 points over NKD (DeiT-Ti from DeiT III-S)."

    def __post_init__(self) -> None:
        super().__post_init__()
        block_pairs("low_blocks", self.low_blocks, self.teacher_low_blocks)
        wanted = "a number above 0, or low_blocks and a low_weight"
        require(any(self._weights), "high_weight", self.high_weight, wanted)

    @property
    def _weights(self) -> tuple[float, float]:
        """The weights of mimicking and generation; 0: the term is left out."""
        low, high = PUBLISHED_WEIGHTS if self.reduction == "sum" else MEAN_WEIGHTS
        low = low if self.low_weight is None else self.low_weight
        high = high if self.high_weight is None else self.high_weight
        return low if self.low_blocks else 0.0, high

    @property
    def needs_every_patch(self) -> bool:  # type: ignore[override]
        """Whether it generates: the generator is a convolution over the student's whole map."""
        return self._weights[1] > 0

    def _blocks(self) -> list[tuple[int, int]]:
        pairs = block_pairs("low_blocks", self.low_blocks, self.teacher_low_blocks)
        return pairs if self._weights[0] > 0 else []

    def student_needs(self, student: Network) -> Needs:
        hidden = frozenset(i for i, _ in self._blocks())
        return Needs(hidden=hidden, features=self.needs_every_patch)

    def teacher_needs(self, teacher: Network) -> Needs:
        hidden = frozenset(i for _, i in self._blocks())
        return Needs(hidden=hidden, features=self.needs_every_patch)

    def adapter(self, student: Network, teacher: Network) -> ViTKDAdapter:
        return ViTKDAdapter(
            student.dims[-1],
            teacher.dims[-1],
            [(student.dims[i], teacher.dims[j]) for i, j in self._blocks()],
            generates=self.needs_every_patch,
            masks=self.mask_rate > 0,
        )

    def describe(self, student: Network, teacher: Network, num_keep: int | None) -> str:
        low, high = self._weights
        note = f"low_weight {low:g}, high_weight {high:g} on {self.reduction}s"
        if num_keep is None or self.reduction == "mean":
            return note
        return f"{note}, times {teacher.num_patches / num_keep:.3g} to keep their scale"

    def loss(
        self, student: ViTOutput, teacher: ViTOutput, batch: Truth, adapter: ViTKDAdapter
    ) -> Scalar:
        low_weight, high_weight = self._weights
        terms = []
        if low_weight > 0:
            pairs = [(student.patches(i), teacher.patches(j)) for i, j in self._blocks()]
            patches = [of_student.at(places) for of_student, places in pairs]
            keep, grid = pairs[0][1].keep, pairs[0][1].grid
            seen = 1.0 if keep is None else keep.shape[1] / math.prod(grid)
            of_teacher = [places.vectors for _, places in pairs]
            low = mimicking_loss(adapter, patches, of_teacher, seen, self.reduction)
            terms.append(low_weight * low)
        if high_weight > 0:
            of_student, places = student.feature_patches, teacher.feature_patches
            whole = resample_patches(of_student.vectors, of_student.grid, places.grid)
            noise = batch.uniforms(whole.shape[1]) if self.mask_rate > 0 else None
            seen_of = places.vectors, places.grid, places.keep
            how = self.mask_rate, noise, self.reduction
            terms.append(high_weight * generation_loss(adapter, whole, *seen_of, *how))
        return reduce(add, terms)
