"""Networks by name and weights from files: strict, offline unless asked otherwise, and never by
executing a pickle.

``create_model`` takes timm's names, ``local-dir:FOLDER``, ``hf-hub:ORG/NAME`` and plain folder
paths; ``load_weights`` reads safetensors and PyTorch files into a network, every key in place.
"""

import difflib
import hashlib
import inspect
import json
import logging
import math
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import is_model, list_models
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitdistill.models.advised
import vitdistill.models.involution  # noqa: F401 - their networks get their names in timm's registry

from ..errors import ConfigError, DataError, PermissionDenied
from ..messages import printable
from ..storage.atomic import read_bytes
from . import hugging_face

# Where public checkpoints keep their weights, best first; an average of the weights is preferred,
# as timm does.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
# torch.load(weights_only=True) could be made to corrupt memory before this version
# (CVE-2026-24747).
_SAFE_TORCH = (2, 10)
# What a checkpoint of a masked autoencoder holds for pre-training alone: its decoder, and the
# projections DMAE adds.
_PRETRAINING = ("decoder_", "mask_token", "aligned_feature_projection_heads.")
_HEAD = ("head.", "head_dist.", "fc_norm.")
_CLASSIFIER = ("head.", "head_dist.", "classifier.")
_PATCHES = "patch_embed.proj.weight"
_BUILD_ARGS = {"drop_path": "drop_path_rate", "image_size": "img_size"}

_log = logging.getLogger(__name__)


# -- files to state dicts -------------------------------------------------------------------------


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a weights file, on CPU, without the wrappers and prefixes of training scripts.

    Reads ``.safetensors``, and ``.pth .pt .bin .tar`` as far as they hold tensors only (torch 2.10
    or newer). Raises ``DataError`` in one sentence for a file that is missing, empty, cut, a web
    page, or that needs a pickle.
    """
    check_is_file(path)
    file = Path(path)
    name = printable(file)
    try:
        with open(file, "rb") as opened:
            head = opened.read(512)
    except PermissionError as error:
        raise PermissionDenied(f"{name} may not be read; change its permissions.") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read ({error.strerror}); check the disk.") from error
    _refuse_obvious(name, head)
    if file.suffix == ".safetensors":
        found: Any = _read_safetensors(file)
    elif file.suffix in _PICKLE_SUFFIXES:
        # Some publish safetensors under the old name: their content tells, and neither reader
        # executes anything.
        found = (
            _read_safetensors(file)
            if _looks_like_safetensors(file, head)
            else _read_torch(file, head)
        )
    else:
        raise DataError(
            f"{name} is not a kind of weights file this reads"
            f" ({', '.join(('.safetensors', *_PICKLE_SUFFIXES))}); convert it to .safetensors."
        )
    return _bare(name, found)


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Raise ``DataError`` where there is no weights file."""
    file = Path(path)
    if file.is_dir():
        raise DataError(
            f"{printable(file)} is a folder, not a weights file; give it as the model's name, or"
            " name the file inside it."
        )
    if not file.exists():
        raise DataError(f"There is no weights file {printable(file)}; check the path.")


def _refuse_obvious(name: str, head: bytes) -> None:
    if not head:
        raise DataError(f"{name} is empty (0 bytes); download it again.")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        raise DataError(
            f"{name} is a web page, not weights: the download failed; fetch the file itself."
        )
    if head.startswith(b"version https://git-lfs"):
        raise DataError(
            f"{name} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository."
        )


