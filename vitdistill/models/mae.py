"""Masked autoencoders: decoder, whole network, initialisation and loss.

Source: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022, arXiv 2111.06377,
checked against facebookresearch/mae@efb2a80 and UCSC-VLAA/DMAE@a0f4959. What the authors' code
cannot do: images and patches that are not square, and encoders with no class token or with several
prefix tokens.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import RmsNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..errors import ConfigError
from ..vit.patches import gather_patches, random_masking
from ..vit.plain import PlainViT, project_qkv, split_heads

_NORMS = (nn.LayerNorm, RmsNorm)


def sincos_positions(dim: int, grid: tuple[int, int]) -> Float[Tensor, "1 L {dim}"]:
    """Return the fixed table of positions, ``(1, 1 + rows * columns, dim)``, float32.

    Zeros for the class token, then the patches, row-major: the one in row y and column x has
    ``[e(x) | e(y)]`` with ``e(t) = [sin(t w) | cos(t w)]`` and ``w_i = 10000^(-i / (dim / 4))``,
    computed in float64. Raises `ConfigError` if ``dim`` is not a multiple of 4.

    Source: ``get_2d_sincos_pos_embed`` of facebookresearch/mae@efb2a80.
    """
    if dim < 4 or dim % 4:
        raise ConfigError(
            f"sine-cosine positions need a width that is a multiple of 4, and this one is {dim}"
        )
    rows, columns = grid
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    x, y = torch.arange(columns).repeat(rows), torch.arange(rows).repeat_interleave(columns)
    halves = []
    for places in (x, y):
        angles = places[:, None].double() * frequencies
        halves += [angles.sin(), angles.cos()]
    table = torch.cat(halves, dim=1)
    return torch.cat([table.new_zeros(1, dim), table])[None].float()


def patchify(
    images: Float[Tensor, "B c h w"], patch_size: tuple[int, int]
) -> Float[Tensor, "B N pixels"]:
    """Cut images into patches that fill them, row-major, each by row, column, channel."""
    height, width = patch_size
    patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(
    patches: Float[Tensor, "B N pixels"], grid: tuple[int, int], patch_size: tuple[int, int]
) -> Float[Tensor, "B c h w"]:
    """Put patches together, the inverse of `patchify`; ``grid`` is rows and columns."""
    pixels = patches.unflatten(2, (*patch_size, -1)).unflatten(1, grid)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def pixel_targets(
    images: Float[Tensor, "B c h w"], patch_size: tuple[int, int], norm_pix: bool
) -> Float[Tensor, "B N pixels"]:
    """Return the pixels to predict for every patch of images as the network sees them.

    ``norm_pix``: each patch less its mean, over ``sqrt(var + 1e-6)`` with the unbiased variance.

    Source: arXiv 2111.06377 section 3; ``forward_loss`` of facebookresearch/mae@efb2a80.
    """
    target = patchify(images, patch_size)
    if norm_pix:
        deviation = (target.var(-1, keepdim=True) + 1e-6).sqrt()
        target = (target - target.mean(-1, keepdim=True)) / deviation
    return target


class MAEDecoder(nn.Module):
    """MAE's decoder for any encoder of width ``dim``, with the public checkpoints' names.

    It is initialised as MAE's. ``decoder_dim`` is a multiple of 4 and of ``decoder_num_heads``.
    """

    decoder_embed: nn.Linear
    mask_token: nn.Parameter
    decoder_pos_embed: nn.Parameter
    decoder_blocks: nn.ModuleList
    decoder_norm: nn.LayerNorm
    decoder_pred: nn.Linear

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        patch_size: tuple[int, int],
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size
        self._build_decoder(dim, grid, patch_size, decoder_dim, decoder_depth, decoder_num_heads)
        self.apply(_init_module)

    def _build_decoder(
        self,
        dim: int,
        grid: tuple[int, int],
        patch_size: tuple[int, int],
        decoder_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
    ) -> None:
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim).normal_(std=0.02))
        table = sincos_positions(decoder_dim, grid)
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_num_heads, qkv_bias=True, norm_layer=norm)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, math.prod(patch_size) * 3)

    def forward(
        self, features: Float[Tensor, "B L D"], keep: Int[Tensor, "B K"], num_prefix_tokens: int = 1
    ) -> Float[Tensor, "B N pixels"]:
        """Predict the pixels of every patch from the visible ones.

        ``features`` come after the encoder's final norm: P prefix tokens, which are decoded at the
        class token's position, then the patches at the row-major places ``keep``.
        """
        tokens = self.decoder_embed(features)
        prefix, visible = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
        places, positions = keep[:, :, None].expand_as(visible), self.decoder_pos_embed
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), positions.shape[1] - 1, -1)
        patches = hidden.scatter(1, places, visible)
        tokens = torch.cat([prefix + positions[:, :1], patches + positions[:, 1:]], dim=1)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, num_prefix_tokens:]

    def decode_hidden(
        self, features: Float[Tensor, "B L D"], keep: Int[Tensor, "B K"], num_prefix_tokens: int = 1
    ) -> tuple[Float[Tensor, "B M pixels"], Int[Tensor, "B M"]]:
        """Return pixels and places of the M hidden patches alone, as `forward`'s, to rounding."""
        # Two savings over `forward`. What enters the first block at a hidden patch is the same for
        # every image, so it is projected once for the batch and looked up. The last block computes
        # the hidden patches alone, since nobody reads the others. A single block is both.
        embedded = self.decoder_embed(features)
        positions = self.decoder_pos_embed
        num_patches = positions.shape[1] - 1
        num_hidden = num_patches - keep.shape[1]
        unseen = torch.ones(len(features), num_patches, device=keep.device).scatter(1, keep, 0.0)
        hidden = unseen.argsort(dim=1, descending=True, stable=True)[:, :num_hidden]
        blank = self.mask_token[0].to(embedded.dtype) + positions[0, 1:]
        of_patches = positions[:, 1:].expand(len(features), -1, -1)
        visible = embedded[:, num_prefix_tokens:] + gather_patches(of_patches, keep)
        seen = torch.cat([visible, embedded[:, :num_prefix_tokens] + positions[:, :1]], dim=1)
        tokens = torch.cat([F.embedding(hidden, blank), seen], dim=1)
        blocks: list[Any] = list(self.decoder_blocks)
        for block in blocks[:1]:
            projected = F.embedding(hidden, block.attn.qkv(block.norm1(blank)))
            of_hidden = split_heads(block.attn, projected, 3)
            rows = 0 if len(blocks) == 1 else None
            of_seen = project_qkv(block.attn, block.norm1(seen), rows, block.attn.qkv.bias)
            q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_hidden, of_seen, strict=True))
            tokens = _rest_of_block(block, tokens, q, k, v)
        for block in blocks[1:-1]:
            tokens = block(tokens)
        for block in blocks[1:][-1:]:
            q, k, v = project_qkv(block.attn, block.norm1(tokens), num_hidden, block.attn.qkv.bias)
            tokens = _rest_of_block(block, tokens, q, k, v)
        return self.decoder_pred(self.decoder_norm(tokens[:, :num_hidden])), hidden


