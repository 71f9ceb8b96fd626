"""Hugging Face's networks: their config, and tensor names where timm's plain ViT is the same.

One thing differs: timm's norms add 1e-6 to the variance, as did the networks from which the
published files were converted. Hugging Face's config.json says 1e-12, which moves the last digits
of the answers.

Source: modeling_vit.py, modeling_vit_mae.py, configuration_vit.py and
convert_vit_timm_to_pytorch.py of huggingface/transformers@00a5ab1.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ImageNetInfo,
)
from torch import Tensor

from ..errors import DataError
from ..storage.atomic import read_bytes
from .transformers_network import NAME as TRANSFORMERS

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_BASES = ("vit.", "deit.", "ijepa.", "dinov2.", "dinov2_with_registers.", "")
PATCHES = tuple(f"{base}embeddings.patch_embeddings.projection.weight" for base in _BASES)
PATCHES += ("conv_proj.weight",)  # torchvision's ViT
# Arguments, besides sizes, that give timm's plain ViT the layout of these.
_KINDS: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit_mae": {},
    "vit_msn": {},
    "ijepa": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "deit": {"reg_tokens": 1},  # its distillation token has no head
    "dinov2": {"init_values": 1.0},
    "dinov2_with_registers": {"init_values": 1.0, "no_embed_class": True},
}
# Their names to timm's, applied in this order; those of torchvision's ViT too.
_NAMES = {
    r"^(vit|deit|ijepa|dinov2|dinov2_with_registers)\.": "",
    r"^embeddings\.(cls_token|mask_token|register_tokens)$": r"\1",
    r"^embeddings\.distillation_token$": "dist_token",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^(encoder\.layer|layers)\.": "blocks.",
    r"^layernorm\.": "norm.",
    r"^(cls_)?classifier\.": "head.",
    r"^distillation_classifier\.": "head_dist.",
    r"^decoder\.decoder_layers\.": "decoder_blocks.",
    r"^decoder\.": "",
    r"^class_token$": "cls_token",
    r"^conv_proj\.": "patch_embed.proj.",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^encoder\.layers\.encoder_layer_": "blocks.",
    r"^encoder\.ln\.": "norm.",
    r"^heads\.head\.": "head.",
}
# Inside a block, behind its number. Of two names, the second is of transformers 5.
_NAMES_IN_BLOCKS = {
    r"layernorm_before\.": "norm1.",
    r"layernorm_after\.": "norm2.",
    r"attention\.(?:attention\.)?(?P<part>[qkv])(?:uery|ey|alue|_proj)\.": r"attn.\g<part>.",
    r"attention\.(?:output\.dense|o_proj)\.": "attn.proj.",
    r"intermediate\.dense\.": "mlp.fc1.",
    r"output\.dense\.": "mlp.fc2.",
    r"ln_(?P<number>[12])\.": r"norm\g<number>.",
    r"self_attention\.in_proj_": "attn.qkv.",
    r"self_attention\.out_proj\.": "attn.proj.",
    r"mlp\.(?:0|linear_1|weights_in)\.": "mlp.fc1.",
    r"mlp\.(?:3|linear_2|weights_out)\.": "mlp.fc2.",
    r"layer_scale(?P<number>[12])\.lambda1$": r"ls\g<number>.gamma",
}
for _pattern, _name in _NAMES_IN_BLOCKS.items():
    _NAMES[rf"(?<=blocks)(\.\d+\.){_pattern}"] = rf"\1{_name}"
_ARCHITECTURES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
}
_DEFAULTS: dict[str, Any] = {  # theirs, for what a config.json leaves out
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a ViT's or masked autoencoder's tensors under timm's names, qkv in one."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, name in _NAMES.items():
            key = re.sub(pattern, name, key)
        renamed[key] = value
    for key in [key for key in renamed if ".attn.q." in key]:
        parts = [key.replace(".q.", f".{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            renamed[key.replace(".q.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    if "dist_token" in renamed and "head_dist.weight" not in renamed:
        renamed["reg_token"] = renamed.pop("dist_token")  # DeiT's with one classifier
    return renamed


def read_config(
    path: Path, config: Mapping[str, Any], preprocessor: Path | None
) -> tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Translate what Hugging Face's config.json at ``path`` holds.

    The ``preprocessor`` file has size and normalisation. Returns the architecture, timm's where its
    plain ViT has the same layout and else transformers', its arguments, its ``pretrained_cfg``, and
    notes for the user.
    """
    kind = str(config["model_type"])
    try:
        said = _DEFAULTS | {key: config[key] for key in _DEFAULTS if config.get(key) is not None}
        names = _class_names(config)
        cfg = _preprocessing(kind, config, preprocessor)
        architecture, args = _as_timms(kind, said, config, cfg)
        epsilon = float(said["layer_norm_eps"])
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        what = f"{path} or the {PREPROCESSOR} beside it makes no sense"
        raise DataError(f"{what} ({type(error).__name__}: {error})") from error
    cfg |= {"fixed_input_size": True, "num_classes": len(names), "classifier": "network.classifier"}
    if names and not _of_imagenet(names) and names != [f"LABEL_{i}" for i in range(len(names))]:
        cfg["label_names"] = names
    if not args:
        return f"{TRANSFORMERS}{kind}", {"config": dict(config)}, cfg, ()
    cfg |= {"classifier": "head", "first_conv": "patch_embed.proj"}
    note = f"its norms add 1e-06 to the variance, and its config.json says {epsilon:g}"
    return architecture, args, cfg, (note,) if epsilon != 1e-6 else ()


