"""The DMAE pairs: the five settings that changed between the authors' releases, and what both
share.
"""

import re

import pytest

from vitdistill.errors import ConfigError
from vitdistill.methods.dmae import DMAE
from vitdistill.recipes import RECIPES, dmae
from vitdistill.recipes.convert import flatten
from vitdistill.recipes.named import named_recipe
from vitdistill.recipes.stages import Stages

NAMES = [name for name in RECIPES if name.startswith("dmae_")]


def stages(name: str) -> Stages:
    found = named_recipe(name)
    assert (
        isinstance(found, Stages)
        and found.name == name.replace(":", "_")
        and list(found.stages) == ["pretrain", "finetune"]
    )
    return found


def leaves(name: str) -> dict[str, object]:
    return {
        f"{key}.{path}": value
        for key, stage in stages(name).stages.items()
        for path, value in flatten(stage).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_releases_differ_in_five_settings_and_the_module_lists_them(name: str) -> None:
    first, last = leaves(f"{name}:first_release"), leaves(name)
    changed = {key: (first[key], last[key]) for key in last if first[key] != last[key]}
    rows = re.findall(r"^(\w+\.[\w.]+) +(\S+) +(\S+)$", dmae.__doc__ or "", re.MULTILINE)
    said = {
        key: (float(a), float(b)) if a[0].isdigit() else (a == "true", b == "true")
        for key, a, b in rows
    }
    assert changed == said and len(said) == 5


@pytest.mark.parametrize("name", NAMES)
def test_what_both_releases_share(name: str) -> None:
    pretrain, finetune = stages(name).stages.values()
    assert (pretrain.train.epochs, pretrain.train.batch_size, pretrain.optim.lr) == (
        100,
        4096,
        pytest.approx(1.5e-4 * 4096 / 256),
    )
    assert (finetune.train.epochs, finetune.train.batch_size, finetune.optim.lr) == (
        100,
        1024,
        pytest.approx(5e-4 * 1024 / 256),
    )
    assert pretrain.optim.opt_args == {"betas": [0.9, 0.95]} and finetune.optim.opt_args == {
        "betas": [0.9, 0.999]
    }
    assert (
        pretrain.objectives["dmae"] == DMAE() and pretrain.objectives["mae"].weight == 1
    )  # unit weights, 3/4 depth, L1 on unit length
    augment = finetune.data.augment
    assert (augment.aa, augment.reprob, augment.mixup, augment.cutmix) == (
        "rand-m9-mstd0.5-inc1",
        0.25,
        0.8,
        1.0,
    )
    assert (
        pretrain.data.augment.scale == (0.2, 1.0)
        and pretrain.data.augment.hflip == 0.5
        and pretrain.student.init == "mae"
    )
    assert finetune.student.model_args == {"global_pool": "avg"}


def test_mask_rates() -> None:
    rates = {name: stages(name).stages["pretrain"].masking for name in NAMES}
    assert [getattr(rates[name], "mask_rate", None) for name in NAMES] == [
        0.75,
        0.9,
        0.95,
        0.98,
        0.75,
        0.75,
    ]


def test_a_name_of_before_is_refused_with_what_to_write_now() -> None:
    with pytest.raises(ConfigError) as caught:
        named_recipe("dmae_tiny_from_mae_base_first_release")
    assert caught.value.fixes == ("write dmae_tiny_from_mae_base:first_release",)
    with pytest.raises(ConfigError):
        named_recipe("dmae_tiny_from_mae_base:first")
