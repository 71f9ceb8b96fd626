"""ViTs with a relative position bias in attention: timm's `Beit`, of BEiT and BEiT v2."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .output import BlockRun
from .plain import PlainViT, add_scaled, project_jointly, runs_as


class BiasedViT(PlainViT):
    """timm's `Beit`: a plain ViT whose scores get a learned number for each relative position.

    The numbers are gathered for the patches that were embedded last, so an instance serves one
    forward pass. Recorded attention includes them; recorded q and k do not.
    """

    blocks: ClassVar[tuple[type, ...]] = (Block,)
    attentions: ClassVar[tuple[type, ...]] = (Attention,)

    seen: Tensor | None = None
    """Tokens that were embedded, ``(B, P+K)``, as rows of a table of positions; None: all."""

    shared: Tensor | None = None
    """The bias of every block, ``(H, L, L)``, or of the kept patches of each image."""

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        return runs_as(model, Beit, "forward", "forward_features", "forward_head")

    @property
    def _attn_pool(self) -> Any:
        return None

    def embed(self, images: Float[Tensor, "B c h w"], keep: Int[Tensor, "B K"] | None) -> Tensor:
        self.seen = None
        if keep is not None:
            self.seen = torch.cat([torch.zeros_like(keep[:, :1]), keep + 1], dim=1)
        table = self.model.rel_pos_bias
        shared = None if table is None else self._gather(table, None)
        # For all patches, drop the image axis as timm does: another kernel rounds differently.
        self.shared = shared[0] if shared is not None and keep is None else shared
        return super().embed(images, keep)

    def _place(self, patches: Tensor) -> Float[Tensor, "B L D"]:
        model = self.model
        tokens = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return model.pos_drop(tokens if model.pos_embed is None else tokens + model.pos_embed)

    def _drop_patches(self, tokens: Tensor) -> Tensor:
        return tokens

    def _begin(self, tokens: Tensor) -> Tensor:
        return tokens

    def run_block(
        self, i: int, tokens: Tensor, rows: int | None, attention: bool = False, qkv: bool = False
    ) -> BlockRun:
        if self.seen is None:
            return super().run_block(i, tokens, rows, attention, qkv)
        # timm's own block would add its table for all patches.
        asked = (i, tokens, rows, attention, qkv)
        if self._checkpoints():
            return BlockRun(*checkpoint(self._walk_block, *asked, use_reentrant=False))
        return self._walk_block(*asked)

    def _extra(self, i: int) -> dict[str, Any]:
        return {"shared_rel_pos_bias": self.shared}

    def _bias(self, i: int, rows: int | None) -> Float[Tensor, "*images H rows L"] | None:
        shared = None if self.shared is None else self.shared[..., :rows, :]
        attn: Any = self.model.blocks[i].attn
        if attn.relative_position_bias_table is None:
            return shared
        own = self._gather(attn, rows)
        return own if shared is None else own + shared

    def _gather(self, table: Any, rows: int | None) -> Float[Tensor, "images H rows L"]:
        """Return a table's numbers from the first ``rows`` tokens (None: all) to all tokens."""
        index = table.relative_position_index
        if self.seen is None:
            index = index[None, :rows]
        else:
            index = index[self.seen[:, :rows, None], self.seen[:, None]]
        return table.relative_position_bias_table[index].permute(0, 3, 1, 2)

    def _project(self, i: int, x: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
        attn: Any = self.model.blocks[i].attn
        bias = None
        if attn.q_bias is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        return project_jointly(attn, x, rows, bias)

    def _merge(self, attn: Any, x: Tensor, attended: Tensor) -> Tensor:
        return attended

    def _leave(self, block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
        return add_scaled(block, tokens, attended)
