"""Views: what a network sees of an image in one epoch, as a pure function of (seed, view, sample
id).

There are two ways to the same kind of view. `train_view` takes one image and calls timm's and
torchvision's transforms with generators seeded for that view; `BatchViews` takes images that are
held in memory and makes a whole batch at once on the device. Both give uint8 pixels; `normalize`
and random erasing follow on the batch. The two draw other numbers, so which one runs is part of a
run's identity.

Source: the recipe called ``deit`` is that of Touvron et al., "Training data-efficient image
transformers", ICML 2021, table 9, with the values of its public code (random erasing 0.25, three
repeats).
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
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

from .. import keyed
from ..errors import ConfigError
from ..keyed import I64, Stream
from .augment import Augment, InputSpec
from .geometry import CROP_UNIFORMS, crop_and_flip, random_boxes, resize_boxes
from .randaugment import Operation, Policy, apply_operations, draw_jitter, posterize

_INTERPOLATIONS = {
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
}


def normalize(images: UInt8[Tensor, "B 3 H W"], spec: InputSpec) -> Float[Tensor, "B 3 H W"]:
    """uint8 pixels as the network's float32 input, on the device they are on: divided by 255, minus
    mean, over std.
    """
    constants = torch.tensor([(255.0,) * 3, spec.mean, spec.std], dtype=torch.float32)
    white, mean, std = constants[..., None, None].to(images.device, non_blocking=True)
    # A tensor of 255s: GPUs take division by a number as a product, which rounds otherwise.
    return images.float().div_(white).sub_(mean).div_(std)


def eval_view(image: Image.Image, spec: InputSpec) -> UInt8[Tensor, "3 H W"]:
    """The evaluation crop of an RGB image, exactly timm's, before normalisation."""
    return pil_to_tensor(_eval_transform(spec)(image))


@lru_cache(maxsize=16)
def _eval_transform(spec: InputSpec) -> Callable[[Image.Image], Image.Image]:
    full = create_transform(
        input_size=(3, *spec.image_size),
        is_training=False,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
    )
    geometry = [
        t
        for t in full.transforms
        if "Tensor" not in type(t).__name__ and not isinstance(t, transforms.Normalize)
    ]
    return transforms.Compose(geometry)


def prepare(image: Image.Image, augment: Augment, spec: InputSpec) -> Image.Image:
    """The part of a view that never changes: nothing for ``rrc``, the whole image at the input size
    for the others.
    """
    return _preparation(augment.crop, augment.interpolation, spec)(image)


@lru_cache(maxsize=16)
def _preparation(
    crop: str, interpolation: str, spec: InputSpec
) -> Callable[[Image.Image], Image.Image]:
    if crop == "rrc":
        return transforms.Compose([])
    if crop == "center":
        return _eval_transform(spec)
    return _eval_transform(
        InputSpec(spec.image_size, spec.mean, spec.std, interpolation, crop_pct=1.0)
    )


def train_view(
    image: Image.Image, augment: Augment, spec: InputSpec, seed: int, view: int, sample_id: int
) -> UInt8[Tensor, "3 H W"]:
    """One training view of one RGB image, before normalisation and erasing, by timm's and
    torchvision's transforms.

    The generators of Python, numpy and torch are seeded for this view and restored afterwards.
    """
    with keep_generators():
        return _seeded_view(image, augment, spec, keyed.torch_seed(seed, view, sample_id))


def train_views(
    load: Callable[[int], Image.Image],
    augment: Augment,
    spec: InputSpec,
    seed: int,
    views: I64,
    sample_ids: I64,
) -> UInt8[Tensor, "B 3 H W"]:
    """`train_view` of several samples, stacked; ``load`` gives a sample's RGB image, ids and views
    are int64 (B,).
    """
    seeds = (keyed.keys(seed, views, sample_ids, Stream.LIBRARIES) >> np.uint64(1)).tolist()
    with keep_generators():
        return torch.stack(
            [
                _seeded_view(load(i), augment, spec, s)
                for i, s in zip(sample_ids.tolist(), seeds, strict=True)
            ]
        )


@contextmanager
def keep_generators() -> Iterator[None]:
    """Whatever happens inside, the generators of Python, numpy and torch (CPU) continue afterwards
    as if it had not.
    """
    python, numpy, torch_state = (
        random.getstate(),
        np.random.get_state(),
        torch.default_generator.get_state(),
    )
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


