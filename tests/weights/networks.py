"""Small networks and files of them, nothing in them at its initial value."""

import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vitdistill.models.mae import MaskedAutoencoder
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit
from vitdistill.weights.create import create_model

NAME = "vit_tiny_patch16_224"
TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
State = dict[str, Tensor]


def _moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def tiny(seed: int = 0, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    return _moved(create_model(NAME, **{"num_classes": 5, **TINY, **changes}))


def mae(seed: int = 0, **changes) -> MaskedAutoencoder:
    """An autoencoder whose encoder is `tiny`'s."""
    torch.manual_seed(seed)
    sizes = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 2, "num_heads": 2}
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return _moved(MaskedAutoencoder(**{**sizes, **decoder, **changes}))


def encoder_of(model: torch.nn.Module) -> State:
    return without(model.state_dict(), "decoder_", "mask_token", "head.")


def without(state: State, *prefixes: str) -> State:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


_PARTS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_PARTS |= {"attn.proj": "attention.output.dense"}
_PARTS |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
_WHOLE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def hugging_face(state: State, base: str = "vit.") -> State:
    """The same tensors under the names of transformers' ViT and ViTMAE."""
    renamed = {}
    for key, value in state.items():
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if block is None:
            other = key.replace("head.", "classifier.") if "head." in key else f"decoder.{key}"
            renamed[base + _WHOLE[key] if key in _WHOLE else other] = value
            continue
        layers = "decoder.decoder_layers." if block[1] else f"{base}encoder.layer."
        if block[3] == "attn.qkv":
            for part, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
                name = f"{layers}{block[2]}.attention.attention.{part}.{block[4]}"
                renamed[name] = tensor.clone()
        else:
            renamed[f"{layers}{block[2]}.{_PARTS[block[3]]}.{block[4]}"] = value
    return renamed


def write(path: Path, state: State) -> Path:
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors.torch.save(state))
    else:
        torch.save({"model": state}, path)
    return path


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def features(model: torch.nn.Module, images: Tensor) -> Tensor:
    recorded = run_vit(model.eval(), images, Needs(features=True)).features
    assert recorded is not None
    return recorded
