"""The plain ViT in timm's forms: class, distillation or register tokens or none, any pooling, layer
scale, q/k norm, dynamic sizes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from .family import QKV, BlockRun, Family
from .heads import TokenHeads


def patch_grid(patch_embed: nn.Module, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches for images of this size (a fixed-size embedding drops what does
    not fill a patch).
    """
    rows, columns = patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))  # type: ignore[operator]
    return int(rows), int(columns)


def embed_kept(patch_embed: PatchEmbed, images: Tensor, keep: Tensor) -> Float[Tensor, "B K D"]:
    """The patch projection of kept patches alone: their pixels are gathered first, and projected by
    one matrix product.
    """
    height, width = patch_embed.patch_size
    rows, columns = patch_grid(patch_embed, images)
    if patch_embed.dynamic_img_pad:
        images = F.pad(
            images, (0, columns * width - images.shape[-1], 0, rows * height - images.shape[-2])
        )
    images = images[:, :, : rows * height, : columns * width]
    patches = (
        images.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
    )
    batch = torch.arange(len(images), device=images.device)[:, None]
    pixels = patches[batch, keep // columns, keep % columns].flatten(2)
    return patch_embed.norm(
        F.linear(pixels, patch_embed.proj.weight.flatten(1), patch_embed.proj.bias)
    )


def attention_rows(attn: Attention, q: Tensor, k: Tensor) -> Float[Tensor, "B H rows L"]:
    """Post-softmax attention of the queries ``q`` ``(B, H, rows, d)`` over the keys ``k`` ``(B, H,
    L, d)``, in float32.
    """
    return ((q * attn.scale) @ k.transpose(-2, -1)).float().softmax(-1)


def split_heads(attn: Attention, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    """``(B, tokens, parts * H * d)`` as ``parts`` tensors ``(B, H, tokens, d)``."""
    return (
        projected.unflatten(2, (parts, attn.num_heads, attn.head_dim))
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )


def project_qkv(attn: Attention, x: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """q of the first ``rows`` tokens (None: all), k and v of every token, each ``(B, H, tokens,
    d)``.
    """
    if rows is None:
        q, k, v = split_heads(attn, attn.qkv(x), 3)
    else:
        size = attn.num_heads * attn.head_dim
        weight, bias = attn.qkv.weight, attn.qkv.bias
        (q,) = split_heads(
            attn, F.linear(x[:, :rows], weight[:size], None if bias is None else bias[:size]), 1
        )
        k, v = split_heads(
            attn, F.linear(x, weight[size:], None if bias is None else bias[size:]), 2
        )
    return attn.q_norm(q), attn.k_norm(k), v


class PlainViT(Family):
    """timm's `VisionTransformer` and `VisionTransformerDistilled`, and students with a token for
    each teacher (`TokenHeads`).

    The class-token attention of a block comes from its own q and k, so that every block keeps its
    fastest attention kernel. A network without a class token that pools by attention gives the
    pool's query; one that averages gives the mean row (see `Family`).
    """

    walks = True
    model: VisionTransformer

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__(model)
        self.depth = len(model.blocks)
        self.dim = model.embed_dim
        self.dims = (self.dim,) * self.depth
        distilled = isinstance(model, VisionTransformerDistilled)
        self.num_prefix_tokens = self._count_prefix_tokens()
        self.has_class_token = model.cls_token is not None and self.num_prefix_tokens > 0
        pools = model.attn_pool is not None or model.global_pool not in ("token", "")
        self.reads_class_token = self.has_class_token and (
            not pools or bool(model.pool_include_prefix)
        )
        if distilled:
            self.heads = self.answering = ("class", "distillation")
            self.num_head_tokens = 2
        elif isinstance(model.head, TokenHeads):
            self.heads, self.answering = model.head.names, model.head.answering
            self.num_head_tokens = len(self.heads)
        elif model.attn_pool is None and model.global_pool == "token":
            self.num_head_tokens = 1
        if all(type(block) is Block and type(block.attn) is Attention for block in model.blocks):
            self.num_heads = int(model.blocks[0].attn.num_heads)  # type: ignore[arg-type, union-attr]
            if self.has_class_token:
                self.attention_source = "class"
            else:
                self.attention_source = (
                    "pool" if type(model.attn_pool) is AttentionPoolLatent else "mean"
                )

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Exact only while the forward pass is timm's own: a subclass that overrides it is not
        walked by hand.
        """
        return (
            isinstance(model, VisionTransformer)
            and type(model).forward is VisionTransformer.forward
            and type(model).forward_features is VisionTransformer.forward_features
            and type(model).forward_head
            in (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head)
        )

    def _count_prefix_tokens(self) -> int:
        if self.model.pos_embed is not None:
            return int(self.model.num_prefix_tokens)
        # timm before 1.0.22 drops every prefix token of a model without position embedding: believe
        # what it does, not what it says.
        with torch.no_grad():
            return (
                self.model._pos_embed(
                    self.model.patch_embed.proj.weight.new_zeros(1, 1, self.dim)
                ).shape[1]
                - 1
            )

    def grid(self, images: Tensor) -> tuple[int, int]:
        return patch_grid(self.model.patch_embed, images)

    def embed(self, images: Float[Tensor, "B c h w"], keep: Int[Tensor, "B K"] | None) -> Tensor:
        model = self.model
        if keep is None:
            return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        if model.training and not isinstance(model.patch_drop, nn.Identity):
            raise ConfigError(
                "patch_drop_rate drops patches at random, which a masking or a patch selector does"
                " already: set it to 0"
            )
        prefix = self.num_prefix_tokens
        plain_embed = type(model.patch_embed) is PatchEmbed and not (
            model.training and model.pos_drop.p > 0
        )
        if plain_embed:
            rows, columns = self.grid(images)
            shape = (
                (1, rows, columns, self.dim)
                if model.dynamic_img_size
                else (1, rows * columns, self.dim)
            )
            # The position of every token, prefix tokens included, in the model's own words: what it
            # adds to zero patches.
            positions = model._pos_embed(
                torch.zeros(shape, device=images.device, dtype=model.patch_embed.proj.weight.dtype)
            )
            patches = embed_kept(model.patch_embed, images, keep)
            patches = patches + positions[0, prefix:][keep]
            tokens = torch.cat(
                [positions[:, :prefix].expand(len(images), -1, -1).to(patches.dtype), patches],
                dim=1,
            )
        else:
            whole = model._pos_embed(model.patch_embed(images))
            batch = torch.arange(len(images), device=images.device)[:, None]
            tokens = torch.cat([whole[:, :prefix], whole[batch, prefix + keep]], dim=1)
        return model.norm_pre(tokens)

    def run_block(
        self, i: int, tokens: Tensor, rows: int | None, attention: bool = False, qkv: bool = False
    ) -> BlockRun:
        block: Any = self.model.blocks[i]
        standard = self.attention_source is not None
        if (attention or qkv) and not standard:
            raise ConfigError(
                f"the attention of {type(block).__name__} cannot be recorded: choose a network of"
                " standard blocks"
            )
        of_pool = (
            attention and self.attention_source == "pool" and i == self.depth - 1
        )  # the pool reads the finished block
        if of_pool:
            ran = self.run_block(i, tokens, None, qkv=qkv)
            return BlockRun(ran.tokens, self._pool_attention(ran.tokens), ran.qkv)
        if standard and (attention or qkv or rows is not None):
            return self._walk_block(block, tokens, rows, attention, qkv)
        if self.model.grad_checkpointing and self.model.training and torch.is_grad_enabled():
            return BlockRun(checkpoint(block, tokens, use_reentrant=False))
        return BlockRun(block(tokens))

    def _walk_block(
        self, block: Any, tokens: Tensor, rows: int | None, attention: bool, qkv: bool
    ) -> BlockRun:
        """timm's `Block.forward` by hand, for the first ``rows`` tokens (None: all), with what is
        recorded read off q, k and v.
        """
        attn: Attention = block.attn
        x = block.norm1(tokens)
        mean_row = attention and self.attention_source != "class"
        q, k, v = project_qkv(attn, x, None if rows is None or mean_row or qkv else max(rows, 1))
        recorded = QKV(q, k, v) if qkv else None
        fused = rows is None and not mean_row and attn.fused_attn
        weights = row = None
        if attention or (rows != 0 and not fused):
            num_queries = (
                q.shape[2] if mean_row or (rows is None and not fused) else max(rows or 1, 1)
            )
            weights = attention_rows(attn, q[:, :, :num_queries], k)
        if attention:
            assert weights is not None
            row = weights.mean(2) if mean_row else weights[:, :, 0]
        if rows == 0:
            return BlockRun(tokens[:, :0], row, recorded)
        if weights is None or fused:
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=float(attn.attn_drop.p) if attn.training else 0.0
            )
        else:
            out = attn.attn_drop(weights[:, :, :rows].to(v.dtype)) @ v
        out = attn.norm(out.transpose(1, 2).flatten(2))
        gate = getattr(attn, "gate", None)
        if gate is not None:
            out = out * gate(x[:, : out.shape[1]]).sigmoid()
        out = attn.proj_drop(attn.proj(out))
        tokens = tokens[:, : out.shape[1]] + block.drop_path1(block.ls1(out))
        return BlockRun(
            tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), row, recorded
        )

    def _pool_attention(self, tokens: Tensor) -> Float[Tensor, "B H L"]:
        """Attention of the attention pool's first latent over the tokens; prefix tokens the pool
        does not read get 0.
        """
        model, pool = self.model, self.model.attn_pool
        x = model.norm(tokens)
        skipped = 0 if model.pool_include_prefix else model.num_prefix_tokens
        x = x[:, skipped:]
        if pool.pos_embed is not None:
            x = x + pool.pos_embed.unsqueeze(0).to(x.dtype)
        q = pool.q(pool.latent[:, :1]).unflatten(2, (pool.num_heads, pool.head_dim)).transpose(1, 2)
        size = pool.num_heads * pool.head_dim
        bias = None if pool.kv.bias is None else pool.kv.bias[:size]
        k = (
            F.linear(x, pool.kv.weight[:size], bias)
            .unflatten(2, (pool.num_heads, pool.head_dim))
            .transpose(1, 2)
        )
        row = (
            ((pool.q_norm(q) * pool.scale) @ pool.k_norm(k).transpose(-2, -1))
            .float()
            .softmax(-1)[:, :, 0]
        )
        return F.pad(row, (skipped, 0))

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def head(
        self, features: Tensor
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B heads C"] | None]:
        model = self.model
        if isinstance(model, VisionTransformerDistilled):
            by_class = model.head(model.head_drop(features[:, 0]))
            by_distillation = model.head_dist(model.head_drop(features[:, 1]))
            return (by_class + by_distillation) / 2, torch.stack([by_class, by_distillation], dim=1)
        if isinstance(model.head, TokenHeads):
            logits = model.head.logits(model.forward_head(features, pre_logits=True))
            return model.head.predict(logits), logits
        return model.forward_head(features), None