def _seeded_view(
    image: Image.Image, augment: Augment, spec: InputSpec, seed: int
) -> UInt8[Tensor, "3 H W"]:
    transform = _train_transform(augment, spec)
    prepared = prepare(image, augment, spec)
    seed_generators(seed)
    return pil_to_tensor(transform(prepared))


@lru_cache(maxsize=16)
def _train_transform(augment: Augment, spec: InputSpec) -> Callable[[Image.Image], Image.Image]:
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
    """Give timm's posterize operations, wherever a policy keeps them, a function that can keep 0
    bits.
    """
    groups = [getattr(transform, "ops", []), *getattr(transform, "policy", [])]
    for operation in (op for group in groups for op in group):
        if isinstance(operation, AugmentOp) and operation.name.startswith("Posterize"):
            operation.aug_fn = posterize


def can_batch(augment: Augment, spec: InputSpec) -> bool:
    """Whether `BatchViews` has every operation of ``augment``: all but AutoAugment, AugMix and
    timm's ``t`` sets.
    """
    return augment.aa is None or Policy.of(augment.aa, spec.mean, augment.interpolation) is not None


class BatchViews:
    """Training views of images held in memory, made in batches on a device.

    ``images`` are what `prepare` gives, all of one size, as uint8 (N, 3, H, W) or (N, H, W, 3) in
    the host's memory.
    """

    def __init__(
        self, images: UInt8[Tensor, "N a b c"], augment: Augment, spec: InputSpec, seed: int
    ) -> None:
        """Raises `ConfigError` when ``augment`` needs an operation that exists for single images
        only.
        """
        if not can_batch(augment, spec):
            raise ConfigError(
                f"aa={augment.aa!r} cannot run on batches in memory; set in_memory to false."
            )
        self.images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
        self.augment, self.spec, self.seed = augment, spec, seed
        self.policy = (
            Policy.of(augment.aa, spec.mean, augment.interpolation) if augment.aa else None
        )
        self.fill = torch.tensor([min(255, round(255 * m)) for m in spec.mean], dtype=torch.uint8)

    def __call__(
        self, sample_ids: I64, views: I64, device: torch.device | str = "cpu"
    ) -> UInt8[Tensor, "B 3 h w"]:
        """Views of the samples, before normalisation and erasing; ids and views are int64 (B,) on
        the host.
        """
        chosen = self.images[torch.from_numpy(sample_ids)]
        if torch.device(device).type == "cuda":
            chosen = chosen.pin_memory()
        images = self._crop(chosen.to(device, non_blocking=True), sample_ids, views)
        for operations in self._draw_colours(sample_ids, views):
            images = apply_operations(images, operations, self.fill, self.augment.interpolation)
        return images

    def _keys(self, sample_ids: I64, views: I64, stream: Stream) -> keyed.U64:
        return keyed.keys(self.seed, views, sample_ids, stream)

    def _crop(
        self, images: UInt8[Tensor, "B 3 H W"], sample_ids: I64, views: I64
    ) -> UInt8[Tensor, "B 3 h w"]:
        augment, device = self.augment, images.device
        flip = keyed.uniforms(self._keys(sample_ids, views, Stream.FLIP), 1)[:, 0] < augment.hflip
        keys = self._keys(sample_ids, views, Stream.CROP)
        offsets = np.zeros((2, len(sample_ids)), dtype=np.int64)
        padding = 0
        if augment.crop == "rrc":
            draws = keyed.uniforms(keys, CROP_UNIFORMS)
            boxes = np.stack(
                random_boxes(draws, images.shape[2], images.shape[3], augment.scale, augment.ratio),
                axis=1,
            )
            images = resize_boxes(
                images, _send(boxes, device), self.spec.image_size, augment.interpolation
            )
        elif augment.crop == "pad":
            padding = augment.crop_padding
            offsets = np.floor(keyed.uniforms(keys, 2) * (2 * padding + 1)).astype(np.int64).T
        top, left, mirrored = _send(np.stack([*offsets, flip.astype(np.int64)]), device)
        return crop_and_flip(images, top, left, mirrored, padding)

    def _draw_colours(self, sample_ids: I64, views: I64) -> list[Operation]:
        keys = self._keys(sample_ids, views, Stream.AUGMENT)
        if self.policy is not None:
            return self.policy.draw(keys)
        if self.augment.color_jitter:
            return draw_jitter(keys, self.augment.color_jitter)
        return []


def _send(array: I64, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
