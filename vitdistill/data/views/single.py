"""Views made one image at a time, by timm's and torchvision's own transforms.

A view is a pure function of (seed, view, sample id): the libraries' generators are seeded for it.
It is uint8; `normalize` and random erasing follow on the batch. `batched.BatchViews` draws other
numbers, so which of the two runs is part of a run's identity.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from ... import keyed
from ..augment import Augment, InputSpec
from ..order import Samples

_Transform = Callable[[Image.Image], Image.Image]


def normalize(images: UInt8[Tensor, "B 3 H W"], spec: InputSpec) -> Float[Tensor, "B 3 H W"]:
    """Turn pixels into a network's input: divided by 255, minus mean, over std."""
    constants = torch.tensor([(255.0,) * 3, spec.mean, spec.std], dtype=torch.float32)
    white, mean, std = constants[..., None, None].to(images.device, non_blocking=True)
    # A tensor of 255s: GPUs turn division by a number into a product, which rounds differently.
    return images.float().div_(white).sub_(mean).div_(std)


def eval_view(image: Image.Image, spec: InputSpec) -> UInt8[Tensor, "3 H W"]:
    """Cut out the evaluation crop of an RGB image, exactly timm's, before normalisation."""
    return pil_to_tensor(_eval_transform(spec)(image))


@lru_cache(maxsize=16)
def _eval_transform(spec: InputSpec) -> _Transform:
    whole = create_transform(
        input_size=(3, *spec.image_size),
        is_training=False,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        normalize=False,
    )
    return transforms.Compose(whole.transforms[:-1])  # the last one makes a tensor of the image


def prepare(image: Image.Image, augment: Augment, spec: InputSpec) -> Image.Image:
    """Do the part of a view that never changes: all but crop, flip and colours."""
    if augment.crop == "rrc":
        return image
    if augment.crop == "pad":  # the whole image at the input size
        whole = {"interpolation": augment.interpolation, "crop_pct": 1.0, "crop_mode": "center"}
        spec = replace(spec, **whole)  # type: ignore[arg-type]
    return _eval_transform(spec)(image)


def train_views(
    load: Callable[[int], Image.Image], augment: Augment, spec: InputSpec, shown: Samples
) -> UInt8[Tensor, "B 3 H W"]:
    """Make training views, before normalisation and erasing; ``load`` gives a sample's RGB image.

    The generators of Python, numpy and torch are seeded for each view and restored afterwards.
    """
    seeds = keyed.library_seeds(shown.seed, shown.views, shown.ids)
    transform, made = _train_transform(augment, spec), []
    with keep_generators():
        for sample_id, seed in zip(shown.ids.tolist(), seeds, strict=True):
            prepared = prepare(load(sample_id), augment, spec)
            seed_generators(seed)
            made.append(pil_to_tensor(transform(prepared)))
    return torch.stack(made)


@contextmanager
def keep_generators() -> Iterator[None]:
    """Restore the generators of Python, numpy and torch (CPU) after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    torch_state = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(torch_state)


def seed_generators(seed: int) -> None:
    """Seed the generators of Python, numpy and torch (CPU) with a number in [0, 2**63)."""
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)


@lru_cache(maxsize=16)
def _train_transform(augment: Augment, spec: InputSpec) -> _Transform:
    crop_and_flip, colour, _ = create_transform(
        input_size=(3, *spec.image_size),
        is_training=True,
        separate=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.aa,
        interpolation=augment.interpolation,
        mean=spec.mean,
        std=spec.std,
    )
    first = list(crop_and_flip.transforms)
    if augment.crop != "rrc":
        first = first[1:]
    if augment.crop == "pad":
        first.insert(0, transforms.RandomCrop(spec.image_size, padding=augment.crop_padding))
    second = list(colour.transforms) if augment.aa or augment.color_jitter else []
    for transform in second:
        _allow_zero_bits(transform)
    return transforms.Compose(first + second)


def _allow_zero_bits(transform: Any) -> None:
    """Give timm's posterize operations, wherever a policy keeps them, our own function."""
    groups = [getattr(transform, "ops", []), *getattr(transform, "policy", [])]
    for operation in chain.from_iterable(groups):
        if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
            operation.aug_fn = posterize


def posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """Keep the highest bits of each channel; 0 bits give a black image, which Pillow 13 refuses."""
    if bits_to_keep >= 8:
        return image
    mask = 0xFF & ~((1 << (8 - bits_to_keep)) - 1)
    return image.point([i & mask for i in range(256)] * len(image.getbands()))
