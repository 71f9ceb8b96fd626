"""What public checkpoints need before they fit: a list of small conversions.

Masked autoencoders come with a decoder, encoders without a classifier, Hugging Face's files under
other names, and all of them for another image size. `convert` runs the conversions in order; each
returns the tensors changed with a note for the user, or None if it does not apply. Networks that
are not plain ViTs only get a new head; timm's own converters do the rest (`load`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import DataError, Set
from ..messages import plural
from . import hugging_face

State = dict[str, Tensor]

# What a checkpoint of a masked autoencoder holds for pre-training alone: its decoder, and the
# projections that DMAE adds.
_PRETRAINING = ("decoder_", "mask_token", "aligned_feature_projection_heads.")
_CLASSIFIER = ("head.", "head_dist.", "classifier.", "cls_classifier.", "heads.head.")
_PATCHES = "patch_embed.proj.weight"


@dataclass(frozen=True)
class Target:
    """The network that a file is to fit, and what is known of the file besides its tensors.

    Attributes:
        name: of the file, for messages.
        fresh_head: the network's own new head is used where the file has none, or one of another
            number of classes.
        image_size: height and width of the images it was trained on, pixels; None: not known.
    """

    model: Any  # an nn.Module; conversions know what theirs has
    name: str
    fresh_head: bool = False
    image_size: tuple[int, int] | None = None


Converted = tuple[State, str] | None
Conversion = Callable[[Target, State], Converted]


def is_headless(state: Mapping[str, Tensor]) -> bool:
    """Return whether a file is of a plain ViT without any classifier."""
    return any(key in state for key in (_PATCHES, *hugging_face.PATCHES)) and not any(
        key.startswith(_CLASSIFIER) for key in state
    )


def is_pretraining(state: Mapping[str, Tensor]) -> bool:
    """Return whether a file has what only a masked autoencoder has, under anybody's names."""
    return any(key.removeprefix("decoder.").startswith(_PRETRAINING) for key in state)


def convert(target: Target, state: State) -> tuple[State, list[str]]:
    """Return a file's tensors as the network wants them, and what was done to them."""
    notes: list[str] = []
    is_vit = isinstance(target.model, VisionTransformer)
    for conversion in _CONVERSIONS if is_vit else (_check_patches, _start_head):
        done = conversion(target, state)
        if done is not None:
            state, note = done
            notes += [note] if note else []
    return state, notes


def classifier_of(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of a classifier's tensors begin."""
    if isinstance(model, VisionTransformer):
        return _CLASSIFIER
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))


def calm_classifier(model: nn.Module) -> None:
    """Scale a new classifier's weights down to a ViT's, if they are larger, in place.

    Some CNNs begin certain of one class (EfficientNet: a loss of 11 over ten classes), and the
    resulting gradients spoil the pre-trained layers.
    """
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name.startswith(classifier_of(model)) and weight.ndim > 1 and weight.std() > 0.05:
            weight.mul_(0.02 / weight.std())


def _without(state: State, prefixes: str | tuple[str, ...]) -> State:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _rename(target: Target, state: State) -> Converted:
    # Of Hugging Face's ViT or ViTMAE, or of torchvision's ViT.
    if not any(key in hugging_face.PATCHES or key.startswith("decoder.decoder_") for key in state):
        return None
    return hugging_face.timm_names(state), "its names are another library's, and were translated"


def _drop_decoder(target: Target, state: State) -> Converted:
    # A mask token alone is DINOv2's, and tells timm's converter so.
    has_decoder = any(key.startswith("decoder_") for key in state)
    if not has_decoder or hasattr(target.model, "decoder_pred"):
        return None
    encoder = _without(state, _PRETRAINING)
    if _PATCHES not in encoder:
        raise DataError(f"{target.name} holds the decoder of a masked autoencoder and no encoder")
    return encoder, f"{plural(len(state) - len(encoder), 'tensor')} of its decoder are not used"


def _drop_pools(target: Target, state: State) -> Converted:
    # No network of timm's has ViTModel's pooler, and only some have an attention pool.
    pools = "pooler." if target.model.attn_pool is not None else ("pooler.", "attn_pool.")
    kept = _without(state, pools)
    return (kept, "its pooling layer is not used") if len(kept) < len(state) else None


