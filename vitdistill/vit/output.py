"""What one forward pass recorded."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from .network import Network
from .patches import PatchMap


class QKV(NamedTuple):
    """Queries, keys and values, each ``(B, H, L, d)``, after q/k norms and before the scale."""

    q: Tensor
    k: Tensor
    v: Tensor


class BlockRun(NamedTuple):
    """What one block gave: tokens, the class token's attention ``(B, H, L)``, q, k and v."""

    tokens: Tensor
    attention: Tensor | None = None
    qkv: QKV | None = None


@dataclass(frozen=True)
class ViTOutput:
    """What one forward pass recorded; everything is None or empty unless it was needed.

    Attributes:
        logits: the prediction that the model's own ``forward`` gives in evaluation.
        head_logits: each head's own, in the order of ``network.heads``, if there are several.
        hidden: tokens by block, P prefix tokens first, then K patches; patches alone if the class
            token joins them at the end (CaiT).
        attention: by block, float32: how the class token attends to all tokens, or its stand-in,
            see `Network.attention_source`.
        qkv: queries, keys and values by block.
        features: tokens after the final norm, if the network has one: P prefix tokens, then K
            patches, or the last feature map of a network that is run whole.
        keep: row-major indices of the patches that were seen; None: all, in order.
        grid: rows and columns of the patch grid of these images.
        grids: rows and columns of hidden states by block, if they differ from ``grid``.
        network: the network that ran, as its family describes it.
    """

    logits: Float[Tensor, "B C"] | None = None
    head_logits: Float[Tensor, "B heads C"] | None = None
    hidden: dict[int, Float[Tensor, "B _ _"]] = field(default_factory=dict)
    attention: dict[int, Float[Tensor, "B H L"]] = field(default_factory=dict)
    qkv: dict[int, QKV] = field(default_factory=dict)
    features: Float[Tensor, "B L D"] | None = None
    keep: Int[Tensor, "B K"] | None = None
    grid: tuple[int, int] = (0, 0)
    grids: dict[int, tuple[int, int]] = field(default_factory=dict)
    network: Network = field(default_factory=Network)

    @property
    def depth(self) -> int:
        return self.network.depth

    @property
    def num_prefix_tokens(self) -> int:
        return self.network.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        return self.network.has_class_token

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the classifier heads, in the order of ``head_logits``."""
        return self.network.heads

    @property
    def feature_patches(self) -> PatchMap:
        """The patches' features after the final norm, and their places."""
        assert self.features is not None
        return self._places(self.features, self.depth - 1)

    def patches(self, block: int) -> PatchMap:
        """Return the patches and places after ``block``; a negative one counts from the end."""
        block %= self.depth
        return self._places(self.hidden[block], block)

    def class_token(self, block: int) -> Float[Tensor, "B 1 D"] | None:
        """Return the class token after ``block``; None: it has none there."""
        tokens = self.hidden[block % self.depth]
        alone = tokens.shape[1] == self.patches(block).vectors.shape[1]
        return None if alone or not self.has_class_token else tokens[:, :1]

    def _places(self, tokens: Tensor, block: int) -> PatchMap:
        grid = self.grids.get(block, self.grid)
        count = grid[0] * grid[1] if self.keep is None else self.keep.shape[1]
        return PatchMap(tokens[:, tokens.shape[1] - count :], grid, self.keep)

    def first_patches(self, keep: Int[Tensor, "B K"]) -> "ViTOutput":
        """Return the record of only the first K patches seen, which are ``keep``."""
        # Logits still describe all patches; attention cannot be sliced, and nobody reads it here.
        size = self.num_prefix_tokens + keep.shape[1]
        return replace(
            self,
            hidden={i: tokens[:, :size] for i, tokens in self.hidden.items()},
            qkv={i: QKV(*(t[:, :, :size] for t in qkv)) for i, qkv in self.qkv.items()},
            features=None if self.features is None else self.features[:, :size],
            keep=keep,
        )

    def rows(self, index: Int[Tensor, " R"]) -> "ViTOutput":
        """Return the record of some of the images."""

        def take(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return replace(
            self,
            logits=take(self.logits),
            head_logits=take(self.head_logits),
            hidden={i: tokens[index] for i, tokens in self.hidden.items()},
            attention={i: rows[index] for i, rows in self.attention.items()},
            qkv={i: QKV(*(t[index] for t in qkv)) for i, qkv in self.qkv.items()},
            features=take(self.features),
            keep=take(self.keep),
        )

    def tensors(self) -> list[Tensor]:
        """Return every recorded floating-point tensor, in a flat list."""
        single = [t for t in (self.logits, self.head_logits, self.features) if t is not None]
        several = [*self.hidden.values(), *self.attention.values()]
        return [*single, *several, *(t for qkv in self.qkv.values() for t in qkv)]
