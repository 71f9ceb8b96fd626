"""Hugging Face's ViT and ViTMAE as timm's plain ViT: the names of their tensors, and their config.

One thing differs: timm's norms add 1e-6 to the variance, as the networks did from which the
published files were converted. Hugging Face's config.json says 1e-12, which moves the last digits
of the answers.

Source: modeling_vit.py, modeling_vit_mae.py, configuration_vit.py and
convert_vit_timm_to_pytorch.py of huggingface/transformers@00a5ab1.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import Tensor

from ..errors import DataError
from ..messages import printable
from ..storage.atomic import read_bytes

PREPROCESSOR = "preprocessor_config.json"
PATCHES = (
    "vit.embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.weight",
)
# Their names to timm's, applied in this order.
_NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^vit\.", ""),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^(encoder\.layer|layers)\.", "blocks."),
        (r"^layernorm\.", "norm."),
        (r"^classifier\.", "head."),
        (r"^decoder\.decoder_layers\.", "decoder_blocks."),
        (r"^decoder\.", ""),
        (r"(?<=blocks)(\.\d+\.)layernorm_before\.", r"\1norm1."),
        (r"(?<=blocks)(\.\d+\.)layernorm_after\.", r"\1norm2."),
        # The second name of each is of transformers 5.
        (
            r"(?<=blocks)(\.\d+\.)attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.",
            r"\1attn.\2.",
        ),
        (r"(?<=blocks)(\.\d+\.)attention\.(?:output\.dense|o_proj)\.", r"\1attn.proj."),
        (r"(?<=blocks)(\.\d+\.)intermediate\.dense\.", r"\1mlp.fc1."),
        (r"(?<=blocks)(\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
    )
)
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
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}


def has_its_names(state: Mapping[str, Tensor]) -> bool:
    """Return whether a file's tensors are called as in Hugging Face's ViT or ViTMAE."""
    return any(key in PATCHES or key.startswith("decoder.decoder_") for key in state)


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a ViT's or masked autoencoder's tensors under timm's names, qkv in one."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, name in _NAMES:
            key = pattern.sub(name, key)
        renamed[key] = value
    for key in [key for key in renamed if ".attn.q." in key]:
        parts = [key.replace(".q.", f".{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            renamed[key.replace(".q.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def timm_config(
    path: Path, config: Mapping[str, Any], preprocessor: Path | None
) -> tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Translate what Hugging Face's config.json at ``path`` holds, for ``vit`` or ``vit_mae``.

    The ``preprocessor`` file has the normalisation. Returns timm's architecture, its arguments, its
    ``pretrained_cfg``, and notes for the user.
    """
    kind = config["model_type"]
    said = _DEFAULTS | {key: config[key] for key in _DEFAULTS if config.get(key) is not None}
    if kind not in ("vit", "vit_mae") or said["hidden_act"] != "gelu":
        raise DataError(
            f"{printable(path)} is of a Hugging Face network of model_type {kind} with hidden_act"
            f" {said['hidden_act']}, and only vit and vit_mae with gelu can be built",
            fix="give the network in timm's form",
        )
    try:
        args = _arguments(said)
        names = _class_names(config)
        mean, std = _normalisation(kind, preprocessor)
        epsilon = float(said["layer_norm_eps"])
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise DataError(
            f"{printable(path)} or the {PREPROCESSOR} beside it is not a ViT's"
            f" ({type(error).__name__}: {error})"
        ) from error
    cfg: dict[str, Any] = {
        "input_size": (int(said["num_channels"]), *args["img_size"]),
        "fixed_input_size": True,
        "crop_pct": 0.875 if kind == "vit_mae" else 0.9,  # as timm evaluates the same networks
        "mean": mean,
        "std": std,
        "num_classes": len(names),
        "classifier": "head",
        "first_conv": "patch_embed.proj",
    }
    if names and not _of_imagenet(names) and names != [f"LABEL_{i}" for i in range(len(names))]:
        cfg["label_names"] = names
    note = f"its norms add 1e-06 to the variance, and its config.json says {epsilon:g}"
    notes = (note,) if epsilon != 1e-6 else ()
    return _ARCHITECTURES.get(args["embed_dim"], "vit_base_patch16_224"), args, cfg, notes


def _arguments(said: Mapping[str, Any]) -> dict[str, Any]:
    dim, size = int(said["hidden_size"]), said["image_size"]
    args = {
        "img_size": [size, size] if isinstance(size, int) else [int(side) for side in size],
        "patch_size": said["patch_size"],
        "embed_dim": dim,
        "depth": int(said["num_hidden_layers"]),
        "num_heads": int(said["num_attention_heads"]),
        "mlp_ratio": int(said["intermediate_size"]) / dim,
        "qkv_bias": bool(said["qkv_bias"]),
    }
    if said["num_channels"] != 3:
        args["in_chans"] = int(said["num_channels"])
    return args


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


def _normalisation(kind: str, preprocessor: Path | None) -> list[tuple[float, ...]]:
    """Return mean and std per channel; theirs for ``vit`` are 0.5."""
    default = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
    if kind == "vit_mae":
        default = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    said = {} if preprocessor is None else dict(json.loads(read_bytes(preprocessor, 2**26)))
    if said.get("do_normalize") is False:
        return [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)]
    return [tuple(float(x) for x in said.get(key, default[key])) for key in default]
