"""torchvision's classifiers by name: its ViT as timm's, which has the same layout, others whole."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision import models

from ..errors import ConfigError, DataError, Set
from ..messages import first_line, suggest

NAME = "torchvision/"
_VITS = {"vit_b_16": "base_patch16", "vit_b_32": "base_patch32", "vit_l_16": "large_patch16"}
_VITS |= {"vit_l_32": "large_patch32", "vit_h_14": "huge_patch14"}


def list_torchvision() -> list[str]:
    return list(models.list_models(module=models))


def as_timms(name: str, args: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return timm's name and arguments of the same network; unchanged if timm has none."""
    bare = name.removeprefix(NAME)
    if bare == name or bare not in _VITS:
        return name, dict(args)
    overlay = {**_input_of(bare), **args.get("pretrained_cfg_overlay", {})}
    return f"vit_{_VITS[bare]}_224", {**args, "pretrained_cfg_overlay": overlay}


def build_torchvision(name: str, num_classes: int | None, **args: Any) -> nn.Module:
    """Build a network of torchvision's with random weights; its last layer answers."""
    bare = name.removeprefix(NAME)
    if bare not in list_torchvision():
        near = suggest(bare, list_torchvision(), "torchvision.models.list_models() lists them")
        raise ConfigError(f"torchvision has no classifier {bare!r}", near)
    if num_classes is not None:
        args["num_classes"] = num_classes
    model: nn.Module = models.get_model(bare, weights=None, **args)
    layers = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    classes = {"num_classes": 1000, "classifier": layers[-1] if layers else None}
    model.pretrained_cfg = {**_input_of(bare), **classes, "fixed_input_size": False}  # type: ignore[assignment]
    return model


def torchvision_weights(name: str) -> dict[str, Tensor]:
    """Return the best published weights of a network, downloaded or from torch's cache."""
    try:
        weights = models.get_model_weights(name.removeprefix(NAME)).DEFAULT
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError, AttributeError) as error:
        raise pretrained_missing(name, error) from error


def pretrained_missing(name: str, error: Exception) -> DataError:
    """Return what to raise where a network's published weights could not be loaded."""
    what = f"the pretrained weights of {name} could not be loaded ({first_line(error)})"
    return DataError(what, (Set("checkpoint"), Set("pretrained", False)), field="pretrained")


def _input_of(name: str) -> dict[str, Any]:
    """Return what its best published weights were evaluated with, in timm's words."""
    found = next(iter(models.get_model_weights(name)), None)
    if found is None:
        return {}
    given = found.transforms()
    crop, size = given.crop_size[0], given.resize_size[0]
    return {
        "input_size": (3, crop, crop),
        "crop_pct": crop / size,
        "mean": tuple(given.mean),
        "std": tuple(given.std),
        "interpolation": given.interpolation.value,
    }
