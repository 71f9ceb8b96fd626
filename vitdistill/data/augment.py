"""How training views are made, and the input a network expects."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import ConfigError, Set
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
        "rrc", "rrc: RandomResizedCrop; pad: padded crop for small images; center: none", "--crop"
    )
    scale: tuple[float, float] = option(
        (0.08, 1.0), "smallest and largest area of crop rrc, as a fraction of the image"
    )
    ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3), "smallest and largest aspect ratio of crop rrc"
    )
    crop_padding: int = option(
        4, "black pixels on each side for crop pad", at_least=0, at_most=4096
    )
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
    mixup: float = option(0.0, "alpha of Mixup; 0: none", "--mixup", at_least=0)
    cutmix: float = option(0.0, "alpha of CutMix; 0: none", "--cutmix", at_least=0)
    mixup_prob: float = option(
        1.0, "probability that a pair of images is mixed at all", at_least=0, at_most=1
    )
    mixup_switch_prob: float = option(
        0.5, "probability of CutMix where both are on", at_least=0, at_most=1
    )
    repeated_aug: int = option(
        1, "views an epoch has of an image; DeiT: 3", "--repeated-aug --aug-repeats", at_least=1
    )
    interpolation: Literal["bicubic", "bilinear"] = option("bicubic", "of resizing")

    def __post_init__(self) -> None:
        check_options(self, "data.augment")
        (least, most), (low, high) = self.scale, self.ratio
        ascending = "two ascending numbers above 0"
        in_image = 0.0 < least <= most <= 1.0
        _require(in_image, "data.augment.scale", (least, most), f"{ascending}, at most 1")
        _require(0.0 < low <= high < math.inf, "data.augment.ratio", (low, high), ascending)
        known = self.aa is None or any(form.fullmatch(self.aa) for form in _AA_FORMS)
        wanted = "a string of timm's, such as 'rand-m9-mstd0.5-inc1'"
        _require(known, "data.augment.aa", self.aa, wanted)
        for name, (has_effect, why, fix) in self._effects().items():
            default, field = getattr(Augment, name), f"data.augment.{name}"
            if not has_effect and getattr(self, name) != default:
                fixes = (_set(name, default), fix)
                raise ConfigError(f"{name} has no effect {why}", fixes, field=field)

    def _effects(self) -> dict[str, tuple[bool, str, Set]]:
        """Map each dependent setting to whether it acts, why not, and what would enable it."""
        both, crop = self.mixup > 0.0 and self.cutmix > 0.0, f"with crop {self.crop!r}"
        jitters = not self.aa or "3a" in self.aa
        return {
            "scale": (self.crop == "rrc", crop, _set("crop", "rrc")),
            "ratio": (self.crop == "rrc", crop, _set("crop", "rrc")),
            "crop_padding": (self.crop == "pad", crop, _set("crop", "pad")),
            "color_jitter": (jitters, "together with data.augment.aa", _set("aa")),
            "mixup_prob": (self.mixes, "without mixup or cutmix", _set("mixup")),
            "mixup_switch_prob": (both, "unless both mixup and cutmix are on", _set("mixup")),
        }

    def effective(self) -> dict[str, Any]:
        """Return the settings that act on a view."""
        effects = {name: acts for name, (acts, _, _) in self._effects().items()}
        return {name: value for name, value in vars(self).items() if effects.get(name, True)}

    @property
    def mixes(self) -> bool:
        return self.mixup > 0.0 or self.cutmix > 0.0


def _set(name: str, value: object = None) -> Set:
    return Set(f"data.augment.{name}", value)


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}", f"give {wanted}", field=name)


# ``deit`` is of Touvron et al., "Training data-efficient image transformers", ICML 2021, table 9,
# with the values of its public code (random erasing 0.25, three repeats).
AUGMENTS: dict[str, Augment] = {
    "deit": Augment(aa="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0, repeated_aug=3),
    "small": Augment(crop="pad"),
    "none": Augment(crop="center", hflip=0.0),
}


@dataclass(frozen=True)
class InputSpec:
    """The input a network expects."""

    image_size: tuple[int, int]  # height, width
    mean: tuple[float, float, float]  # of RGB, in units of white
    std: tuple[float, float, float]
    interpolation: str = "bicubic"  # of the evaluation crop
    crop_pct: float = 0.875  # the part of the resized image that this crop keeps; above 1: padded
    crop_mode: str = "center"  # timm's: center, squash or border

    def __post_init__(self) -> None:
        size, std = self.image_size, self.std
        _require(len(size) == 2 and min(size) > 0, "image_size", size, "two positive numbers")
        _require(len(self.mean) == 3, "mean", self.mean, "three numbers")
        _require(len(std) == 3 and min(std) > 0, "std", std, "three positive numbers")
        _require(0.0 < self.crop_pct <= 2.0, "crop_pct", self.crop_pct, "a number in (0, 2]")
        modes = ("center", "squash", "border")
        _require(self.crop_mode in modes, "crop_mode", self.crop_mode, f"one of {modes}")


def evaluated_as_trained(spec: InputSpec, augment: Augment) -> InputSpec:
    """Return ``spec``, without a crop for a network trained on whole images (``pad``)."""
    return replace(spec, crop_pct=1.0) if augment.crop == "pad" else spec