def _check_patches(target: Target, state: State) -> Converted:
    # timm's converter resamples patches of another size, which would go unnoticed in a network
    # that keeps its head, or in an encoder.
    theirs, own = state.get(_PATCHES), target.model.state_dict().get(_PATCHES)
    if theirs is None or own is None or theirs.ndim != 4 or own.ndim != 4:
        return None
    if theirs.shape[2:] == own.shape[2:] or (target.fresh_head and not is_headless(state)):
        return None
    sizes = [" x ".join(map(str, kernel.shape[2:])) for kernel in (theirs, own)]
    rows, columns = theirs.shape[2:]
    size = rows if rows == columns else [rows, columns]
    what = f"{target.name} has patches of {sizes[0]} pixels, and the network of {sizes[1]}"
    fixes = Set("model_args.patch_size", size), "name the network it belongs to"
    raise DataError(what, fixes, field="model_args.patch_size")


def _start_head(target: Target, state: State) -> Converted:
    """Use the network's new head, with its norm, where the file has none that fits."""
    classifier, own = classifier_of(target.model), target.model.state_dict()
    theirs = [key for key in state if key.startswith(classifier)]
    others = [key for key in theirs if key not in own or own[key].shape[:1] != state[key].shape[:1]]
    if theirs and not (others and target.fresh_head):
        return None
    state = _without(state, classifier) if theirs else state
    heads = (*classifier, "fc_norm.")
    fresh = {key: own[key] for key in own if key.startswith(heads) and key not in state}
    if not target.fresh_head or not fresh:
        return state, "its classifier is not used" if theirs else ""
    calm_classifier(target.model)
    what = "its classifier is of other classes" if theirs else "it has no classifier"
    note = f"{what}: {', '.join(fresh)} start fresh"
    # The network norms after pooling (fc_norm), so it has no place for a norm of every token.
    if "norm.weight" not in own and "fc_norm.weight" in fresh and "norm.weight" in state:
        state = _without(state, "norm.")
        note += "; its final norm is not used"
    return {**state, **fresh}, note


def _resample_positions(target: Target, state: State) -> Converted:
    """Resample positions to the network's grid of patches, as timm does, if theirs is another."""
    model, table = target.model, state.get("pos_embed")
    own, grid = model.pos_embed, getattr(model.patch_embed, "grid_size", None)
    if state.keys() != model.state_dict().keys() or table is None or grid is None:
        return None  # of another network; timm's converter or an error is next
    if own is None or table.ndim != 3 or table.shape[2] != own.shape[2]:
        return None
    grid = (int(grid[0]), int(grid[1]))
    num_prefix_tokens = own.shape[1] - grid[0] * grid[1]
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    theirs = _grid_of(target, grid, patches.shape[1])
    if theirs == grid:
        return None
    image = patches.float().reshape(1, *theirs, -1).permute(0, 3, 1, 2)
    moved = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    moved = moved.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)
    size: Any = model.patch_embed.img_size
    pixels = [n * side // own for n, side, own in zip(theirs, size, grid, strict=True)]
    was, now, kept = (f"{rows} x {columns}" for rows, columns in (theirs, grid, pixels))
    return {**state, "pos_embed": torch.cat([prefix, moved], dim=1)}, (
        f"its positions were resampled from {was} patches to {now} (images of {kept} pixels keep"
        " them)"
    )


def _grid_of(target: Target, grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Return the rows and columns of a file's ``count`` patches; raise rather than guess."""
    own_size: Any = getattr(target.model.patch_embed, "img_size", None)
    if target.image_size is not None and own_size:
        known = zip(target.image_size, own_size, grid, strict=True)
        rows, columns = (side // (own // patches) for side, own, patches in known)
        if rows * columns == count:
            return rows, columns
    side = math.isqrt(max(count, 0))
    is_square, is_own = count > 0 and side * side == count, count == grid[0] * grid[1]
    if is_own and (grid[0] == grid[1] or not is_square):
        return grid
    if is_square and not is_own:
        return side, side
    what = f"{target.name} does not say in what rows and columns its {count} patches lie, and"
    fix = "give it as model.safetensors in a folder with a config.json that has its input_size"
    raise DataError(f"{what} the network has {grid[0]} x {grid[1]}", fix)


# In this order: timm's names first, and positions last, when every other key is in its place.
_CONVERSIONS: tuple[Conversion, ...] = (
    _rename,
    _drop_decoder,
    _drop_pools,
    _check_patches,
    _start_head,
    _resample_positions,
)
