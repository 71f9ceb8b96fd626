"""What one forward pass recorded."""

from dataclasses import dataclass, field, replace

from jaxtyping import Float, Int
from torch import Tensor

from .families import QKV
from .patches import PatchMap


@dataclass(frozen=True)
class ViTOutput:
    """What one forward pass recorded.

    Attributes:
        logits: ``(B, C)``, the prediction the model's own ``forward`` gives in evaluation; None
            unless needed.
        head_logits: ``(B, heads, C)`` for models with several heads (DeiT: class token,
            distillation token); else None.
        heads: their names, in order.
        hidden: block index to ``(B, P+K, D)``.
        attention: block index to ``(B, H, P+K)``, float32: how the class token attends to all
            tokens. A model without a class token gives its stand-in, see
            `vitdistill.vit.families.Family.attention_source`.
        qkv: block index to queries, keys and values, each ``(B, H, P+K, d)``, after the block's q/k
            norms and before the scale.
        features: ``(B, P+K, D)`` after the final norm, where the network has one; the last feature
            map of networks that are run whole.
        keep: ``(B, K)`` row-major indices of the patches that were seen; None: all of them, in
            order.
        grid: rows and columns of the patch grid.
        grids: block index to the rows and columns of its hidden states, where they are not ``grid``
            (networks that are run whole).
        num_prefix_tokens: P, tokens that are not patches.
        has_class_token: the first of them stands for the whole image.
        depth: blocks the model has, to resolve indices that count from the end.
    """

    logits: Float[Tensor, "B C"] | None = None
    head_logits: Float[Tensor, "B heads C"] | None = None
    heads: tuple[str, ...] = ("class",)
    hidden: dict[int, Float[Tensor, "B _ _"]] = field(default_factory=dict)
    attention: dict[int, Float[Tensor, "B H L"]] = field(default_factory=dict)
    qkv: dict[int, QKV] = field(default_factory=dict)
    features: Float[Tensor, "B L D"] | None = None
    keep: Int[Tensor, "B K"] | None = None
    grid: tuple[int, int] = (0, 0)
    grids: dict[int, tuple[int, int]] = field(default_factory=dict)
    num_prefix_tokens: int = 0
    has_class_token: bool = False
    depth: int = 0

    def patches(self, block: int) -> PatchMap:
        """The patches' hidden states after ``block`` (negative counts from the end), and where they
        are.
        """
        block %= self.depth
        return PatchMap(
            self.hidden[block][:, self.num_prefix_tokens :],
            self.grids.get(block, self.grid),
            self.keep,
        )

    def first_patches(self, keep: Int[Tensor, "B K"]) -> "ViTOutput":
        """The same record of the first K of the patches that were seen, ``keep``; logits are of all
        of them, attention is not to be cut.
        """
        size = self.num_prefix_tokens + keep.shape[1]
        return replace(
            self,
            hidden={i: tokens[:, :size] for i, tokens in self.hidden.items()},
            qkv={i: QKV(*(t[:, :, :size] for t in qkv)) for i, qkv in self.qkv.items()},
            features=None if self.features is None else self.features[:, :size],
            keep=keep,
        )

    def tensors(self) -> list[Tensor]:
        """Everything recorded, as a flat list of floating-point tensors."""
        single = [t for t in (self.logits, self.head_logits, self.features) if t is not None]
        return [
            *single,
            *self.hidden.values(),
            *self.attention.values(),
            *(t for qkv in self.qkv.values() for t in qkv),
        ]

    @property
    def feature_patches(self) -> PatchMap:
        """The patches' features after the final norm, and where they are."""
        assert self.features is not None
        return PatchMap(
            self.features[:, self.num_prefix_tokens :],
            self.grids.get(self.depth - 1, self.grid),
            self.keep,
        )
