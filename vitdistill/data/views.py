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

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.auto_augment import AugmentOp
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from .. import keyed
from ..errors import ConfigError
from ..keyed import I64, Stream
from .geometry import CROP_UNIFORMS, crop_and_flip, random_boxes, resize_boxes
from .randaugment import Operation, Policy, apply_operations, draw_jitter, posterize

_NUMBER = r"\d+(\.\d+)?"
_AA_FORMS = (
    re.compile(rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|tweights|t3a|t3aw))*"),
    re.compile(rf"(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"),
    re.compile(rf"augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"),
)
_INTERPOLATIONS = {
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
}


@dataclass(frozen=True)
class Augment:
    """How a training view is made; names and meanings are timm's.

    Attributes:
        crop: ``rrc`` RandomResizedCrop; ``pad`` the middle of the image at the input size (of a
            square one all of it), padded with black, then a random crop; ``center`` the evaluation
            crop.
        scale: smallest and largest area of ``rrc``, as a fraction of the image (timm: 0.08 to 1).
        ratio: smallest and largest aspect ratio of ``rrc`` (timm: 3/4 to 4/3).
        crop_padding: black pixels on each side for ``pad``.
        hflip: probability of a mirrored image (timm: 0.5).
        aa: timm's auto-augment string, such as ``rand-m9-mstd0.5-inc1``, or None. Pillow 13 refuses
            to posterize to 0 bits, which timm asks for on about one image in 600; here, as in the
            Pillow of DeiT's time, that image turns black.
        color_jitter: brightness, contrast and saturation factors within 1 +- this; not together
            with ``aa`` (timm: 0.4, unused under RandAugment).
        reprob: probability of one erased rectangle of noise, after normalisation (timm's ``pixel``
            mode).
        mixup: alpha of Mixup's Beta distribution, 0 for none.
        cutmix: alpha of CutMix's Beta distribution, 0 for none.
        mixup_prob: probability that a pair of images is mixed at all.
        mixup_switch_prob: probability of CutMix where both are on.
        repeated_aug: views of each image an epoch, 1 for plain training; DeiT has 3 (with a third
            of the images each epoch).
        interpolation: ``bicubic`` or ``bilinear``.
    """

    crop: Literal["rrc", "pad", "center"] = "rrc"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = 4
    hflip: float = 0.5
    aa: str | None = None
    color_jitter: float = 0.0
    reprob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    repeated_aug: int = 1
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values that mean nothing, or that could not take effect."""
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        _require(
            self.crop in ("rrc", "pad", "center"), "crop", self.crop, "'rrc', 'pad' or 'center'"
        )
        low, high = self.scale
        _require(0.0 < low <= high <= 1.0, "scale", self.scale, "two ascending numbers in (0, 1]")
        low, high = self.ratio
        _require(
            0.0 < low <= high < math.inf, "ratio", self.ratio, "two ascending positive numbers"
        )
        _require(self.crop_padding >= 0, "crop_padding", self.crop_padding, "0 or more pixels")
        for name in ("hflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, name, value, "a probability from 0 to 1")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            _require(0.0 <= value < math.inf, name, value, "an alpha of 0 (off) or more")
        _require(
            0.0 <= self.color_jitter <= 1.0,
            "color_jitter",
            self.color_jitter,
            "a number from 0 to 1",
        )
        _require(self.repeated_aug >= 1, "repeated_aug", self.repeated_aug, "1 or more")
        _require(
            self.interpolation in _INTERPOLATIONS,
            "interpolation",
            self.interpolation,
            "'bicubic' or 'bilinear'",
        )
        known = self.aa is None or any(form.fullmatch(self.aa) for form in _AA_FORMS)
        _require(known, "aa", self.aa, "a string of timm's, such as 'rand-m9-mstd0.5-inc1'")

    def _check_combinations(self) -> None:
        default = _defaults()
        for name, crop in (("scale", "rrc"), ("ratio", "rrc"), ("crop_padding", "pad")):
            if self.crop != crop and getattr(self, name) != default[name]:
                raise ConfigError(
                    f"{name} has no effect with crop={self.crop!r}; leave it out or use"
                    f" crop={crop!r}."
                )
        if self.color_jitter and self.aa and "3a" not in self.aa:
            raise ConfigError(
                f"color_jitter has no effect together with aa={self.aa!r}; set one of them only."
            )
        if not self.mixes and self.mixup_prob != default["mixup_prob"]:
            raise ConfigError(
                "mixup_prob has no effect without mixup or cutmix; set one of those above 0."
            )
        if (
            not (self.mixup and self.cutmix)
            and self.mixup_switch_prob != default["mixup_switch_prob"]
        ):
            raise ConfigError(
                "mixup_switch_prob has no effect unless both mixup and cutmix are on; set both"
                " above 0."
            )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0.0 or self.cutmix > 0.0


def _defaults() -> dict[str, Any]:
    return {name: field.default for name, field in Augment.__dataclass_fields__.items()}


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}.")


AUGMENTS: dict[str, Augment] = {
    "deit": Augment(aa="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0, repeated_aug=3),
    "small": Augment(crop="pad"),
    "none": Augment(crop="center", hflip=0.0),
}
"""Named augmentations: DeiT's full recipe, crop and flip for small images, and nothing at all."""


@dataclass(frozen=True)
class InputSpec:
    """What a network wants to be fed: image size (height, width), normalisation of RGB, and the
    evaluation crop.

    ``crop_pct`` is the fraction of the resized image that the evaluation crop keeps; ``crop_mode``
    is timm's.
    """

    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        """Raise `ConfigError` for impossible values."""
        _require(
            len(self.image_size) == 2 and min(self.image_size) > 0,
            "image_size",
            self.image_size,
            "two positive numbers",
        )
        _require(len(self.mean) == 3, "mean", self.mean, "three numbers")
        _require(
            len(self.std) == 3 and min(self.std) > 0, "std", self.std, "three positive numbers"
        )
        _require(0.0 < self.crop_pct <= 1.0, "crop_pct", self.crop_pct, "in (0, 1]")
        _require(
            self.crop_mode in ("center", "squash", "border"),
            "crop_mode",
            self.crop_mode,
            "'center', 'squash' or 'border'",
        )

    @classmethod
    def of_model(cls, model: nn.Module) -> "InputSpec":
        """A timm model's own contract: its ``pretrained_cfg``, with the image size the model was
        really built for.
        """
        config = resolve_model_data_config(model)
        channels, *size = config["input_size"]
        built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = list(built_for) if built_for is not None else size
        channels = next(
            (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), channels
        )
        if channels != 3:
            raise ConfigError(f"the model takes {channels} channels; only RGB input is supported.")
        return cls(
            (int(size[0]), int(size[1])),
            _triple(config["mean"]),
            _triple(config["std"]),
            str(config["interpolation"]),
            float(config["crop_pct"]),
            str(config["crop_mode"]),
        )


def evaluated_as_trained(spec: InputSpec, augment: Augment) -> InputSpec:
    """The contract of a network trained with ``augment``: one that was trained on whole images
    (``pad``) is evaluated on whole images.
    """
    return replace(spec, crop_pct=1.0) if augment.crop == "pad" else spec


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


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
