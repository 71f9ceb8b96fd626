"""Settings of views and contracts of networks that mean something."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import timm

from vitdistill.data.augment import AUGMENTS, Augment, InputSpec
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import ConfigError

MEANINGLESS = [
    *({"crop": "random"}, {"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)}, {"ratio": (2.0, 1.0)}),
    *({"crop": "pad", "crop_padding": -1}, {"hflip": 1.5}, {"mixup": math.nan}, {"aa": ""}),
    *({"aa": "rand-m9-foo3"}, {"aa": "randm9"}, {"scale": (0.5, 1.5)}, {"ratio": (1, math.inf)}),
    *({"crop": "pad", "scale": (0.5, 1.0)}, {"crop_padding": 2}, {"mixup_prob": 0.5}),
    *({"aa": "rand-m9", "color_jitter": 0.3}, {"mixup": 0.8, "mixup_switch_prob": 0.3}),
]


@pytest.mark.parametrize("settings", MEANINGLESS)
def test_meaningless_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        Augment(**settings)
    assert caught.value.field.removeprefix("data.augment.") in settings


@pytest.mark.whole
def test_settings_are_read_without_torch() -> None:
    heavy = "{'torch', 'timm', 'torchvision', 'jaxtyping'}"
    code = f"import sys, vitdistill.data.augment; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_input_contract_of_a_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=1)
    spec = input_spec_of(model)
    assert spec == InputSpec((64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9, "center")
    assert input_spec_of(timm.create_model("resnet18")).image_size == (224, 224)
    with pytest.raises(ConfigError, match="channels"):
        input_spec_of(timm.create_model("vit_tiny_patch16_224", in_chans=1, depth=1))
    impossible = {"image_size": (0, 4), "std": (0.0, 1, 1), "crop_pct": 0.0, "crop_mode": "x"}
    for name, value in impossible.items():
        with pytest.raises(ConfigError):
            replace(spec, **{name: value})


def test_deits_augmentation_is_the_published_one() -> None:
    deit = AUGMENTS["deit"]
    rand = "rand-m9-mstd0.5-inc1"
    assert deit == Augment(aa=rand, reprob=0.25, mixup=0.8, cutmix=1.0, repeated_aug=3)
    assert (deit.crop, deit.scale, deit.hflip) == ("rrc", (0.08, 1.0), 0.5)
    assert (deit.mixup_prob, deit.mixup_switch_prob) == (1.0, 0.5)
