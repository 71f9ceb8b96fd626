"""The interface between `run_vit` and a family of networks."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn


class QKV(NamedTuple):
    """Queries, keys and values of one block, each ``(B, H, L, d)``, after its q/k norms and before
    the scale ``d ** -0.5``.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class BlockRun(NamedTuple):
    """What running one block gave: its output tokens, the class token's attention ``(B, H, L)``,
    and its q, k and v.
    """

    tokens: Tensor
    attention: Tensor | None = None
    qkv: QKV | None = None


class Family(ABC):
    """One model seen as: embed patches, run blocks one by one, answer.

    Attributes:
        depth: number of blocks.
        dim: width of the token stream.
        dims: width after each block; empty: hidden states cannot be recorded.
        num_heads: attention heads a block; 0 where attention cannot be recorded.
        num_prefix_tokens: P, tokens before the patches (class, distillation, register).
        has_class_token: the first token stands for the whole image.
        reads_class_token: the prediction is made of it, and not of a pool of the patches alone.
        num_head_tokens: the head reads the first this-many tokens only; None: it may read every
            token.
        heads: names of the classifier heads; more than one only with distillation or teacher
            tokens.
        answering: those of them that the prediction is made of.
        walks: whether `run_vit` can walk it block by block, on any patch subset; otherwise
            `run_whole` is all there is.
        attention_source: what stands for "class-token attention": the class token's own row;
            ``pool``: the query of an attention pool (last block only; other blocks fall back on
                ``mean``); ``mean``: the mean over all tokens' rows, i.e. how much
            attention a patch receives, an honest stand-in for networks that average their patches;
            None: not to be had.
    """

    depth: int
    dim: int
    dims: tuple[int, ...] = ()
    num_heads: int = 0
    num_prefix_tokens: int = 0
    has_class_token: bool = False
    reads_class_token: bool = True
    num_head_tokens: int | None = None
    heads: tuple[str, ...] = ("class",)
    answering: tuple[str, ...] = ("class",)
    walks: bool = False
    attention_source: Literal["class", "pool", "mean"] | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Whether ``model`` is of this family, so that walking it by hand equals its own
        forward.
        """

    def run_whole(
        self, images: Tensor, logits: bool, hidden: frozenset[int], features: bool
    ) -> tuple[Tensor | None, dict[int, Tensor], Tensor | None]:
        """Logits, feature maps ``(B, D, rows, columns)`` and the last of them after the final norm,
        of whole images.

        For networks that cannot be walked.
        """
        raise AssertionError("only families that do not walk are run whole")

    @abstractmethod
    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patch grid for images of this size."""

    @abstractmethod
    def embed(self, images: Float[Tensor, "B c h w"], keep: Int[Tensor, "B K"] | None) -> Tensor:
        """The tokens before block 0, ``(B, P+K, D)``."""

    @abstractmethod
    def run_block(
        self, i: int, tokens: Tensor, rows: int | None, attention: bool = False, qkv: bool = False
    ) -> BlockRun:
        """Block ``i`` on the tokens: all of its output, or only the first ``rows`` tokens of it;
        and what else is asked for.

        The class token's attention is float32.
        """

    @abstractmethod
    def norm(self, tokens: Tensor) -> Tensor:
        """The final norm of the last block's output, token by token."""

    @abstractmethod
    def head(
        self, features: Tensor
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B heads C"] | None]:
        """Logits from the normed last block's output, and each head's own where there are
        several.
        """
