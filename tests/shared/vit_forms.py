"""Small random networks in every form that a family walks, and timm's own run of their blocks."""

import copy
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import nn

SMALL: dict[str, Any] = {
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "img_size": 64,
    "num_classes": 7,
}

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "two tokens": ("deit_tiny_distilled_patch16_224", {}),
    "class token without position": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "registers, average pooling": ("vit_little_patch16_reg4_gap_256", {}),
    "average pooling": ("vit_medium_patch16_gap_240", {}),
    "average pooling with class token": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "max pooling": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "pre-norm (CLIP)": ("vit_base_patch16_clip_224", {}),
    "layer scale, q/k norm": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 1e-5}),
    "no qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "no final norm": ("vit_tiny_patch16_224", {"final_norm": False}),
    "no position embedding": (
        "vit_tiny_patch16_224",
        {"pos_embed": "none", "class_token": False, "global_pool": "avg"},
    ),
    "oblong image and patches": (
        "vit_tiny_patch16_224",
        {"img_size": (32, 96), "patch_size": (8, 16)},
    ),
    "dynamic size": ("vit_tiny_patch16_224", {"dynamic_img_size": True, "img_size": 48}),
    "dynamic size with padding": (
        "vit_tiny_patch16_224",
        {"dynamic_img_size": True, "dynamic_img_pad": True},
    ),
    "rotary (DINOv3)": ("vit_small_patch16_dinov3", {}),
    "rotary, separate projections (DINOv3)": ("vit_small_plus_patch16_dinov3", {"img_size": 48}),
    "rotary, swiglu (EVA-02)": ("eva02_tiny_patch14_224", {"img_size": 56}),
    "rotary, norms within (EVA-02)": ("eva02_base_patch16_clip_224", {}),
    "rotary, attention pooling (PE)": ("vit_pe_core_tiny_patch16_384", {"num_heads": 3}),
    "rotary, no class token": (
        "vit_pe_spatial_tiny_patch16_512",
        {"class_token": False, "global_pool": "avg"},
    ),
    "rotary, mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "rotary, axial with positions": ("vit_small_patch16_rope_ape_224", {}),
    "rotary, registers": ("vit_medium_patch16_rope_reg1_gap_256", {}),
    "rotary, grouped queries (Sapiens2)": (
        "vit_base_patch16_sapiens2",
        {"num_heads": 4, "num_kv_heads": (None, 2, 2), "img_size": 64, "embed_dim": 64},
    ),
    "rotary, norm after": ("eva02_enormous_patch14_clip_224", {"img_size": 56}),
    "EVA without rotation": ("eva_giant_patch14_224", {"img_size": 56}),
    "relative bias (BEiT)": ("beit_base_patch16_224", {}),
    "relative bias, class token, with positions": (
        "beitv2_base_patch16_224",
        {"global_pool": "token", "use_abs_pos_emb": True, "init_values": None},
    ),
    "relative bias, shared": (
        "beit_base_patch16_224",
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "qkv_bias": False},
    ),
    "relative bias, shared and own, oblong": (
        "beit_large_patch16_224",
        {"use_shared_rel_pos_bias": True, "img_size": (32, 64), "swiglu_mlp": True},
    ),
    "any grid, average pooling (NaFlex)": ("naflexvit_base_patch16_gap", {}),
    "any grid, attention pooling (SigLIP2 NaFlex)": (
        "naflexvit_base_patch16_siglip",
        {"pos_embed_grid_size": (3, 5)},
    ),
    "any grid, positions by row and column": ("naflexvit_base_patch16_parfac_gap", {}),
    "any grid, class token (C-RADIO)": (
        "naflexvit_base_patch16_radio_v3",
        {"pos_embed_grid_size": (7, 7)},
    ),
    "any grid, convolution, norms, padding": (
        "naflexvit_so150m2_patch16_reg1_map",
        {
            "embed_proj_type": "conv",
            "pre_norm": True,
            "embed_norm_layer": "layernorm",
            "dynamic_img_pad": True,
            "pool_include_prefix": True,
            "qk_norm": True,
        },
    ),
    "any grid, padding, channels first": (
        "naflexvit_base_patch16_map",
        {"dynamic_img_pad": True, "patchify_channels_last": False, "pos_embed": "none"},
    ),
    "rotary, oblong and dynamic": ("vit_small_patch16_dinov3", {"img_size": (48, 96)}),
}


