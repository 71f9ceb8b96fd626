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

from ..errors import ConfigError, Set
from .heads import TokenHeads
from .network import AttentionSource, Network
from .output import QKV, BlockRun


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
        self.network = _describe(model, self.blocks, self.attentions)
        self.num_head_tokens: int | None = None
        if len(self.network.heads) > 1:
            self.num_head_tokens = len(self.network.heads)
        elif model.attn_pool is None and model.global_pool == "token":
            self.num_head_tokens = 1

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Whether the forward pass is timm's own; a subclass that overrides it is run whole."""
        return (
            isinstance(model, VisionTransformer)
            and type(model).forward is VisionTransformer.forward
            and type(model).forward_features is VisionTransformer.forward_features
            and type(model).forward_head
            in (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head)
        )

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return rows and columns of the patch grid for images of this size."""
        return patch_grid(self.model.patch_embed, images)

    def embed(self, images: Float[Tensor, "B c h w"], keep: Int[Tensor, "B K"] | None) -> Tensor:
        """Return the tokens before block 0, ``(B, P+K, D)``."""
        model, prefix = self.model, self.network.num_prefix_tokens
        if keep is None:
            return model.norm_pre(self._drop_patches(self._place(model.patch_embed(images))))
        if model.training and not isinstance(model.patch_drop, nn.Identity | None):
            field = "student.model_args.patch_drop_rate"
            raise ConfigError("patches are both chosen and dropped", Set(field, 0), field=field)
        # Kept patches are embedded alone where that gives the same numbers. Dropout of positions
        # draws a mask for all tokens, and a stem of several convolutions looks beyond its patch.
        drops_positions = model.training and model.pos_drop.p > 0
        if type(model.patch_embed) is PatchEmbed and not drops_positions:
            positions = self._positions(images)
            patches = embed_kept(model.patch_embed, images, keep)
            patches = patches + positions[0, prefix:][keep]
            before = positions[:, :prefix].expand(len(images), -1, -1).to(patches.dtype)
        else:
            whole = self._place(model.patch_embed(images))
            batch = torch.arange(len(images), device=images.device)[:, None]
            before, patches = whole[:, :prefix], whole[batch, prefix + keep]
        return model.norm_pre(torch.cat([before, patches], dim=1))

    def _positions(self, images: Tensor) -> Float[Tensor, "1 L D"]:
        """Return the position of every token: what the model itself adds to zero patches."""
        model, dim = self.model, self.network.dim
        rows, columns = self.grid(images)
        shape = (1, rows, columns, dim) if model.dynamic_img_size else (1, rows * columns, dim)
        dtype = model.patch_embed.proj.weight.dtype
        return self._place(torch.zeros(shape, device=images.device, dtype=dtype))

    def _place(self, patches: Tensor) -> Float[Tensor, "B L D"]:
        """Put the prefix tokens before the patches, and add positions."""
        return self.model._pos_embed(patches)

    def _drop_patches(self, tokens: Tensor) -> Tensor:
        return self.model.patch_drop(tokens)

    def run_block(
        self, i: int, tokens: Tensor, rows: int | None, attention: bool = False, qkv: bool = False
    ) -> BlockRun:
        """Run block ``i``, for its first ``rows`` output tokens or (None) for all.

        ``attention`` and ``qkv`` ask for the record of these. Attention is float32, computed from
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
        if self.model.grad_checkpointing and self.model.training and torch.is_grad_enabled():
            return BlockRun(checkpoint(block, tokens, use_reentrant=False, **extra))
        return BlockRun(block(tokens, **extra))

    def _extra(self, i: int) -> dict[str, Any]:
        """Return what block ``i`` is given besides its tokens."""
        return {}

    def _walk_block(
        self, i: int, tokens: Tensor, rows: int | None, attention: bool, qkv: bool
    ) -> BlockRun:
        """Compute the block's own forward by hand, and record from its q, k and v."""
        block: Any = self.model.blocks[i]
        attn: Attention = block.attn
        x = self._enter(block, tokens)
        mean_row = attention and self.network.attention_source != "class"
        q, k, v = self._project(i, x, None if rows is None or mean_row or qkv else max(rows, 1))
        recorded = QKV(q, k, v) if qkv else None
        # A whole block keeps the fused kernel, so that it equals the model's own bit for bit, and
        # computes the class token's row a second time. A shortened block is cheaper explicitly,
        # and the row is a by-product.
        fused = rows is None and not mean_row and attn.fused_attn
        weights = row = None
        if attention or (rows != 0 and not fused):
            all_queries = mean_row or (rows is None and not fused)
            num_queries = q.shape[2] if all_queries else max(rows or 1, 1)
            weights = attention_rows(attn, q[:, :, :num_queries], k)
        if attention:
            assert weights is not None
            row = weights.mean(2) if mean_row else weights[:, :, 0]
        if rows == 0:
            return BlockRun(tokens[:, :0], row, recorded)
        if weights is None or fused:
            dropout = float(attn.attn_drop.p) if attn.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            out = attn.attn_drop(weights[:, :, :rows].to(v.dtype)) @ v
        out = attn.norm(out.transpose(1, 2).flatten(2))
        gate = getattr(attn, "gate", None)
        if gate is not None:
            out = out * gate(x[:, : out.shape[1]]).sigmoid()
        out = attn.proj_drop(attn.proj(out))
        return BlockRun(self._leave(block, tokens[:, : out.shape[1]], out), row, recorded)

    def _enter(self, block: Any, tokens: Tensor) -> Tensor:
        """Return what the block's attention reads."""
        return block.norm1(tokens)

    def _project(self, i: int, x: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q of the first ``rows`` tokens (None: all), k and v, as attention uses them."""
        attn: Any = self.model.blocks[i].attn
        return project_qkv(attn, x, rows, attn.qkv.bias)

    def _leave(self, block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's output to the tokens, and run the MLP on them."""
        tokens = tokens + block.drop_path1(block.ls1(attended))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def _pool_attention(self, tokens: Tensor) -> Float[Tensor, "B H L"]:
        """Return the attention of the pool's first latent; 0 on prefix tokens it does not read."""
        model, pool = self.model, self.model.attn_pool
        heads, size = (pool.num_heads, pool.head_dim), pool.num_heads * pool.head_dim
        skipped = 0 if _pool_reads_prefix(model) else model.num_prefix_tokens
        x = model.norm(tokens)[:, skipped:]
        if pool.pos_embed is not None:
            x = x + pool.pos_embed.unsqueeze(0).to(x.dtype)
        bias = None if pool.kv.bias is None else pool.kv.bias[:size]
        q = pool.q(pool.latent[:, :1]).unflatten(2, heads).transpose(1, 2)
        k = F.linear(x, pool.kv.weight[:size], bias).unflatten(2, heads).transpose(1, 2)
        scores = (pool.q_norm(q) * pool.scale) @ pool.k_norm(k).transpose(-2, -1)
        return F.pad(scores.float().softmax(-1)[:, :, 0], (skipped, 0))

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the final norm to the last block's output, token by token."""
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


def _pool_reads_prefix(model: Any) -> bool:
    # Eva has no setting for it: its attention pool reads every token, its other pools patches.
    return bool(getattr(model, "pool_include_prefix", model.attn_pool is not None))


def _describe(model: Any, blocks: tuple[type, ...], attentions: tuple[type, ...]) -> Network:
    depth, prefix = len(model.blocks), int(model.num_prefix_tokens)
    has_class_token = model.cls_token is not None and prefix > 0
    pools = model.attn_pool is not None or model.global_pool not in ("token", "")
    heads: tuple[str, ...] = ("class",)
    if isinstance(model, VisionTransformerDistilled):
        heads = ("class", "distillation")
    answering = heads
    if isinstance(model.head, TokenHeads):
        heads, answering = model.head.names, model.head.answering
    source: AttentionSource | None = None
    num_heads = 0
    if all(type(b) in blocks and type(b.attn) in attentions for b in model.blocks):
        num_heads = int(model.blocks[0].attn.num_heads)
        pool: AttentionSource = "pool" if type(model.attn_pool) is AttentionPoolLatent else "mean"
        source = "class" if has_class_token else pool
    height, width = model.patch_embed.patch_size
    return Network(
        depth=depth,
        dim=model.embed_dim,
        num_classes=int(model.num_classes),
        patch_size=(int(height), int(width)),
        num_prefix_tokens=prefix,
        has_class_token=has_class_token,
        heads=heads,
        answering=answering,
        walks=True,
        attention_source=source,
        dims=(model.embed_dim,) * depth,
        num_heads=num_heads,
        final_norm=not isinstance(model.norm, nn.Identity),
        reads_class_token=has_class_token and (not pools or _pool_reads_prefix(model)),
    )


def patch_grid(patch_embed: nn.Module, images: Tensor) -> tuple[int, int]:
    """Return rows and columns of patches; pixels that do not fill a patch may be dropped."""
    rows, columns = patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))  # type: ignore[operator]
    return int(rows), int(columns)


