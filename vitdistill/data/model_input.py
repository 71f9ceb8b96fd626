"""What a network says about the images it wants."""

from timm.data import resolve_model_data_config
from torch import nn

from ..errors import ConfigError
from .augment import InputSpec


def input_spec_of(model: nn.Module) -> InputSpec:
    """Return a timm model's `InputSpec`: its ``pretrained_cfg``, at the size it was built for.

    Raises `ConfigError` for a model that does not take RGB images.
    """
    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    # A model built with img_size=... keeps the pretrained_cfg of its original size.
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if built_for is not None:
        height, width = built_for
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else channels
    if channels != 3:
        raise ConfigError(f"the model takes {channels} channels; only RGB images are supported")
    red, green, blue = config["mean"]
    red_std, green_std, blue_std = config["std"]
    return InputSpec(
        (int(height), int(width)),
        (float(red), float(green), float(blue)),
        (float(red_std), float(green_std), float(blue_std)),
        str(config["interpolation"]),
        float(config["crop_pct"]),
        str(config["crop_mode"]),
    )