def build(form: str) -> tuple[nn.Module, torch.Tensor]:
    name, args = FORMS[form]
    torch.manual_seed(1)
    model = timm.create_model(name, **{**SMALL, **args}).eval()
    shake(model)
    sizes = {"dynamic size": (64, 96), "dynamic size with padding": (50, 70)}
    if form.startswith("any grid"):
        sizes[form] = (50, 70) if args.get("dynamic_img_pad") else (64, 96)
    return model, torch.randn(3, 3, *(sizes.get(form) or model.patch_embed.img_size))


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Weights that timm initialises to zero or one would hide mistakes."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)


Run = tuple[list[torch.Tensor], list[tuple[torch.Tensor, ...]]]


def run_timm(model: Any, images: torch.Tensor, keep: torch.Tensor | None) -> Run:
    """The tokens after each of timm's own blocks on the kept patches, and the q, k and v that its
    attention gets.
    """
    tokens, given = _before_blocks(model, images)
    if keep is None:
        return _run_blocks(model, tokens, given)
    prefix = model.num_prefix_tokens
    places = torch.cat([torch.arange(prefix).expand(len(keep), -1), prefix + keep], dim=1)
    tokens = tokens[torch.arange(len(images))[:, None], places]
    if isinstance(model, Beit):
        runs = [
            _run_blocks(_seeing(model, places[i]), tokens[i : i + 1], given)
            for i in range(len(images))
        ]
        states, qkvs = zip(*runs, strict=True)
        hidden = [torch.cat(of_images) for of_images in zip(*states, strict=True)]
        parts = [zip(*of_images, strict=True) for of_images in zip(*qkvs, strict=True)]
        return hidden, [tuple(map(torch.cat, qkv)) for qkv in parts]
    if isinstance(model, Eva):
        # timm gathers the rotary table of the patches that its random dropping leaves.
        model.patch_drop = lambda tokens: (tokens, keep)
        _, rope = model._pos_embed(model.patch_embed(images))
        model.patch_drop = None
        given = [{"rope": rope[i] if model.rope_mixed else rope} for i in range(3)]
    return _run_blocks(model, tokens, given)


def _before_blocks(
    model: Any, images: torch.Tensor
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """The tokens that reach block 0, and what else each block is given."""
    tokens, given = [], []

    def spy(_: Any, inputs: tuple[torch.Tensor], other: dict[str, torch.Tensor]) -> None:
        tokens.extend(inputs)
        given.append(other)

    hooks = [block.register_forward_pre_hook(spy, with_kwargs=True) for block in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    return tokens[0], given


def _seeing(model: nn.Module, places: torch.Tensor) -> nn.Module:
    """The network whose images consist of these tokens."""
    model = copy.deepcopy(model)
    for table in model.modules():
        index = getattr(table, "relative_position_index", None)
        if index is not None:
            table.relative_position_index = index[places][:, places]
            table.window_size = (len(places) - 1, 1)
    return model


def _run_blocks(model: Any, tokens: torch.Tensor, given: list[dict[str, torch.Tensor]]) -> Run:
    hidden, seen = [], []
    attend = F.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((q, k, v))
        return attend(q, k, v, **options)

    if getattr(model, "rel_pos_bias", None) is not None:
        given = [{"shared_rel_pos_bias": _shared_bias(model.rel_pos_bias)}] * len(model.blocks)
    with mock.patch.object(F, "scaled_dot_product_attention", spy):
        for block, other in zip(model.blocks, given, strict=True):
            tokens = block(tokens, **other)
            hidden.append(tokens)
    return hidden, seen


def _shared_bias(table: Any) -> torch.Tensor:
    return table.relative_position_bias_table[table.relative_position_index].permute(2, 0, 1)