def embed_kept(patch_embed: PatchEmbed, images: Tensor, keep: Tensor) -> Float[Tensor, "B K D"]:
    """Embed the kept patches alone: gather their pixels, then project them in one product."""
    height, width = patch_embed.patch_size
    rows, columns = patch_grid(patch_embed, images)
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
    attn: Any, q: Float[Tensor, "B H rows d"], k: Float[Tensor, "B H L d"]
) -> Float[Tensor, "B H rows L"]:
    """Return the post-softmax attention of some queries over all keys, in float32."""
    return ((q * attn.scale) @ k.transpose(-2, -1)).float().softmax(-1)


def split_heads(attn: Any, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split ``(B, L, parts * H * d)`` into ``parts`` tensors ``(B, H, L, d)``."""
    shape = (parts, attn.num_heads, attn.head_dim)
    return projected.unflatten(2, shape).permute(2, 0, 3, 1, 4).unbind(0)


def project_qkv(
    attn: Any, x: Tensor, rows: int | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q of the first ``rows`` tokens (None: all), k and v, each ``(B, H, tokens, d)``.

    They come from one joint projection with ``bias``, and are normed where the attention norms.
    """
    weight = attn.qkv.weight
    if rows is None:
        q, k, v = split_heads(attn, F.linear(x, weight, bias), 3)
    else:
        size = attn.num_heads * attn.head_dim
        of_q, of_kv = (None, None) if bias is None else (bias[:size], bias[size:])
        (q,) = split_heads(attn, F.linear(x[:, :rows], weight[:size], of_q), 1)
        k, v = split_heads(attn, F.linear(x, weight[size:], of_kv), 2)
    return attn.q_norm(q), attn.k_norm(k), v
