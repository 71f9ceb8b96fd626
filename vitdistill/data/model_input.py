"""What a network says about the images it wants."""

from typing import Any

from timm.data import resolve_model_data_config
from timm.layers import PatchEmbed, to_2tuple
from torch import nn

from ..errors import ConfigError
from .augment import InputSpec


def input_spec_of(model: nn.Module) -> InputSpec:
    """Return a timm model's `InputSpec`: its ``pretrained_cfg``, at the size it was built for.

    Raises `ConfigError` for a model that does not take RGB images.
    """
    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    # A model that timm builds with img_size=... or in_chans=... keeps its pretrained_cfg.
    embed: Any = getattr(model, "patch_embed", None)
    if type(embed) is PatchEmbed:
        channels = embed.proj.in_channels
    if getattr(embed, "img_size", None) is not None:
        height, width = to_2tuple(embed.img_size)
    if channels != 3:
        raise ConfigError(f"the model takes {channels} channels; only RGB images are supported")
    mean, std = (tuple(map(float, config[key])) for key in ("mean", "std"))
    how = str(config["interpolation"]), float(config["crop_pct"]), str(config["crop_mode"])
    return InputSpec((int(height), int(width)), mean, std, *how)  # type: ignore[arg-type]