def _rest_of_block(
    block: Any,
    tokens: Float[Tensor, "B L D"],
    q: Float[Tensor, "B H rows d"],
    k: Float[Tensor, "B H L d"],
    v: Float[Tensor, "B H L d"],
) -> Float[Tensor, "B rows D"]:
    """Finish a plain block for its first ``rows`` tokens; no dropout, scale or q/k norm."""
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    tokens = tokens[:, : q.shape[2]] + block.attn.proj(attended)
    return tokens + block.mlp(block.norm2(tokens))


class MaskedAutoencoder(MAEDecoder, VisionTransformer):
    """A plain ViT and MAE's decoder in one network, with the public MAE checkpoints' names."""

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ) -> None:
        VisionTransformer.__init__(
            self,
            img_size=image_size,
            patch_size=patch_size,
            num_classes=0,
            embed_dim=dim,
            depth=depth,
            num_heads=num_heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        grid, patch = self.patch_embed.grid_size, self.patch_embed.patch_size
        self._build_decoder(dim, grid, patch, decoder_dim, decoder_depth, decoder_num_heads)
        init_mae(self)

    def forward(  # type: ignore[override]  # it learns from hidden patches, and answers with pixels
        self, images: Float[Tensor, "B c h w"], noise: Float[Tensor, "B N"], mask_rate: float = 0.75
    ) -> tuple[Float[Tensor, "B N pixels"], Float[Tensor, "B N"]]:
        """Return the predicted pixels of every patch, and the mask: 1 at hidden patches."""
        assert tuple(images.shape[2:]) == self.patch_embed.img_size, "images are of another size"
        assert noise.shape[1] == self.patch_embed.num_patches, "noise is for another grid"
        keep, _, mask = random_masking(noise, mask_rate)
        encoder = PlainViT(self)
        tokens = encoder.embed(images, keep)
        for i in range(encoder.network.depth):
            tokens = encoder.run_block(i, tokens, None).tokens
        prefix = encoder.network.num_prefix_tokens
        return super().forward(encoder.norm(tokens), keep, prefix), mask


def init_mae(model: nn.Module) -> None:
    """Initialise a ViT as MAE does, in place; positions become the fixed sine-cosine table.

    Raises `ConfigError` for a network without positions.

    Source: ``initialize_weights`` of facebookresearch/mae@efb2a80.
    """
    hold_positions(model)
    model.apply(_init_module)
    embeds: Any = getattr(model, "embeds", model)  # NaFlexVit's module of patches and tokens
    projection: Any = getattr(embeds, "patch_embed", embeds).proj
    # The patch projection is seen as a matrix; its bias keeps PyTorch's own initialisation.
    fan_out, fan_in = len(projection.weight), projection.weight[0].numel()
    bound = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.uniform_(projection.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
    for name in ("cls_token", "dist_token", "reg_token"):
        token = getattr(embeds, name, None)
        if token is not None:
            nn.init.normal_(token, std=0.02)
    positions = embeds.pos_embed
    if positions is None:  # rotary positions alone, which nothing learns, or a learned bias
        return
    of_rows = positions.ndim == 4
    grid = positions.shape[1:3] if of_rows else embeds.patch_embed.grid_size
    table = sincos_positions(positions.shape[-1], grid)
    with torch.no_grad():
        tokens = positions.flatten(1, 2) if of_rows else positions
        num_prefix_tokens = tokens.shape[1] - table.shape[1] + 1  # 0: they have no position
        tokens[:, :num_prefix_tokens] = 0
        tokens[:, num_prefix_tokens:] = table[:, 1:]


def hold_positions(model: nn.Module) -> None:
    """Freeze the table of positions, as MAE does.

    Rotary positions stay as they are, and a bias by relative position is learned, as in BEiT.

    Raises `ConfigError` for a network that has none of these.
    """
    positions = getattr(getattr(model, "embeds", model), "pos_embed", None)
    if positions is not None:
        positions.requires_grad_(False)
    elif getattr(model, "rope", None) is None and not _has_bias(model):
        what = f"masked autoencoding needs positions of patches, which {type(model).__name__} lacks"
        raise ConfigError(what, "take a plain ViT with a table of them", field="student.model")


def _has_bias(model: nn.Module) -> bool:
    tables = (getattr(module, "relative_position_bias_table", None) for module in model.modules())
    return any(table is not None for table in tables)


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, _NORMS):
        if module.weight is not None:
            nn.init.ones_(module.weight)
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
