"""The plain ViT in timm's forms: any prefix tokens, pooling, norms and sizes."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from .heads import TokenHeads
from .network import AttentionSource, Network
from .output import QKV, BlockRun
from .patches import full_precision, gather_patches


class PlainViT:
    """timm's `VisionTransformer` and `VisionTransformerDistilled`, and students with `TokenHeads`.

    `run_vit` walks it: embed patches, run blocks one by one, norm, answer.

    Attributes:
        network: the description of the model.
        num_head_tokens: the head reads only the first so many tokens; None: it may read all.
    """

    blocks: ClassVar[tuple[type, ...]] = (Block,)
    attentions: ClassVar[tuple[type, ...]] = (Attention,)

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.network = self._describe()
        self.num_head_tokens: int | None = None
        if len(self.network.heads) > 1:
            self.num_head_tokens = len(self.network.heads)
        elif self._attn_pool is None and self.model.global_pool == "token":
            self.num_head_tokens = 1

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Whether the forward pass is timm's own; a subclass that overrides it is run whole."""
        heads = VisionTransformer.forward_head, VisionTransformerDistilled.forward_head
        has_own = runs_as(model, VisionTransformer, "forward", "forward_features")
        return has_own and getattr(type(model), "forward_head", None) in heads

    @property
    def patch_embed(self) -> Any:
        return self.model.patch_embed

    @property
    def _attn_pool(self) -> Any:
        return self.model.attn_pool

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return rows and columns of the patch grid for images of this size.

        Pixels that do not fill a patch may be dropped.
        """
        rows, columns = self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        return int(rows), int(columns)

    def embed(self, images: Float[Tensor, "B c h w"], keep: Int[Tensor, "B K"] | None) -> Tensor:
        """Return the tokens before block 0, ``(B, P+K, D)``."""
        model, prefix = self.model, self.network.num_prefix_tokens
        if keep is None:
            return self._begin(self._drop_patches(self._embed_all(images)))
        if model.training and not isinstance(
            getattr(model, "patch_drop", None), nn.Identity | None
        ):
            what = "the network drops patches at random, so none can be chosen"
            raise ConfigError(what, "build it with patch_drop_rate=0", field="student.model_args")
        if self._embeds_patches_alone():
            positions = self._positions(images)
            patches = self._embed_kept(images, keep)
            patches = patches + positions[0, prefix:][keep]
            before = positions[:, :prefix].expand(len(images), -1, -1).to(patches.dtype)
        else:
            whole = self._embed_all(images)
            before, patches = whole[:, :prefix], gather_patches(whole[:, prefix:], keep)
        return self._begin(torch.cat([before, patches], dim=1))

    def _embed_all(self, images: Tensor) -> Float[Tensor, "B L D"]:
        return self._place(self.patch_embed(images))

    def _embed_kept(self, images: Tensor, keep: Tensor) -> Float[Tensor, "B K D"]:
        """Return the kept patches without positions, embedded alone."""
        return embed_kept(self.patch_embed, images, keep, self.grid(images))

    def _embeds_patches_alone(self) -> bool:
        """Whether kept patches can be embedded alone, to the same numbers."""
        # Dropout of positions draws a mask for all tokens, and a stem of several convolutions looks
        # beyond its patch.
        return type(self.patch_embed) is PatchEmbed and not self._drops(self.model.pos_drop)

    def _drops(self, dropout: Any) -> bool:
        return bool(self.model.training and dropout.p > 0)

    def _positions(self, images: Tensor) -> Float[Tensor, "1 L D"]:
        """Return the position of every token: what the model itself adds to zero patches."""
        rows, columns = self.grid(images)
        dynamic = getattr(self.model, "dynamic_img_size", False)
        shape = (1, rows, columns) if dynamic else (1, rows * columns)
        dtype = self.patch_embed.proj.weight.dtype
        return self._place(
            torch.zeros((*shape, self.network.dim), device=images.device, dtype=dtype)
        )

    def _place(self, patches: Tensor) -> Float[Tensor, "B L D"]:
        """Put the prefix tokens before the patches, and add positions."""
        return self.model._pos_embed(patches)

    def _drop_patches(self, tokens: Tensor) -> Tensor:
        return self.model.patch_drop(tokens)

    def _begin(self, tokens: Tensor) -> Tensor:
        """Apply what comes between the embedding and block 0."""
        return self.model.norm_pre(tokens)

    def run_block(
        self, i: int, tokens: Tensor, rows: int | None, attention: bool = False, qkv: bool = False
    ) -> BlockRun:
        """Run block ``i``, for its first ``rows`` output tokens or (None) for all.

        ``attention`` and ``qkv`` say what to record. Attention is float32, computed from
        the block's own q and k; see `Network.attention_source` for what stands for the class token.
        """
        block: Any = self.model.blocks[i]
        source = self.network.attention_source
        if (attention or qkv) and source is None:
            raise ConfigError(f"the attention of {type(block).__name__} cannot be recorded")
        if attention and source == "pool" and i == self.network.depth - 1:
            ran = self.run_block(i, tokens, None, qkv=qkv)  # the pool reads the finished block
            return BlockRun(ran.tokens, self._pool_attention(ran.tokens), ran.qkv)
        if source is not None and (attention or qkv or rows is not None):
            return self._walk_block(i, tokens, rows, attention, qkv)
        extra = self._extra(i)
        if self._checkpoints():
            return BlockRun(checkpoint(block, tokens, use_reentrant=False, **extra))
        return BlockRun(block(tokens, **extra))

    def _checkpoints(self) -> bool:
        """Whether the backward pass recomputes activations, to save memory."""
        model = self.model
        return bool(model.grad_checkpointing and model.training and torch.is_grad_enabled())

    def _extra(self, i: int) -> dict[str, Any]:
        """Return what block ``i`` is given besides its tokens."""
        return {}

    def _walk_block(
        self, i: int, tokens: Tensor, rows: int | None, attention: bool, qkv: bool
    ) -> BlockRun:
        """Compute the block's own forward by hand, and record from its q, k and v."""
        block: Any = self.model.blocks[i]
        attn: Any = block.attn
        x = self._enter(block, tokens)
        mean_row = attention and self.network.attention_source != "class"
        q, k, v = self._project(i, x, None if rows is None or mean_row or qkv else max(rows, 1))
        recorded = QKV(q, k, v) if qkv else None
        # A whole block keeps the fused kernel, so that it equals the model's own bit for bit, and
        # computes the class token's row a second time. A shortened block is cheaper explicitly,
        # and the row is a by-product.
        fused = rows is None and not mean_row and attn.fused_attn
        all_queries = mean_row or (rows is None and not fused)
        num_queries = q.shape[2] if all_queries else max(rows or 1, 1)
        bias = None
        if attention or rows != 0:
            bias = self._bias(i, None if fused else num_queries)
        weights = row = None
        if attention or (rows != 0 and not fused):
            of_rows = None if bias is None else bias[..., :num_queries, :]
            weights = attention_rows(attn, q[:, :, :num_queries], k, of_rows)
        if attention:
            assert weights is not None
            row = weights.mean(2) if mean_row else weights[:, :, 0]
        if rows == 0:
            return BlockRun(tokens[:, :0], row, recorded)
        if weights is None or fused:
            dropout = float(attn.attn_drop.p) if attn.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        else:
            out = attn.attn_drop(weights[:, :, :rows].to(v.dtype)) @ v
        out = out.transpose(1, 2).flatten(2)
        out = attn.proj_drop(attn.proj(self._merge(attn, x[:, : out.shape[1]], out)))
        return BlockRun(self._leave(block, tokens[:, : out.shape[1]], out), row, recorded)

    def _enter(self, block: Any, tokens: Tensor) -> Tensor:
        return block.norm1(tokens)

    def _project(self, i: int, x: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q of the first ``rows`` tokens (None: all), k and v, as attention uses them."""
        attn: Any = self.model.blocks[i].attn
        return project_qkv(attn, x, rows, attn.qkv.bias)

    def _bias(self, i: int, rows: int | None) -> Float[Tensor, "*images H rows L"] | None:
        """Return what is added to the scores of the first ``rows`` queries (None: of all)."""
        return None

    def _merge(self, attn: Any, x: Tensor, attended: Tensor) -> Tensor:
        """Return what the output projection reads, from the joined heads."""
        attended = attn.norm(attended)
        gate = getattr(attn, "gate", None)
        return attended if gate is None else attended * gate(x).sigmoid()

    def _leave(self, block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's output to the tokens, and run the MLP on them."""
        tokens = tokens + block.drop_path1(block.ls1(attended))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def _pool_attention(self, tokens: Tensor) -> Float[Tensor, "B H L"]:
        """Return the attention of the pool's first latent; 0 on prefix tokens it does not read."""
        pool = self._attn_pool
        heads, size = (pool.num_heads, pool.head_dim), pool.num_heads * pool.head_dim
        skipped = 0 if self._pool_reads_prefix() else self.network.num_prefix_tokens
        x = self.norm(tokens)[:, skipped:]
        if pool.pos_embed is not None:
            x = x + pool.pos_embed.unsqueeze(0).to(x.dtype)
        bias = None if pool.kv.bias is None else pool.kv.bias[:size]
        q = pool.q(pool.latent[:, :1]).unflatten(2, heads).transpose(1, 2)
        k = F.linear(x, pool.kv.weight[:size], bias).unflatten(2, heads).transpose(1, 2)
        q, k = pool.q_norm(q).expand(len(x), -1, -1, -1), pool.k_norm(k)
        return F.pad(attention_rows(pool, q, k)[:, :, 0], (skipped, 0))

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def head(
        self, features: Tensor
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B heads C"] | None]:
        """Return the logits, and each head's own if there are several."""
        model = self.model
        if isinstance(model, VisionTransformerDistilled):
            by_class = model.head(model.head_drop(features[:, 0]))
            by_distillation = model.head_dist(model.head_drop(features[:, 1]))
            return (by_class + by_distillation) / 2, torch.stack([by_class, by_distillation], dim=1)
        if isinstance(model.head, TokenHeads):
            logits = model.head.logits(model.forward_head(features, pre_logits=True))
            return model.head.predict(logits), logits
        return model.forward_head(features), None

    def _pool_reads_prefix(self) -> bool:
        # Eva has no setting for it: its attention pool reads every token, its other pools patches.
        return bool(getattr(self.model, "pool_include_prefix", self._attn_pool is not None))

    def _has_class_token(self) -> bool:
        return self.model.cls_token is not None and self.model.num_prefix_tokens > 0

    def _describe(self) -> Network:
        model, has_class_token = self.model, self._has_class_token()
        pools = self._attn_pool is not None or model.global_pool not in ("token", "")
        heads: tuple[str, ...] = ("class",)
        if isinstance(model, VisionTransformerDistilled):
            heads = ("class", "distillation")
        answering = heads
        if isinstance(model.head, TokenHeads):
            heads, answering = model.head.names, model.head.answering
        source: AttentionSource | None = None
        num_heads, depth = 0, len(model.blocks)
        if all(type(b) in self.blocks and type(b.attn) in self.attentions for b in model.blocks):
            num_heads = int(model.blocks[0].attn.num_heads)
            by_pool = type(self._attn_pool) is AttentionPoolLatent
            source = "class" if has_class_token else "pool" if by_pool else "mean"
        height, width = self.patch_embed.patch_size
        return Network(
            depth=depth,
            dim=model.embed_dim,
            num_classes=int(model.num_classes),
            patch_size=(int(height), int(width)),
            num_prefix_tokens=int(model.num_prefix_tokens),
            has_class_token=has_class_token,
            heads=heads,
            answering=answering,
            walks=True,
            attention_source=source,
            dims=(model.embed_dim,) * depth,
            num_heads=num_heads,
            # Without any norm, features are what the classifier pools, as after a norm.
            final_norm=not isinstance(model.norm, nn.Identity)
            or isinstance(getattr(model, "fc_norm", None), nn.Identity | None),
            reads_class_token=has_class_token and (not pools or self._pool_reads_prefix()),
        )


def runs_as(model: nn.Module, kind: type, *methods: str) -> bool:
    """Whether a model is of this class and overrides none of these methods."""
    own = (getattr(type(model), name, None) is getattr(kind, name) for name in methods)
    return isinstance(model, kind) and all(own)


def embed_kept(
    patch_embed: Any, images: Tensor, keep: Tensor, grid: tuple[int, int]
) -> Float[Tensor, "B K D"]:
    """Embed the kept patches alone: gather their pixels, then project them in one product."""
    height, width = patch_embed.patch_size
    rows, columns = grid
    if patch_embed.dynamic_img_pad:
        below, right = rows * height - images.shape[-2], columns * width - images.shape[-1]
        images = F.pad(images, (0, right, 0, below))
    images = images[:, :, : rows * height, : columns * width]
    patches = images.unflatten(3, (columns, width)).unflatten(2, (rows, height))
    batch = torch.arange(len(images), device=images.device)[:, None]
    pixels = patches.permute(0, 2, 4, 1, 3, 5)[batch, keep // columns, keep % columns].flatten(2)
    weight = patch_embed.proj.weight.flatten(1)
    return patch_embed.norm(F.linear(pixels, weight, patch_embed.proj.bias))


def attention_rows(
    attn: Any,
    q: Float[Tensor, "B H rows d"],
    k: Float[Tensor, "B H L d"],
    bias: Float[Tensor, "*images H rows L"] | None = None,
) -> Float[Tensor, "B H rows L"]:
    """Return the post-softmax attention of some queries over all keys, in float32."""
    if q.dtype == torch.float16:  # which is infinite beyond 65504; fused kernels sum in float32
        with full_precision(q):
            scores = (q.float() * attn.scale) @ k.float().transpose(-2, -1)
    else:
        scores = ((q * attn.scale) @ k.transpose(-2, -1)).float()
    return (scores if bias is None else scores + bias).softmax(-1)


def split_heads(attn: Any, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split ``(B, L, parts * H * d)`` into ``parts`` tensors ``(B, H, L, d)``."""
    heads = projected.unflatten(2, (parts, attn.num_heads, -1))
    return heads.permute(2, 0, 3, 1, 4).unbind(0)


def project_qkv(
    attn: Any, x: Tensor, rows: int | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q of the first ``rows`` tokens (None: all), k and v, each ``(B, H, tokens, d)``.

    They come from one joint projection with ``bias``, and are normed where the attention norms.
    """
    q, k, v = project_jointly(attn, x, rows, bias)
    return attn.q_norm(q), attn.k_norm(k), v


def project_jointly(
    attn: Any, x: Tensor, rows: int | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Do `project_qkv` for attention without norms."""
    weight = attn.qkv.weight
    if rows is None:
        q, k, v = split_heads(attn, F.linear(x, weight, bias), 3)
        return q, k, v
    size = len(weight) // 3
    of_q, of_kv = (None, None) if bias is None else (bias[:size], bias[size:])
    (q,) = split_heads(attn, F.linear(x[:, :rows], weight[:size], of_q), 1)
    k, v = split_heads(attn, F.linear(x, weight[size:], of_kv), 2)
    return q, k, v


def add_scaled(block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
    """Add attention and MLP to the tokens as timm's pre-norm blocks with ``gamma_1`` do."""
    tokens = tokens + block.drop_path1(_scaled(attended, block.gamma_1))
    answer = block.mlp(block.norm2(tokens))
    return tokens + block.drop_path2(_scaled(answer, block.gamma_2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x