def _looks_like_safetensors(file: Path, head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= file.stat().st_size - 8


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return dict(safetensors.torch.load_file(file))
    except safetensors.SafetensorError as error:
        raise DataError(
            f"{printable(file)} is cut short or not a safetensors file ({_first_line(error)}); get"
            " it again."
        ) from error


def _read_torch(file: Path, head: bytes) -> Any:
    name = printable(file)
    if _torch_version() < _SAFE_TORCH:
        raise DataError(
            f"{name} is not opened because torch {torch.__version__} cannot read such files safely;"
            " install torch 2.10 or newer, or convert the file to .safetensors where you trust it:"
            f" {_converter(file)}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not head.startswith((b"PK\x03\x04", b"\x80")):
            raise DataError(
                f"{name} is not a weights file: neither PyTorch's format nor safetensors."
            ) from error
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({asked[1]})" if asked else ""
        raise DataError(
            f"{name} holds a pickle with more than tensors{what}, which was not executed; where you"
            f" trust its source, convert it: {_converter(file)}"
        ) from error
    # A damaged file fails in another place of the reader each time (struct.error, KeyError,
    # RuntimeError, ...); to the user all of them mean the same.
    except Exception as error:
        if "TorchScript" in str(error):
            raise DataError(
                f"{name} is a TorchScript archive, which holds code and was not executed; save its"
                " state_dict() as .safetensors instead."
            ) from error
        raise DataError(
            f"{name} is cut short, damaged or not a PyTorch file ({_first_line(error)}); get it"
            " again."
        ) from error


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _converter(file: Path) -> str:
    return (
        "python -c 'import sys, torch, safetensors.torch as s; d = torch.load(sys.argv[1],"
        ' weights_only=False); d = d.get("model", d.get("state_dict", d)); s.save_file({k:'
        f" v.contiguous() for k, v in d.items()}}, sys.argv[2])' '{printable(file)}'"
        f" '{printable(file.with_suffix('.safetensors'))}'"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]


def _bare(name: str, found: Any) -> dict[str, Tensor]:
    if isinstance(found, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(found.get(wrapper), Mapping):
                found = found[wrapper]
                break
    if not isinstance(found, Mapping) or not found:
        raise DataError(
            f"{name} holds no weights: expected named tensors, or those under one of"
            f" {', '.join(_WRAPPERS)}."
        )
    bare: dict[str, Tensor] = {}
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise DataError(
                f"{name} holds no weights: {str(key)[:60]!r} is {type(value).__name__}, not a"
                " tensor."
            )
        short = _bare_key(key)
        if short in bare:
            raise DataError(f"{name} holds {short!r} twice, with and without a wrapper's prefix.")
        bare[short] = value
    return bare


def _bare_key(key: str) -> str:
    key = key.replace("._orig_mod.", ".")
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


# -- state dicts into networks --------------------------------------------------------------------


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a weights file into a network: every key present, none left over, every shape equal.

    A file in another public layout of the same network (the authors' own names, patches of another
    size) goes through the converter timm has for that family. A plain ViT takes the encoder of a
    masked autoencoder's checkpoint, Meta's or Hugging Face's, with or without decoder, and Hugging
    Face's ViT; positions of another grid, which is taken to be square, are resampled. A
    `MaskedAutoencoder` takes all of a checkpoint. What was made of such a file is logged in one
    note. Raises ``DataError`` naming the first keys that differ.
    """
    _load_into(model, load_state_dict(path), printable(path))


def _load_into(
    model: nn.Module,
    state: dict[str, Tensor],
    name: str,
    *,
    saved: "_Saved | None" = None,
    fresh_head: bool = False,
    other_classes: bool = False,
    notes: Sequence[str] = (),
) -> None:
    """Load a file's tensors, and say in one note what was made of them.

    ``saved``: what a config.json says of the file; None: nothing does. ``fresh_head``: a plain
    ViT's head may start fresh where the file has none, and under ``other_classes`` where it has one
    too. ``notes``: what is to be said besides.
    """
    said: list[str] = []
    if isinstance(model, VisionTransformer):
        alone = saved is None and not hasattr(model, "decoder_pred") and _is_headless(model, state)
        if alone or _difference(model, state):
            state = _for_vit(model, state, name, said, alone, fresh_head, other_classes)
        if state.keys() == model.state_dict().keys():
            state = _on_its_grid(
                model, state, name, said, None if saved is None else saved.image_size
            )
    if _difference(model, state):
        converted = _converted(model, state)
        # A sentence about the file as it is says more than one about a failed conversion.
        if converted is None or _difference(model, converted):
            raise DataError(_misfit(model, state, name))
        said.append(
            "it is in another layout, or for another patch or image size: timm's converter for"
            f" {_name_of(model)} was applied"
        )
        state = converted
    model.load_state_dict(state, strict=True)
    said += notes if saved is None else saved.notes
    if said:
        _log.warning("%s: %s.", name, "; ".join(said))


def _misfit(model: nn.Module, state: Mapping[str, Tensor], name: str) -> str:
    if not model.state_dict().keys() & state.keys():
        keys = ", ".join(list(state)[:3]) + (", ..." if len(state) > 3 else "")
        return (
            f"{name} holds nothing of {_name_of(model)}: its tensors are called {keys}; use a file"
            " of this network."
        )
    if "fc_norm.weight" in state and "norm.weight" in model.state_dict():
        return (
            f"{name} is of a network that norms its features after pooling (it has fc_norm), as"
            " fine-tuned classifiers do, and this one norms every token; build it with"
            " model_args.global_pool=avg, or give the checkpoint it was fine-tuned from."
        )
    return (
        f"{name} does not fit {_name_of(model)}: {_difference(model, state)}; use the file that"
        " belongs to this network, or its own num_classes and image size."
    )


# -- plain ViTs: names, decoders, heads, positions and normalisation ------------------------------


def _is_headless(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether the network is a plain ViT and the file one without any classifier."""
    return (
        isinstance(model, VisionTransformer)
        and any(key in state for key in (_PATCHES, *hugging_face.PATCHES))
        and not any(key.startswith(_CLASSIFIER) for key in state)
    )


def _for_vit(
    model: VisionTransformer,
    state: dict[str, Tensor],
    name: str,
    said: list[str],
    alone: bool,
    fresh_head: bool,
    other_classes: bool,
) -> dict[str, Tensor]:
    """A file's tensors under timm's names, without what this network has no place for, and with the
    head it gets fresh.

    ``alone``: the file has no classifier, and nothing but itself says what it is. Raises
    ``DataError`` for a ViT of another form.
    """
    headless = _is_headless(model, state)
    foreign = hugging_face.has_its_names(state)
    if foreign:
        state = hugging_face.timm_names(state)
    kind, part, count = "ViT encoder" if headless else "ViT", "pooler", len(state)
    if any(key.startswith("decoder_") for key in state):
        kind, part = (
            "MAE checkpoint with decoder" + ("" if foreign else " (visualisation or full)"),
            "decoder",
        )
        state = _without_decoder(model, state, name)
    elif foreign:
        state = {key: value for key, value in state.items() if not key.startswith("pooler.")}
    left = f", {count - len(state)} of the {part} are not" if len(state) < count else ""
    _refuse_other_vit(model, state, name, headless)
    if other_classes:
        state = {key: value for key, value in state.items() if not key.startswith(_CLASSIFIER)}
    fresh = _fresh_head(model, state) if fresh_head and (headless or other_classes) else {}
    # A final norm that the network has behind its pooling instead.
    moved = (
        "norm.weight" not in model.state_dict()
        and "fc_norm.weight" in fresh
        and "norm.weight" in state
    )
    if moved:
        state = {key: value for key, value in state.items() if not key.startswith("norm.")}
    pool = model.attn_pool is None and any(key.startswith("attn_pool.") for key in state)
    if pool:
        state = {key: value for key, value in state.items() if not key.startswith("attn_pool.")}
    if alone or foreign or left:
        whose, joined = (
            ("Hugging Face's ", ", with query, key and value in one") if foreign else ("", "")
        )
        said.append(
            f"{whose}{kind}; {len(state)} {'encoder ' if part == 'decoder' and left else ''}tensors"
            f" are used{joined}{left}"
        )
    if fresh:
        said.append(
            f"{'it has no classifier' if headless else 'its classifier is of other classes'}:"
            f" {', '.join(fresh)} start fresh"
        )
    if pool:
        said.append("its attention pool is not used, because the network pools otherwise")
    if moved:
        said.append(
            "its final norm is not used, because the network normalises what it pools instead"
            " (fc_norm)"
        )
    return {**state, **fresh}


def _without_decoder(
    model: VisionTransformer, state: dict[str, Tensor], name: str
) -> dict[str, Tensor]:
    """A masked autoencoder's encoder, for a network that has no decoder; all of it for one that
    has.
    """
    if hasattr(model, "decoder_pred"):
        return state
    encoder = {key: value for key, value in state.items() if not key.startswith(_PRETRAINING)}
    if _PATCHES not in encoder:
        raise DataError(
            f"{name} holds the decoder of a masked autoencoder and no encoder; use the checkpoint"
            " with the encoder."
        )
    return encoder


def _refuse_other_vit(
    model: VisionTransformer, state: Mapping[str, Tensor], name: str, headless: bool
) -> None:
    """Raises ``DataError`` for a plain ViT of another width or depth and, without a classifier, of
    another patch size.

    The patches of a classifier's file go through timm's converter.
    """
    theirs, ours = state.get(_PATCHES), model.state_dict().get(_PATCHES)
    if theirs is None or ours is None or theirs.ndim != 4 or ours.ndim != 4:
        return
    blocks = [int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))]
    depth = max(blocks, default=-1) + 1
    wrong = []
    if len(theirs) != len(ours):
        wrong.append(f"is {len(theirs)} wide and the network {len(ours)}")
    if depth and depth != len(model.blocks):
        wrong.append(
            f"has {depth} block{'s' if depth > 1 else ''} and the network {len(model.blocks)}"
        )
    if headless and theirs.shape[2:] != ours.shape[2:]:
        its, own = (" x ".join(map(str, kernel.shape[2:])) for kernel in (theirs, ours))
        wrong.append(f"has {its} patches and the network {own}")
    if wrong:
        raise DataError(
            f"{name} does not fit {_name_of(model)}: this checkpoint {', it '.join(wrong)}; use the"
            " file that belongs to this network, or name the network it belongs to."
        )


def _fresh_head(model: VisionTransformer, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's own new tensors of its head and the norm in it, as far as the file has none."""
    return {
        key: value
        for key, value in model.state_dict().items()
        if key.startswith(_HEAD) and key not in state
    }


def _on_its_grid(
    model: VisionTransformer,
    state: dict[str, Tensor],
    name: str,
    said: list[str],
    size: tuple[int, int] | None,
) -> dict[str, Tensor]:
    """A file's positions on the network's grid of patches, resampled as timm does, where the file's
    own is another.

    ``size``: height and width of the images it was trained on, pixels; None: not known. Then its
    grid is taken to be square. Raises ``DataError`` where it cannot be, or could be the network's
    as well.
    """
    table, own, grid = (
        state.get("pos_embed"),
        model.pos_embed,
        getattr(model.patch_embed, "grid_size", None),
    )
    if (
        table is None
        or own is None
        or grid is None
        or table.ndim != 3
        or table.shape[2] != own.shape[2]
    ):
        return state
    num_prefix_tokens = own.shape[1] - grid[0] * grid[1]
    count = table.shape[1] - num_prefix_tokens
    side = math.isqrt(max(count, 0))
    its = _grid_of(model, state, size)
    if its is None or its[0] * its[1] != count:  # not known, or not of these positions
        alike = count == grid[0] * grid[1] and grid[0] != grid[1]
        if alike and side * side != count:
            return state
        if alike or side * side != count or count < 1:
            shapes = f"{side} x {side} or {grid[0]} x {grid[1]}" if alike else "no square"
            raise DataError(
                f"{name} does not say in what rows and columns its {count} patches are ({shapes}),"
                f" which the network has in {grid[0]} x {grid[1]}; give it as model.safetensors in"
                " a folder with a config.json that names its input_size, as `export` writes."
            )
        its = (side, side)
    if its == tuple(grid):
        return state
    said.append(
        f"it is for another image size: its positions were resampled from {its[0]} x {its[1]}"
        f" patches to {grid[0]} x {grid[1]}"
    )
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    image = patches.float().reshape(1, *its, -1).permute(0, 3, 1, 2)
    # Not timm's function: that of timm 1.0.20 leaves a table as it is where a square grid has as
    # many patches.
    moved = (
        F.interpolate(image, size=tuple(grid), mode="bicubic", antialias=True)
        .permute(0, 2, 3, 1)
        .flatten(1, 2)
    )
    return {**state, "pos_embed": torch.cat([prefix, moved.to(table.dtype)], dim=1)}


def _grid_of(
    model: VisionTransformer, state: Mapping[str, Tensor], size: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of a file's patches on images of this size; None: not known."""
    embed: Any = model.patch_embed
    if size is None or not getattr(embed, "img_size", None):
        return None
    theirs, ours = state.get(_PATCHES), model.state_dict().get(_PATCHES)
    kernels = (
        ((1, 1), (1, 1)) if theirs is None or ours is None else (theirs.shape[2:], ours.shape[2:])
    )
    rows, columns = (
        side // (pixels // patches * its // own)
        for side, pixels, patches, its, own in zip(
            size, embed.img_size, embed.grid_size, *kernels, strict=True
        )
    )
    return rows, columns


def _normalisation(model: nn.Module, state: Mapping[str, Tensor], name: str) -> list[str]:
    """Give a plain ViT that is named alone ImageNet's normalisation, where its file is a masked
    autoencoder's; what to say of it.

    timm's names decide the normalisation, and a file without a classifier need not be of the one
    that its network's name stands for.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(model, VisionTransformer) or not cfg:
        return []
    imagenet = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    if all(tuple(cfg.get(key) or value) == value for key, value in imagenet.items()):
        return []
    own = f"mean {_numbers(cfg['mean'])}, std {_numbers(cfg['std'])}"
    if any(key.removeprefix("decoder.").startswith(_PRETRAINING) for key in state):
        cfg.update(imagenet)
        return [
            "images are normalised by ImageNet's mean and std, as for masked autoencoders, and not"
            f" as for {name} ({own})"
        ]
    if not _is_headless(model, state):
        return []
    architecture = name.partition(".")[0]
    tags = [
        tag
        for tag in _tags(architecture)
        if tuple(_default_cfg(f"{architecture}.{tag}").mean) == IMAGENET_DEFAULT_MEAN
    ]
    other = (
        f"{architecture}.{'mae' if 'mae' in tags else tags[0]}"
        if tags
        else "a network of its size that has it, as deit's have"
    )
    return [
        f"images are normalised as for {name} ({own}); if it was trained with ImageNet's mean and"
        f" std, name {other}"
    ]


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in (values if len(set(values)) > 1 else values[:1]))


def _difference(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What differs between a network's keys and a file's, as part of a sentence; empty when nothing
    does.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {_shape(state[key])} in the file and {_shape(own[key])} in the network"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    parts = [
        _listed(missing, "missing"),
        _listed(unexpected, "unexpected"),
        _listed(shapes, "of another shape"),
    ]
    return "; ".join(part for part in parts if part)


def _listed(items: list[str], kind: str) -> str:
    if not items:
        return ""
    more = ", ..." if len(items) > 3 else ""
    return f"{len(items)} key{'s' if len(items) > 1 else ''} {kind} ({', '.join(items[:3])}{more})"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _name_of(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def _converted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    options = (
        {"adapt_layer_scale": True}
        if "adapt_layer_scale" in inspect.signature(convert).parameters
        else {}
    )
    try:
        return dict(convert(dict(state), model, **options))
    # The converter indexes whatever keys it expects of public files; any failure means that this is
    # none of them.
    except Exception as error:
        _log.debug("timm's converter refused the file: %s", error)
        return None


# -- networks -------------------------------------------------------------------------------------


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool | None = None,
    in_chans: int = 3,
    drop_path: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    **model_args: Any,
) -> nn.Module:
    """A timm network by name, with its weights if asked for.

    ``name`` is timm's, ``hf-hub:ORG/NAME``, ``local-dir:FOLDER`` or a folder with a
    ``config.json``: timm's (what ``export`` writes), or Hugging Face's of a ViT or ViTMAE.
    ``pretrained``: None loads the weights of a folder or hub name and none for timm's plain names;
    False never; True always (a plain name then downloads). Another ``num_classes`` than the
    weights' gives a fresh head. ``checkpoint`` is a file loaded strictly instead; without
    ``num_classes`` a plain timm name gets the file's. A plain ViT's file without a classifier (a
    masked autoencoder's, an export without classes) gives a network without one, or a fresh head
    where ``num_classes`` is given. Under a plain timm name, a masked autoencoder's file with its
    decoder brings ImageNet's normalisation into the network's configuration. All this is logged, in
    one note a file. ``image_size`` is (height, width) or one number, and becomes the input size in
    the network's configuration. Raises ``ConfigError`` for a name or argument that does not exist,
    ``DataError`` for weights that cannot be had or do not fit.
    """
    if checkpoint is not None and pretrained:
        raise ConfigError(
            f"{printable(name)} cannot have both pretrained weights and the checkpoint"
            f" {printable(checkpoint)}: choose one."
        )
    build = {key: value for key, value in model_args.items() if value is not None}
    for ours, timms in _BUILD_ARGS.items():
        value = {"drop_path": drop_path, "image_size": image_size}[ours]
        if value is not None and timms in build:
            raise ConfigError(
                f"{ours} and {timms} are the same setting of {printable(name)}: give one of them."
            )
        if value is not None:
            build[timms] = value
    if num_classes is not None:
        build["num_classes"] = num_classes
    if in_chans != 3:
        build["in_chans"] = in_chans
    source, place = _split(name)
    if source == "timm":
        model = _from_registry(place, build, pretrained=bool(pretrained))
    elif source == "folder":
        model = _from_folder(
            Path(place), build, load=pretrained is not False and checkpoint is None
        )
    else:
        model = _from_hub(place, build, load=pretrained is not False and checkpoint is None)
    if checkpoint is not None:
        state = load_state_dict(checkpoint)
        answers = 0 if _is_headless(model, state) else _num_answers(model, state)
        if (
            source == "timm"
            and "num_classes" not in build
            and answers not in (None, model.num_classes)
        ):
            model = _from_registry(place, {**build, "num_classes": answers}, pretrained=False)
        fresh = "num_classes" in build or not getattr(model, "num_classes", 1)
        notes = _normalisation(model, state, place) if source == "timm" else []
        _load_into(model, state, printable(checkpoint), fresh_head=fresh, notes=notes)
    return model


def _num_answers(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """How many classes a file's head answers in, when it has a head where timm says the network has
    its own.
    """
    head = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if hugging_face.has_its_names(state):
        head = "classifier"
    weight = state.get(f"{head[0] if isinstance(head, tuple | list) else head}.weight")
    return None if weight is None else len(weight)


def _split(name: str) -> tuple[str, str]:
    scheme, colon, rest = name.partition(":")
    if colon and scheme in ("hf-hub", "hf_hub"):
        return "hub", rest
    if colon and scheme == "local-dir":
        return "folder", rest
    # A bare timm name stays one, even where a folder happens to be called the same.
    if (
        os.sep in name
        or name.startswith(("~", "."))
        or (not is_model(name.partition(".")[0]) and Path(name).is_dir())
    ):
        folder = Path(name).expanduser()
        if folder.is_dir():
            return "folder", str(folder)
        raise ConfigError(
            f"There is no folder {printable(name)}; for a network of the Hugging Face hub write"
            f" hf-hub:{printable(name)}, for one of timm its bare name."
        )
    return "timm", name


def _from_registry(name: str, build: dict[str, Any], pretrained: bool) -> nn.Module:
    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        near = difflib.get_close_matches(architecture, list_models(), n=3, cutoff=0.6)
        hint = (
            f"; did you mean {' or '.join(near)}?" if near else "; `timm.list_models()` lists them."
        )
        raise ConfigError(f"timm {timm.__version__} has no network called {printable(name)}{hint}")
    if tag and tag not in _tags(architecture):
        known = ", ".join(_tags(architecture)) or "none"
        raise ConfigError(
            f"{architecture} has no weights called {printable(tag)!r}; it has {known}."
        )
    if pretrained and not _default_cfg(name).has_weights:
        raise ConfigError(
            f"timm has no pretrained weights for {name}; name one of its tags, or give a checkpoint"
            " file."
        )
    return _build(name, build, {}, pretrained=pretrained)


def _tags(architecture: str) -> list[str]:
    from timm.models._registry import get_arch_pretrained_cfgs

    return [key.partition(".")[2] for key in get_arch_pretrained_cfgs(architecture)]


def _default_cfg(name: str) -> Any:
    from timm.models import get_pretrained_cfg
    from timm.models._pretrained import PretrainedCfg

    return get_pretrained_cfg(name) or PretrainedCfg()


def _build(name: str, build: dict[str, Any], extra: dict[str, Any], pretrained: bool) -> nn.Module:
    """timm.create_model with its failures as sentences, and the image size put into the
    configuration.
    """
    build = dict(build)
    cfg = extra.get("pretrained_cfg") or {}
    fixed = cfg.get("fixed_input_size", False) if cfg else _default_cfg(name).fixed_input_size
    size = build.get("img_size")
    if (
        size is not None
        and not fixed
        and "strict_img_size" not in build
        and "dynamic_img_size" not in build
    ):
        # Fully convolutional: it takes any size, and no argument for it.
        del build["img_size"]
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **extra, **build)
    except TypeError as error:
        asked = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if asked is None:
            raise ConfigError(
                f"{printable(name)} cannot be built with {_spelled(build)}: {_first_line(error)}."
            ) from error
        raise ConfigError(
            f"{printable(name)} takes no argument {asked[1]!r}; remove it from the model's"
            " arguments."
        ) from error
    except (AssertionError, ValueError, ZeroDivisionError, KeyError) as error:
        raise ConfigError(
            f"{printable(name)} cannot be built with {_spelled(build)}: {_first_line(error)}."
        ) from error
    except (RuntimeError, OSError) as error:
        if not pretrained:
            raise ConfigError(
                f"{printable(name)} cannot be built with {_spelled(build)}: {_first_line(error)}."
            ) from error
        raise DataError(
            f"The pretrained weights of {printable(name)} cannot be had ({_first_line(error)});"
            " without network, download the file elsewhere and give it as the checkpoint."
        ) from error
    _record_input(model, size, build.get("in_chans"))
    _check_grid(name, model)
    return model


def _spelled(build: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in build.items()) or "its defaults"


def _record_input(model: nn.Module, size: Any, in_chans: int | None) -> None:
    """Older timm leaves the registry's input size in the configuration, and evaluation would resize
    to that.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict):
        return
    channels, *spatial = cfg.get("input_size") or (3, 224, 224)
    if size is not None:
        spatial = [size, size] if isinstance(size, int) else list(size)
        cfg.pop("test_input_size", None)
    cfg["input_size"] = (in_chans or channels, *spatial)


def _check_grid(name: str, model: nn.Module) -> None:
    embed = getattr(model, "patch_embed", None)
    patch, size = getattr(embed, "patch_size", None), getattr(embed, "img_size", None)
    if not patch or not size or getattr(embed, "dynamic_img_pad", False):
        return
    if any(side % step for side, step in zip(size, patch, strict=False)):
        raise ConfigError(
            f"{printable(name)} cuts images into patches of {patch[0]} x {patch[1]}, which do not"
            f" fill {size[0]} x {size[1]}; choose an image size that is a multiple of the patch"
            " size."
        )


# -- folders and the hub --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Saved:
    """What a config.json says of a network.

    Attributes:
        architecture: timm's name of it.
        args: what it was built with besides.
        cfg: its ``pretrained_cfg``.
        digest: sha256 of the weights, if we exported them.
        notes: what is to be said when its weights are loaded.
    """

    architecture: str
    args: dict[str, Any]
    cfg: dict[str, Any]
    digest: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images it was trained on, pixels; None: it does not say."""
        size: Any = self.args.get("img_size") or tuple(self.cfg.get("input_size") or ())[1:]
        if isinstance(size, int):
            return size, size
        return (int(size[0]), int(size[1])) if len(size) == 2 else None

    def build(self, build: Mapping[str, Any]) -> nn.Module:
        """The network without its weights; ``build`` are arguments that go before its own."""
        return _build(
            self.architecture,
            {**self.args, **build},
            {"pretrained_cfg": self.cfg} if self.cfg else {},
            pretrained=False,
        )


def _from_folder(folder: Path, build: dict[str, Any], load: bool) -> nn.Module:
    saved = _read_config(folder)
    if not load:
        return saved.build(build)
    file = _weights_file(folder)
    if saved.digest is not None and hashlib.sha256(read_bytes(file)).hexdigest() != saved.digest:
        raise DataError(
            f"{printable(file)} is damaged or was replaced: its sha256 is not the one in"
            " config.json beside it; export again."
        )
    return _with_weights(saved, build, load_state_dict(file), printable(file))


def _from_hub(place: str, build: dict[str, Any], load: bool) -> nn.Module:
    saved = _hub_config(place)
    if not load:
        return saved.build(build)
    for filename in (saved.cfg.get("hf_hub_filename"), *_FOLDER_FILES):
        file = _download(place, filename) if filename else None
        if file is not None:
            return _with_weights(saved, build, load_state_dict(file), f"hf-hub:{place}/{filename}")
    raise DataError(f"hf-hub:{printable(place)} has none of {', '.join(_FOLDER_FILES)}.")


def _hub_config(place: str) -> _Saved:
    config = _download(place, "config.json")
    if config is None:
        raise DataError(
            f"hf-hub:{printable(place)} has no config.json, so it is no network that can be built."
        )
    return _read_config(config.parent, lambda filename: _download(place, filename))


def _download(place: str, filename: str) -> Path | None:
    """A file of a repository of the hub, from the cache if it is there; None: the repository has no
    such file.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ConfigError(
            "hf-hub: names need huggingface_hub; pip install huggingface_hub"
        ) from error
    repo, _, revision = place.partition("@")
    try:
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision or None))
    # Without network, "not in the cache" is of the next kind too, and says nothing about the
    # repository.
    except LocalEntryNotFoundError as error:
        raise _unreachable(place, error) from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(place, error) from error


def _unreachable(place: str, error: BaseException) -> DataError:
    return DataError(
        f"hf-hub:{printable(place)} cannot be reached ({_first_line(error)}); without network,"
        " download the repository elsewhere and give its folder as local-dir:FOLDER."
    )


def _read_config(folder: Path, fetch: Callable[[str], Path | None] | None = None) -> _Saved:
    """What a folder's config.json says, timm's or Hugging Face's of a ViT; ``fetch`` gets another
    file that belongs to it.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {printable(folder)}; check the path.")
    if not path.is_file():
        raise ConfigError(
            f"{printable(folder)} has no config.json, so it is no exported network; give timm's"
            " name and the weights file as the checkpoint."
        )
    try:
        config = json.loads(read_bytes(path))
        if "model_type" in config and "architecture" not in config:
            preprocessor = folder / hugging_face.PREPROCESSOR
            beside = (
                (preprocessor if preprocessor.is_file() else None)
                if fetch is None
                else fetch(hugging_face.PREPROCESSOR)
            )
            architecture, args, cfg, notes = hugging_face.timm_config(path, config, beside)
            return _Saved(architecture, args, cfg, notes=notes)
        if "pretrained_cfg" not in config:
            config = {"architecture": config["architecture"], "pretrained_cfg": config}
        cfg = dict(config["pretrained_cfg"])
        architecture, args = str(config["architecture"]), dict(config.get("model_args") or {})
        digest = (config.get("vitdistill") or {}).get("weights_sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{printable(path)} is not a timm configuration (no architecture and pretrained_cfg in"
            " it)."
        ) from error
    for key in ("num_classes", "label_names", "label_descriptions"):
        if key in config:
            cfg[key] = config[key]
    if "labels" in cfg:
        cfg["label_names"] = cfg.pop("labels")
    from timm.models._pretrained import PretrainedCfg

    known = PretrainedCfg.__dataclass_fields__
    cfg = {
        key: value
        for key, value in cfg.items()
        if key in known and key not in ("url", "file", "state_dict", "hf_hub_id", "source")
    }
    if not is_model(architecture):
        raise ConfigError(
            f"{printable(path)} names the architecture {printable(architecture)!r}, which timm"
            f" {timm.__version__} does not have; install the timm version that wrote it."
        )
    return _Saved(architecture, args, cfg, digest)


def _weights_file(folder: Path) -> Path:
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{printable(folder)} has a config.json and no weights ({', '.join(_FOLDER_FILES)}); copy"
        " them beside it."
    )


def _with_weights(
    saved: _Saved, build: dict[str, Any], state: dict[str, Tensor], name: str
) -> nn.Module:
    saved_classes = saved.cfg.get("num_classes", 1000)
    same_head = build.get("num_classes", saved_classes) == saved_classes
    same_chans = (
        build.get("in_chans", saved.args.get("in_chans", 3))
        == (saved.cfg.get("input_size") or (3,))[0]
    )
    positions = any(key.endswith(("pos_embed", "position_embeddings")) for key in state)
    if same_chans and (same_head or not saved_classes or positions):
        model = saved.build(build)
        if same_head or isinstance(model, VisionTransformer):
            fresh = not (same_head and saved_classes)
            _load_into(
                model, state, name, saved=saved, fresh_head=fresh, other_classes=not same_head
            )
            if not same_head:
                model.pretrained_cfg.pop("label_names", None)  # type: ignore[union-attr, operator]
            return model
    # timm drops the head of other classes and folds input channels; handing it the tensors keeps
    # its own file reader out of it.
    cfg = {"pretrained_cfg": {**saved.cfg, "state_dict": state}}
    model = _build(saved.architecture, {**saved.args, **build}, cfg, pretrained=True)
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]
    if not same_head:
        model.pretrained_cfg.pop("label_names", None)  # type: ignore[union-attr, operator]
    return model


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The classes a network answers in, in order: those saved with it, ImageNet's synsets for
    timm's heads, or None.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    num_classes = getattr(model, "num_classes", None)
    names = cfg.get("label_names")
    if names is not None:
        return tuple(names) if len(names) == num_classes else None
    if num_classes == 1000 and cfg.get("num_classes") == 1000:
        from timm.data import ImageNetInfo

        return tuple(ImageNetInfo().label_names())
    return None


def carries_weights(name: str) -> bool:
    """Whether a network of this name comes with weights of its own: a folder's or the hub's, not a
    bare timm name.
    """
    return _split(name)[0] != "timm"


def describe(name: str, model_args: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's architecture and the arguments that rebuild ``create_model(name, **model_args)``, for
    an export.
    """
    source, place = _split(name)
    if source == "timm":
        return place, dict(model_args)
    saved = _read_config(Path(place)) if source == "folder" else _hub_config(place)
    return saved.architecture, {**saved.args, **model_args}
