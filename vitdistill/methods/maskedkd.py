"""MaskedKD: the teacher sees only the patches the student attends to; and the paper's controls.

Source: "The Role of Masking for Efficient Supervised Knowledge Distillation of Vision
Transformers", Son et al., ECCV 2024, arXiv 2302.10494, checked against effl-lab/MaskedKD@96d052d.
Where they differ the code is followed by default: its softmax runs over all tokens, the class token
included; the paper's formula over patches alone is ``softmax_over="patches"``. What the authors'
code cannot do: map unequal patch grids by position, and leave distillation and register tokens out
of the choice.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError, Drop, Set
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import resample_patches
from .base import TokenSelector


def patch_saliency(
    attention: Float[Tensor, "B H L"],
    num_prefix_tokens: int = 1,
    softmax_over: Literal["tokens", "patches"] = "tokens",
) -> Float[Tensor, "B N"]:
    """Return how much the class token attends to each patch, mean over heads.

    ``attention`` is the class token's row after the softmax over all L = P + N tokens.
    ``softmax_over="patches"`` renormalises each head over the patches, which equals a softmax over
    them alone.
    """
    patches = attention[:, :, num_prefix_tokens:]
    if softmax_over == "patches":
        patches = patches / patches.sum(-1, keepdim=True).clamp_min(1e-20)
    return patches.mean(1)


def select_patches(
    attention: Float[Tensor, "B H L"], num_keep: int, num_prefix_tokens: int = 1
) -> Int[Tensor, "B {num_keep}"]:
    """Return the ``num_keep`` patches with the highest class-token attention, highest first.

    Args:
        attention: of the class token, post-softmax, prefix tokens first; heads are averaged.
        num_keep: at most the number of patches.
        num_prefix_tokens: class, distillation and register tokens, which are never chosen.

    Source: arXiv 2302.10494 section 3; effl-lab/MaskedKD@96d052d.
    """
    return patch_saliency(attention, num_prefix_tokens).topk(num_keep, dim=-1).indices


def resample_saliency(
    saliency: Float[Tensor, "B N"], grid: tuple[int, int], to_grid: tuple[int, int]
) -> Float[Tensor, "B M"]:
    """Resample saliency to another patch grid over the same image, by position."""
    return resample_patches(saliency[:, :, None], grid, to_grid)[:, :, 0]


def _check_teacher(selector: TokenSelector, teacher: Network) -> None:
    if not teacher.walks:
        raise ConfigError(
            f"{type(selector).__name__} shows a teacher a subset of its patches, and the"
            f" {teacher.name} ({teacher.architecture}) cannot be run on one",
            fix=("take a plain ViT as teacher", Set("selector.teachers"), Drop("selector")),
            field="selector.teachers",
        )
    selector.count(teacher.num_patches)


@dataclass(frozen=True, kw_only=True)
class MaskedKD(TokenSelector):
    """The teacher sees the patches the student attends to most.

    Args:
        softmax_over: ``tokens`` as the authors' code (a head that attends to the class token weighs
            less), ``patches`` as the paper.
        block: the student's block whose class-token attention chooses; the paper uses the last.
    """

    softmax_over: Literal["tokens", "patches"] = "tokens"
    block: int = -1

    paper: ClassVar[str] = (
        "MaskedKD (Son et al., ECCV 2024, [2302.10494](https://arxiv.org/abs/2302.10494))"
    )
    use_when: ClassVar[str] = (
        "Whenever the teacher is a plain ViT and its forward pass is a large part of a step; half"
        " of the patches costs half of the teacher."
    )

    def student_needs(self, student: Network) -> Needs:
        return Needs(attention=frozenset({self.block}))

    def check(self, student: Network, teacher: Network) -> None:
        if student.attention_source is None:
            raise ConfigError(
                "MaskedKD reads the student's attention over its patches, and"
                f" {student.architecture} has none",
                fix=("take a plain ViT as student", "take the selector random_patches"),
                field="student.model",
            )
        _check_teacher(self, teacher)

    def select(
        self,
        grid: tuple[int, int],
        num_keep: int,
        student: ViTOutput,
        teacher: ViTOutput | None,
        noise: Float[Tensor, "B N"] | None,
    ) -> Int[Tensor, "B K"]:
        attention = student.attention[self.block % student.depth]
        saliency = patch_saliency(attention.detach(), student.num_prefix_tokens, self.softmax_over)
        return resample_saliency(saliency, student.grid, grid).topk(num_keep, dim=-1).indices


@dataclass(frozen=True, kw_only=True)
class RandomPatches(TokenSelector):
    """The teacher sees random patches, others for every sample and view: the paper's control."""

    paper: ClassVar[str] = (
        "the control of MaskedKD (Son et al., ECCV 2024,"
        " [2302.10494](https://arxiv.org/abs/2302.10494))"
    )
    use_when: ClassVar[str] = (
        "To see what choosing is worth, or with a student that has no attention."
    )
    reads_noise: ClassVar[bool] = True

    def check(self, student: Network, teacher: Network) -> None:
        _check_teacher(self, teacher)

    def select(
        self,
        grid: tuple[int, int],
        num_keep: int,
        student: ViTOutput,
        teacher: ViTOutput | None,
        noise: Float[Tensor, "B N"] | None,
    ) -> Int[Tensor, "B K"]:
        assert noise is not None
        return noise.topk(num_keep, dim=-1).indices


@dataclass(frozen=True, kw_only=True)
class TeacherGuided(TokenSelector):
    """The teacher sees the patches it attends to itself, at the cost of a second, whole pass.

    The paper's control.

    Args:
        softmax_over: as in `MaskedKD`.
        block: the teacher's block whose class-token attention chooses.
    """

    softmax_over: Literal["tokens", "patches"] = "tokens"
    block: int = -1

    paper: ClassVar[str] = (
        "the control of MaskedKD (Son et al., ECCV 2024,"
        " [2302.10494](https://arxiv.org/abs/2302.10494))"
    )
    use_when: ClassVar[str] = (
        "To see what the student's own choice loses; it costs a second, whole pass of the teacher."
    )

    def teacher_needs(self, teacher: Network) -> Needs:
        return Needs(attention=frozenset({self.block}))

    def check(self, student: Network, teacher: Network) -> None:
        _check_teacher(self, teacher)
        if teacher.attention_source is None:
            raise ConfigError(
                f"the {teacher.name} ({teacher.architecture}) has no attention to guide the choice",
                fix="take a plain ViT as teacher",
                field=f"teachers.{teacher.name}.model",
            )

    def select(
        self,
        grid: tuple[int, int],
        num_keep: int,
        student: ViTOutput,
        teacher: ViTOutput | None,
        noise: Float[Tensor, "B N"] | None,
    ) -> Int[Tensor, "B K"]:
        assert teacher is not None
        attention = teacher.attention[self.block % teacher.depth]
        saliency = patch_saliency(attention, teacher.num_prefix_tokens, self.softmax_over)
        return saliency.topk(num_keep, dim=-1).indices
