"""A file's tensors into a network: every key present, none left over, every shape equal."""

import inspect
import logging
import sys
from collections.abc import Mapping, Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import DataError, Set
from ..messages import listed, plural
from .files import check_finite
from .vit_checkpoints import State, Target, convert

_log = logging.getLogger(__name__)


def load_into(target: Target, state: State, notes: Sequence[str] = ()) -> None:
    """Load a file's tensors into a network; log what was done to them, and ``notes``, in one line.

    They go through `convert` and, if they still do not fit, through timm's converter for public
    files of the network's family. `DataError` names the first keys that differ.
    """
    model, name = target.model, target.name
    raw = state
    state, said = convert(target, state)
    if _difference(model, state):
        # Only a plain ViT's file is brought under timm's names by `convert`.
        named = state if isinstance(model, VisionTransformer) else raw
        made = _converted(model, named)
        converted, more = convert(target, made)
        if _difference(model, converted):
            # An error about the original file says more than one about a failed conversion.
            raise _misfit(model, state, name)
        state, said = converted, [*dict.fromkeys([*said, *more])]
        if type(model).__module__.startswith("timm."):
            said.append(f"timm's converter for {_name_of(model)} was applied")
            said += _resampled(named, made)
    check_finite(state, name)
    model.load_state_dict(state, strict=True)
    if said or notes:
        _log.warning("%s: %s", name, "; ".join([*said, *notes]))


def _resampled(before: State, after: State) -> list[str]:
    """Say which tensors timm's converter brought to another size."""
    moved = [
        f"{key} from {tuple(old.shape)} to {tuple(after[key].shape)}"
        for key, old in before.items()
        if key in after and after[key].numel() != old.numel()
    ]
    return [f"it resampled {listed(moved)}"] if moved else []


def _misfit(model: nn.Module, state: Mapping[str, Tensor], name: str) -> DataError:
    own = model.state_dict()
    if not own.keys() & state.keys():
        what = f"{name} holds nothing of {_name_of(model)}: its tensors are called {listed(state)}"
        return DataError(what, fix="use a file of this network")
    if "fc_norm.weight" in state and "norm.weight" in own:
        what = f"{name} is of a network that norms its features after pooling (fc_norm), and"
        fixes = Set("model_args.global_pool", "avg"), "give what it was fine-tuned from"
        return DataError(f"{what} {_name_of(model)} norms every token", fixes)
    what = f"{name} does not fit {_name_of(model)}: {_difference(model, state)}"
    return DataError(
        what, "name the network that was saved, with its width, depth, classes and image size"
    )


def _difference(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Describe how a file's keys differ from a network's; empty when nothing does."""
    own = model.state_dict()
    parts = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    return "; ".join(
        f"{plural(len(x), 'key')} {kind} ({listed(x)})" for kind, x in parts.items() if x
    )


def _name_of(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def _converted(model: nn.Module, state: State) -> State:
    """Return what timm's converter for public files of this family makes; {} if it refuses."""
    converter = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if converter is None:
        return {}
    # DeiT III's files call a layer scale gamma_1; not every family's converter knows of them.
    known = inspect.signature(converter).parameters
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in known else {}
    try:
        return dict(converter(dict(state), model, **options))
    # It indexes the keys it expects in public files: any failure means that this is not one.
    except Exception:
        return {}