def _as_timms(
    kind: str, said: Mapping[str, Any], config: Mapping[str, Any], cfg: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return timm's plain ViT of the same layout and its arguments; empty if there is none."""
    heads = str(config.get("architectures") or "")
    # DINOv2's classifier reads the class token beside the mean of the patches.
    other_head = kind.startswith("dinov2") and "ForImageClassification" in heads
    if kind not in _KINDS or said["hidden_act"] != "gelu" or other_head:
        return "", {}
    width = int(said["hidden_size"])
    args = {
        "img_size": [*cfg["input_size"][1:]],
        "patch_size": said["patch_size"],
        "embed_dim": width,
        "depth": int(said["num_hidden_layers"]),
        "num_heads": int(said["num_attention_heads"]),
        "mlp_ratio": int(said["intermediate_size"]) / width,
        "qkv_bias": bool(said["qkv_bias"]),
        **_KINDS[kind],
    }
    if kind == "deit" and "WithTeacher" in heads:
        args.pop("reg_tokens")
        return "deit_base_distilled_patch16_224", args
    if not kind.startswith("dinov2"):
        return _ARCHITECTURES.get(width, "vit_base_patch16_224"), args
    registers = "_reg4" if "registers" in kind else ""
    args["mlp_ratio"] = ratio = float(config.get("mlp_ratio", 4))
    if registers:
        args["reg_tokens"] = int(config.get("num_register_tokens", 4))
    if config.get("use_swiglu_ffn"):
        args["mlp_ratio"] = 2 * ((int(int(width * ratio) * 2 / 3) + 7) // 8 * 8) / width
        return f"vit_giant_patch14{registers}_dinov2", args
    return f"vit_base_patch14{registers}_dinov2", args


def _class_names(config: Mapping[str, Any]) -> list[str]:
    """Return the classes a network answers in, in order; none for one without a classifier."""
    labels = {int(i): str(label) for i, label in (config.get("id2label") or {}).items()}
    heads = [str(name) for name in config.get("architectures") or ()]
    if heads and not any("ImageClassification" in name for name in heads):
        return []
    if heads and not labels:
        return ["LABEL_0", "LABEL_1"]  # their default, which they do not write
    return [labels[i] for i in range(len(labels))]


def _of_imagenet(names: list[str]) -> bool:
    """Return whether these are ImageNet-1k's in timm's order; a few are worded otherwise."""
    described = ImageNetInfo().label_descriptions()
    same = sum(a == b for a, b in zip(names, described, strict=False))
    return len(names) == len(described) and same > 0.9 * len(names)


def _preprocessing(
    kind: str, config: Mapping[str, Any], preprocessor: Path | None
) -> dict[str, Any]:
    """Return size, crop, mean and std of a network's images, in timm's words."""
    said = {} if preprocessor is None else dict(json.loads(read_bytes(preprocessor, 2**26)))
    said = dict(said.get("image_processor") or said)
    vision = {**config, **dict(config.get("vision_config") or {})}
    if kind in ("vit", "beit") or "siglip" in kind:
        mean, std = (0.5,) * 3, (0.5,) * 3
    elif "clip" in kind:
        mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    else:
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    mean, std = said.get("image_mean", mean), said.get("image_std", std)
    if said.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    own: Any = vision.get("image_size") or 224
    takes_any_grid = "num_patches" in vision  # of so many
    if takes_any_grid:
        own = math.isqrt(int(vision["num_patches"])) * int(vision["patch_size"])
    found: dict[str, Any] = {
        "input_size": (int(vision.get("num_channels", 3)), *_sides(own)),
        "crop_pct": 0.875 if kind == "vit_mae" else 0.9,  # as timm evaluates the same networks
        "mean": tuple(float(x) for x in mean),
        "std": tuple(float(x) for x in std),
    }
    if kind in ("vit", "vit_mae") or not said:
        return found
    size, crop = said.get("size"), said.get("crop_size") if said.get("do_center_crop") else None
    sides = _sides(own if takes_any_grid else crop or size or own)
    found["input_size"] = (found["input_size"][0], *sides)
    found["crop_pct"] = (
        min(sides) / min(_sides(size or sides)) if crop else said.get("crop_pct") or 1.0
    )
    if not crop and isinstance(size, Mapping) and "height" in size:
        found["crop_mode"] = "squash"
    return found


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        side = size.get("shortest_edge")
        return int(side or size["height"]), int(side or size["width"])
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
