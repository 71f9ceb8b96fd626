"""A file's tensors into a network: every key present, none left over, every shape equal."""

import inspect
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import DataError, Set
from ..messages import listed, plural, printable
from .files import load_state_dict
from .vit_checkpoints import Target, convert, is_headless

_log = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a weights file into a network.

    A file in another public layout of the same network goes through the converter that timm has for
    its family. A plain ViT takes the encoder of a masked autoencoder's checkpoint and Hugging
    Face's ViT; positions of another grid, which is taken to be square, are resampled. A
    `MaskedAutoencoder` takes all of a checkpoint. What was done is logged in one note.

    Raises:
        DataError: the file cannot be read, or does not fit; the first keys that differ are named.
    """
    load_into(model, load_state_dict(path), printable(path))


def load_into(
    model: nn.Module,
    state: dict[str, Tensor],
    name: str,
    *,
    fresh_head: bool = False,
    other_classes: bool = False,
    image_size: tuple[int, int] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Load a file's tensors as `load_weights` does, and log in one note what was made of them.

    Args:
        name: of the file, for messages.
        fresh_head, other_classes, image_size: as in `vit_checkpoints.Target`.
        notes: what is to be said besides.
    """
    said: list[str] = []
    if isinstance(model, VisionTransformer):
        headless = is_headless(model, state)
        target = Target(model, name, headless, fresh_head, other_classes, image_size)
        state, said = convert(target, state)
    if difference(model, state):
        converted = _converted(model, state)
        if converted is None or difference(model, converted):
            # A sentence about the file as it is says more than one about a failed conversion.
            raise _misfit(model, state, name)
        said.append(f"timm's converter for {_name_of(model)} was applied")
        state = converted
    model.load_state_dict(state, strict=True)
    if said or notes:
        _log.warning("%s: %s", name, "; ".join([*said, *notes]))


def _misfit(model: nn.Module, state: Mapping[str, Tensor], name: str) -> DataError:
    own = model.state_dict()
    if not own.keys() & state.keys():
        return DataError(
            f"{name} holds nothing of {_name_of(model)}: its tensors are called {listed(state)}",
            fix="use a file of this network",
        )
    if "fc_norm.weight" in state and "norm.weight" in own:
        return DataError(
            f"{name} is of a network that norms its features after pooling (fc_norm), and"
            f" {_name_of(model)} norms every token",
            fix=(Set("model_args.global_pool", "avg"), "give what it was fine-tuned from"),
        )
    return DataError(
        f"{name} does not fit {_name_of(model)}: {difference(model, state)}",
        fix="use its own file, or its number of classes and image size",
    )


def difference(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Describe how a file's keys differ from a network's; empty when nothing does."""
    own = model.state_dict()
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    parts = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": shapes,
    }
    return "; ".join(
        f"{plural(len(keys), 'key')} {kind} ({listed(keys)})"
        for kind, keys in parts.items()
        if keys
    )


def _name_of(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def _converted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return what timm's converter for public files of this family makes; None if it refuses."""
    converter = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if converter is None:
        return None
    # DeiT III's files call a layer scale gamma_1; not every family's converter knows of them.
    known = inspect.signature(converter).parameters
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in known else {}
    try:
        return dict(converter(dict(state), model, **options))
    # It indexes whatever keys it expects of public files: any failure says that this is none.
    except Exception as error:
        _log.debug("timm's converter refused the file: %s", error)
        return None
