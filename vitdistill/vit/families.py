"""Families of networks: which class runs a network for `run_vit`."""

from dataclasses import replace

import torch
from torch import nn

from .beit import BiasedViT
from .eva import RotaryViT
from .naflex import NaFlexViT
from .network import Network
from .plain import PlainViT
from .whole import Whole

FAMILIES = (PlainViT, RotaryViT, BiasedViT, NaFlexViT)
"""Networks that are walked; the first family that accepts a model takes it."""


def family_of(model: nn.Module) -> PlainViT | Whole:
    """Return ``model`` wrapped by its family; one outside all families is run whole."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    for family in FAMILIES:
        if family.accepts(model):
            return family(model)
    return Whole(model)


def describe_network(
    model: nn.Module,
    name: str,
    architecture: str,
    image_size: tuple[int, int],
) -> Network:
    """Describe ``model`` on images of ``image_size``."""
    family = family_of(model)
    return replace(
        family.network,
        name=name,
        architecture=architecture,
        image_size=image_size,
        num_parameters=sum(p.numel() for p in model.parameters()),
        grid=family.grid(torch.empty(0, 3, *image_size, device="meta")),
    )
