"""ViTs that take patches with coordinates: timm's `NaFlexVit`, of SigLIP2 NaFlex and C-RADIO."""

from typing import Any

import torch
from jaxtyping import Float
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit, batch_patchify
from torch import Tensor, nn

from .patches import gather_patches
from .plain import PlainViT, runs_as


class NaFlexViT(PlainViT):
    """timm's `NaFlexVit`: a plain ViT on any grid, to which positions are resampled."""

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Do as `PlainViT.accepts`, but run rotary positions whole: timm has them as `Eva` too."""
        own = "forward", "forward_features", "forward_head", "_forward_embeds", "_pool"
        known = isinstance(model, NaFlexVit) and runs_as(model, NaFlexVit, *own)
        return known and model.rope is None and type(model.embeds) is NaFlexEmbeds

    @property
    def patch_embed(self) -> Any:
        return self.model.embeds

    def _has_class_token(self) -> bool:
        return bool(self.model.has_class_token)

    def _embed_all(self, images: Tensor) -> Float[Tensor, "B L D"]:
        tokens, _ = self.patch_embed(images)
        return tokens

    def _embed_kept(self, images: Tensor, keep: Tensor) -> Float[Tensor, "B K D"]:
        embed = self.patch_embed
        if not embed.is_linear:
            return super()._embed_kept(images, keep)
        pad, last = embed.dynamic_img_pad, getattr(embed, "channels_last", True)  # timm 1.0.27
        pixels, _ = batch_patchify(images, embed.patch_size, pad=pad, channels_last=last)
        kept = gather_patches(pixels, keep)
        return embed.norm(embed.proj(kept if embed.norm_input is None else embed.norm_input(kept)))

    def _embeds_patches_alone(self) -> bool:
        return not self._drops(self.patch_embed.pos_drop)

    def _positions(self, images: Tensor) -> Float[Tensor, "1 L D"]:
        embed, (rows, columns) = self.patch_embed, self.grid(images)
        place = getattr(embed, f"_apply_{embed.pos_embed_type}_pos_embed", None)
        shape, dtype = (1, rows * columns, self.network.dim), embed.proj.weight.dtype
        patches = torch.zeros(shape, device=images.device, dtype=dtype)
        if place is not None:
            place(patches, grid_size=[rows, columns])  # in place
        parts = (embed.cls_token, embed.reg_token, patches)
        return torch.cat([part for part in parts if part is not None], dim=1)

    def _drop_patches(self, tokens: Tensor) -> Tensor:
        drop = self.model.patch_drop
        return drop(tokens)[0] if drop is not None and self.model.training else tokens
