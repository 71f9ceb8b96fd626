"""MaskedKD: the teacher sees only the patches the student attends to; and the paper's controls.

Source: "The Role of Masking for Efficient Supervised Knowledge Distillation of Vision
Transformers", Son et al., ECCV 2024, arXiv 2302.10494, checked against effl-lab/MaskedKD@96d052d.
Where they differ the code is followed by default: its softmax runs over all tokens, the class token
included; the paper's formula over patches alone is ``softmax_over="patches"``. What the authors'
code cannot do: map unequal patch grids by position, and leave distillation and register tokens out
of the choice. ``saliency="energy"`` is no part of the paper: it is for students without attention.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError, Set
from ..option import option
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import PatchMap, resample_patches, top_patches
from .base import Grid, Keep, Noise, TokenSelector, require

SoftmaxOver = Literal["tokens", "patches"]
Saliency = Literal["attention", "energy"]


def patch_saliency(
    attention: Float[Tensor, "B H L"],
    num_prefix_tokens: int = 1,
    softmax_over: SoftmaxOver = "tokens",
) -> Float[Tensor, "B N"]:
    """Return how much the class token attends to each patch, mean over heads.

    ``attention`` is the class token's row after the softmax over all L = P + N tokens. ``patches``
    renormalises each head; with ``tokens`` a head that attends to the class token weighs less.
    """
    patches = attention[:, :, num_prefix_tokens:]
    if softmax_over == "patches":
        patches = patches / patches.sum(-1, keepdim=True).clamp_min(1e-20)
    return patches.mean(1)


def select_patches(
    attention: Float[Tensor, "B H L"], num_keep: int, num_prefix_tokens: int = 1
) -> Int[Tensor, "B {num_keep}"]:
    """Return the ``num_keep`` patches of the highest `patch_saliency`, highest first."""
    return top_patches(patch_saliency(attention, num_prefix_tokens), num_keep)


def resample_saliency(
    saliency: Float[Tensor, "B N"], grid: Grid, to_grid: Grid
) -> Float[Tensor, "B M"]:
    """Resample saliency to another patch grid over the same image, by position."""
    return resample_patches(saliency[:, :, None], grid, to_grid)[:, :, 0]


def activation_energy(places: PatchMap) -> Float[Tensor, "B N"]:
    """Return the mean square over the channels of a whole feature map, float32, at its places.

    Source: the attention map ``F_sum^2`` of Zagoruyko and Komodakis, "Paying More Attention to
    Attention", ICLR 2017, arXiv 1612.03928, section 3.1, but for a factor.
    """
    return places.vectors.float().square().mean(-1)


@dataclass(frozen=True, kw_only=True)
class AttendedPatches(TokenSelector):
    """The patches that the class token of one network attends to most."""

    softmax_over: SoftmaxOver = option("tokens", "`tokens` as the code, `patches` as the paper")
    block: int = option(-1, "block whose class-token attention chooses; the paper uses the last")

    def most_attended(self, output: ViTOutput, grid: Grid, num_keep: int) -> Keep:
        """Return the patches of ``grid`` where ``output`` looks most."""
        attention = output.attention[self.block % output.depth].detach()
        saliency = patch_saliency(attention, output.num_prefix_tokens, self.softmax_over)
        return top_patches(resample_saliency(saliency, output.grid, grid), num_keep)


@dataclass(frozen=True, kw_only=True)
class MaskedKD(AttendedPatches):
    """The teacher sees the patches the student attends to most.

    A student without attention (CNN, Swin) can choose by the energy of a feature map, the mean
    square over its channels: our extension, not the paper's. ``block`` is then that of a stage.
    """

    saliency: Saliency = option(
        "attention", "`attention` as published; `energy` of the student's feature map after `block`"
    )

    paper = "MaskedKD (Son et al., ECCV 2024, arXiv 2302.10494)"
    use_when = "The teacher is a plain ViT; half of the patches costs half of its forward pass."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saliency == "energy":
            wanted = "left out: the energy of a feature map has no softmax"
            require(
                self.softmax_over == "tokens", "selector.softmax_over", self.softmax_over, wanted
            )

    def student_needs(self, student: Network) -> Needs:
        block = frozenset({self.block})
        return Needs(hidden=block) if self.saliency == "energy" else Needs(attention=block)

    def check(self, student: Network, teacher: Network) -> None:
        if self.saliency == "attention" and student.attention_source is None:
            what = f"MaskedKD reads the student's attention, and {student.architecture} has none"
            fix = Set("selector.saliency", "energy"), "take the selector random_patches"
            raise ConfigError(what, fix, field="student.model")
        super().check(student, teacher)

    def select(
        self, grid: Grid, num_keep: int, student: ViTOutput, teacher: ViTOutput | None, noise: Noise
    ) -> Keep:
        if self.saliency == "attention":
            return self.most_attended(student, grid, num_keep)
        places = student.patches(self.block)
        if places.grid == (1, 1):
            what = f"the student's map after block {self.block} is 1 x 1, so no patch stands out"
            earlier = Set("selector.block", max(self.block % student.depth - 1, 0))
            raise ConfigError(what, earlier, field="selector.block")
        energy = activation_energy(places).detach()
        return top_patches(resample_saliency(energy, places.grid, grid), num_keep)


@dataclass(frozen=True, kw_only=True)
class RandomPatches(TokenSelector):
    """The teacher sees random patches, drawn anew per sample and view: the paper's control."""

    paper = "the control of MaskedKD (Son et al., ECCV 2024, arXiv 2302.10494)"
    use_when = "To see what choosing is worth."
    reads_noise: ClassVar[bool] = True

    def select(
        self, grid: Grid, num_keep: int, student: ViTOutput, teacher: ViTOutput | None, noise: Noise
    ) -> Keep:
        assert noise is not None
        return top_patches(noise, num_keep)


@dataclass(frozen=True, kw_only=True)
class TeacherGuided(AttendedPatches):
    """The teacher sees the patches it attends to itself in a second, whole pass: a control."""

    paper = RandomPatches.paper
    use_when = "To see what the student's own choice loses; it costs a second pass of the teacher."

    def teacher_needs(self, teacher: Network) -> Needs:
        return Needs(attention=frozenset({self.block}))

    def select(
        self, grid: Grid, num_keep: int, student: ViTOutput, teacher: ViTOutput | None, noise: Noise
    ) -> Keep:
        assert teacher is not None
        return self.most_attended(teacher, grid, num_keep)
