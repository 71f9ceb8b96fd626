"""How training views are made, and what a network wants to be fed."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import ConfigError

_NUMBER = r"\d+(\.\d+)?"


_AA_FORMS = (
    re.compile(rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|tweights|t3a|t3aw))*"),
    re.compile(rf"(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"),
    re.compile(rf"augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"),
)


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
            self.interpolation in ("bilinear", "bicubic"),
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


def evaluated_as_trained(spec: InputSpec, augment: Augment) -> InputSpec:
    """The contract of a network trained with ``augment``: one that was trained on whole images
    (``pad``) is evaluated on whole images.
    """
    return replace(spec, crop_pct=1.0) if augment.crop == "pad" else spec
