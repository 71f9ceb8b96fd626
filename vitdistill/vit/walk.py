"""A recorded forward pass over an unmodified Vision Transformer: any patch subset, any last block,
nothing more computed.

Shape letters: B images, L tokens, P prefix tokens, N patches, K kept patches, H heads, D width, C
classes.
"""

from dataclasses import dataclass, field, replace

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ConfigError
from .families import QKV, Family, family_of
from .patches import PatchMap


@dataclass(frozen=True)
class Needs:
    """What to record in one forward pass; ``|`` unites the needs of several readers.

    Args:
        logits: the model's prediction, and each head's own where it has several.
        hidden: blocks whose output (the residual stream, before the final norm) is recorded.
            Negative indices count from the end.
        attention: blocks whose class-token attention (post-softmax) is recorded. Negative indices
            count from the end.
        qkv: blocks whose queries, keys and values are recorded. Negative indices count from the
            end.
        features: the last block's output after the final norm, what timm's ``forward_features``
            gives.

    Example:
        >>> (Needs(logits=True) | Needs(hidden=frozenset({0}))) == Needs(True, frozenset({0}))
        True
    """

    logits: bool = False
    hidden: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    qkv: frozenset[int] = frozenset()
    features: bool = False

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.logits or other.logits,
            self.hidden | other.hidden,
            self.attention | other.attention,
            self.qkv | other.qkv,
            self.features or other.features,
        )

    def __bool__(self) -> bool:
        return self.logits or self.features or bool(self.hidden | self.attention | self.qkv)

    def resolve(self, depth: int) -> "Needs":
        """The same needs with indices in ``0 .. depth-1``; raises `IndexError` for a block the
        model does not have.
        """

        def absolute(blocks: frozenset[int]) -> frozenset[int]:
            for block in blocks:
                if not -depth <= block < depth:
                    there = "1 block (0)" if depth == 1 else f"{depth} blocks (0 to {depth - 1})"
                    raise IndexError(f"block {block} does not exist: the model has {there}")
            return frozenset(block % depth for block in blocks)

        return Needs(
            self.logits,
            absolute(self.hidden),
            absolute(self.attention),
            absolute(self.qkv),
            self.features,
        )

    def num_blocks(self, depth: int) -> int:
        """How many of the model's ``depth`` blocks have to run, counted from the first."""
        needs = self.resolve(depth)
        return (
            depth
            if needs.logits or needs.features
            else max(needs.hidden | needs.attention | needs.qkv, default=-1) + 1
        )


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


def run_vit(
    model: nn.Module,
    images: Float[Tensor, "B channels height width"],
    needs: Needs,
    keep: Int[Tensor, "B K"] | None = None,
) -> ViTOutput:
    """Run as much of ``model`` on as many patches as ``needs`` and ``keep`` ask for, and record it.

    Only kept patches are embedded; blocks nobody reads from do not run; in the last block only the
    tokens the head reads are computed; no head is computed unless logits are needed. When every
    token is read the result equals ``model(images)`` bit for bit; the shortened last block and the
    gathered patch embedding agree with it to rounding.

    Args:
        model: a timm model, left as it is. Models outside the families give logits and hidden
            states of whole images only.
        images: normalised as the model expects.
        needs: what to record.
        keep: row-major indices into the patch grid, any order, one row an image; None for every
            patch.

    Raises:
        IndexError: a needed block does not exist.
        ConfigError: the model cannot give what is asked (patch subsets or attention outside the
            families).
    """
    family = family_of(model)
    needs = needs.resolve(family.depth)
    if not family.walks:
        if keep is not None or needs.attention or needs.qkv:
            what = "patches to choose from" if keep is not None else "attention to record"
            raise ConfigError(f"{type(model).__name__} is not a plain ViT and has no {what}")
        return _run_whole(family, images, needs)
    last = needs.num_blocks(family.depth) - 1
    hidden, attention, qkv = {}, {}, {}
    tokens = family.embed(images, keep)
    for i in range(last + 1):
        at_end = i == family.depth - 1
        reads_all = (
            i < last
            or i in needs.hidden
            or (at_end and needs.features)
            or (needs.logits and family.num_head_tokens is None)
        )
        rows = None if reads_all else (family.num_head_tokens if needs.logits else 0)
        ran = family.run_block(i, tokens, rows, i in needs.attention, i in needs.qkv)
        tokens = ran.tokens
        if i in needs.hidden:
            hidden[i] = tokens
        if ran.attention is not None:
            attention[i] = ran.attention
        if ran.qkv is not None:
            qkv[i] = ran.qkv
    logits = head_logits = features = None
    if needs.logits or needs.features:
        normed = family.norm(tokens)
        features = normed if needs.features else None
        if needs.logits:
            logits, head_logits = family.head(normed)
    return ViTOutput(
        logits=logits,
        head_logits=head_logits,
        heads=family.heads,
        hidden=hidden,
        attention=attention,
        qkv=qkv,
        features=features,
        keep=keep,
        grid=family.grid(images),
        num_prefix_tokens=family.num_prefix_tokens,
        has_class_token=family.has_class_token,
        depth=family.depth,
    )


def _run_whole(family: Family, images: Tensor, needs: Needs) -> ViTOutput:
    logits, maps, last = family.run_whole(images, needs.logits, needs.hidden, needs.features)
    grids = {i: (int(stage.shape[2]), int(stage.shape[3])) for i, stage in maps.items()}
    if last is not None:
        grids[family.depth - 1] = (int(last.shape[2]), int(last.shape[3]))
    return ViTOutput(
        logits=logits,
        hidden={i: stage.flatten(2).transpose(1, 2) for i, stage in maps.items()},
        features=None if last is None else last.flatten(2).transpose(1, 2),
        grids=grids,
        depth=family.depth,
    )
