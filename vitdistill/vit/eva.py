"""ViTs with rotary positions: timm's `Eva`.

DINOv3, EUPE, Perception Encoder, EVA, EVA-02, RoPE ViTs, LingBot and Sapiens2 are built on it.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from timm.layers import AttentionRope, apply_keep_indices_nlc, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from .plain import PlainViT, add_scaled, project_qkv, runs_as


class RotaryViT(PlainViT):
    """timm's `Eva`: a plain ViT whose queries and keys are turned by their patch's position.

    Recorded q and k are those after the rotation. Under grouped-query attention, k and v are
    repeated for every query head. The rotary table belongs to the images that were embedded last,
    so an instance serves one forward pass.
    """

    blocks: ClassVar[tuple[type, ...]] = (EvaBlock, EvaBlockPostNorm)
    attentions: ClassVar[tuple[type, ...]] = (EvaAttention, AttentionRope)

    rope: Tensor | None = None

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        own = "forward", "forward_features", "forward_head", "pool", "_pos_embed"
        return runs_as(model, Eva, *own)

    def embed(self, images: Float[Tensor, "B c h w"], keep: Int[Tensor, "B K"] | None) -> Tensor:
        tokens = super().embed(images, keep)
        if keep is not None and self.rope is not None:
            rope = apply_keep_indices_nlc(tokens, self.rope, keep)
            # Blocks take a table (images, heads, patches, 2 d); mixed tables have one a block.
            mixed = self.model.rope_mixed
            self.rope = rope.transpose(0, 1) if mixed else rope.unsqueeze(1)
        return tokens

    def _place(self, patches: Tensor) -> Float[Tensor, "B L D"]:
        tokens, self.rope = self.model._pos_embed(patches)
        return tokens

    def _drop_patches(self, tokens: Tensor) -> Tensor:
        return tokens  # `_pos_embed` has dropped them, and their rows of the rotary table

    def _extra(self, i: int) -> dict[str, Any]:
        if self.rope is None:
            return {"rope": None}
        return {"rope": self.rope[i] if self.model.rope_mixed else self.rope}

    def _enter(self, block: Any, tokens: Tensor) -> Tensor:
        return tokens if isinstance(block, EvaBlockPostNorm) else block.norm1(tokens)

    def _project(self, i: int, x: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
        attn: Any = self.model.blocks[i].attn
        if attn.qkv is not None:
            q, k, v = project_qkv(attn, x, rows, _bias_of(attn))
        else:
            joined = attn.q_proj(x[:, :rows]), attn.k_proj(x), attn.v_proj(x)
            q, k, v = (t.unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for t in joined)
            q, k = attn.q_norm(q), attn.k_norm(k)
        rope = self._extra(i)["rope"]
        if rope is not None:
            q, k = (_rotate(attn, vectors, rope).type_as(v) for vectors in (q, k))
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return q, k, v

    def _leave(self, block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
        if isinstance(block, EvaBlockPostNorm):
            tokens = tokens + block.drop_path1(block.norm1(attended))
            return tokens + block.drop_path2(block.norm2(block.mlp(tokens)))
        return add_scaled(block, tokens, attended)


def _bias_of(attn: Any) -> Tensor | None:
    """Return the bias of the joint projection; `EvaAttention` trains it in parts, k has none."""
    if isinstance(attn, EvaAttention):
        parts: Any = (attn.q_bias, attn.k_bias, attn.v_bias)
        return None if attn.q_bias is None else torch.cat(parts)
    bias: Tensor | None = attn.qkv.bias
    return bias


def _rotate(attn: Any, vectors: Float[Tensor, "B H rows d"], rope: Tensor) -> Tensor:
    """Rotate the vectors of patches; prefix tokens have no position and stay."""
    prefix = attn.num_prefix_tokens
    before, patches = vectors[:, :, :prefix], vectors[:, :, prefix:]
    turned = apply_rot_embed_cat(patches, rope[..., : patches.shape[2], :], half=attn.rotate_half)
    return torch.cat([before, turned], dim=2)
