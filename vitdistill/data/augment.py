"""How training views are made, and what a network wants to be fed."""

import math
import re
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import ConfigError
from ..option import check_options, option

_NUMBER = r"\d+(\.\d+)?"


_AA_FORMS = (
    re.compile(rf"rand(-(m\d+|n\d+|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|tweights|t3a|t3aw))*"),
    re.compile(rf"(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"),
    re.compile(rf"augmix(-(m\d+|w\d+|d\d+|a{_NUMBER}|b[01]|mstd{_NUMBER}))*"),
)


@dataclass(frozen=True)
class Augment:
    """How a training view is made; names and meanings are timm's.

    Pillow 13 refuses to posterize to 0 bits, which ``aa`` asks for on about one image in 600; here,
    as in the Pillow of DeiT's time, that image turns black.
    """

    crop: Literal["rrc", "pad", "center"] = option(
        "rrc",
        "rrc: RandomResizedCrop; pad: padded crop for small images; center: none",
        "--crop",
    )
    scale: tuple[float, float] = option(
        (0.08, 1.0), "smallest and largest area of crop rrc, as a fraction of the image"
    )
    ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3), "smallest and largest aspect ratio of crop rrc"
    )
    crop_padding: int = option(4, "black pixels on each side for crop pad", at_least=0)
    hflip: float = option(0.5, "probability of a mirrored image", "--hflip", at_least=0, at_most=1)
    aa: str | None = option(None, "timm's auto-augment string; none: none", "--aa")
    color_jitter: float = option(
        0.0,
        "strength of colour jitter; not together with auto-augment",
        "--color-jitter",
        at_least=0,
        at_most=1,
    )
    reprob: float = option(0.0, "probability of random erasing", "--reprob", at_least=0, at_most=1)
    mixup: float = option(0.0, "alpha of Mixup; 0: none", "--mixup", at_least=0, below=math.inf)
    cutmix: float = option(0.0, "alpha of CutMix; 0: none", "--cutmix", at_least=0, below=math.inf)
    mixup_prob: float = option(
        1.0, "probability that a pair of images is mixed at all", at_least=0, at_most=1
    )
    mixup_switch_prob: float = option(
        0.5, "probability of CutMix where both are on", at_least=0, at_most=1
    )
    repeated_aug: int = option(
        1, "views an epoch has of an image; DeiT: 3", "--repeated-aug", at_least=1
    )
    interpolation: Literal["bicubic", "bilinear"] = option("bicubic", "of resizing")

    def __post_init__(self) -> None:
        """Raise `ConfigError` for values that mean nothing, or that could not take effect."""
        check_options(self, "data.augment")
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for name, most in (("scale", 1.0), ("ratio", sys.float_info.max)):
            low, high = getattr(self, name)
            _require(
                0.0 < low <= high <= most,
                f"data.augment.{name}",
                (low, high),
                f"two ascending numbers above 0{', at most 1' if most == 1 else ''}",
            )
        known = self.aa is None or any(form.fullmatch(self.aa) for form in _AA_FORMS)
        _require(
            known, "data.augment.aa", self.aa, "a string of timm's, such as 'rand-m9-mstd0.5-inc1'"
        )

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
        raise ConfigError(f"{name} is {value!r}", f"give {wanted}", field=name)


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
