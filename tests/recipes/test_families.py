"""Named recipes are those of their sources, and their networks can be built."""

import re
from typing import Any

import pytest

from vitdistill.distill.plan import make_plan
from vitdistill.methods.dmae import DMAE
from vitdistill.recipes import RECIPES, dmae
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import flatten
from vitdistill.recipes.libkd import LOSSES
from vitdistill.recipes.named import named_recipe
from vitdistill.recipes.stages import Stages
from vitdistill.recipes.yaml import parse_yaml
from vitdistill.runs.networks import build_blank, build_student, plan_of
from vitdistill.vit.flops import forward_flops
from vitdistill.vit.network import Network

DMAE_NAMES = [name for name in RECIPES if name.startswith("dmae_")]
LIBKD = ("libkd", "libkd_cit_tiny", "libkd_cit_small")
DEIT_VIEWS = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "mixup": 0.8, "cutmix": 1.0}
FINE_TUNING = {
    **{f"data.augment.{key}": value for key, value in DEIT_VIEWS.items()},
    "train.batch_size": 1024,
    "student.model_args.global_pool": "avg",
}
PRE_TRAINING = {  # PRETRAIN.md of facebookresearch/mae, whose settings DMAE has too
    "train.batch_size": 4096,
    "optim.lr": 1.5e-4 * 4096 / 256,
    "optim.opt_args.betas": [0.9, 0.95],
    "optim.weight_decay": 0.05,
    "data.augment.scale": [0.2, 1.0],
    "data.augment.aa": None,
    "data.augment.hflip": 0.5,
    "student.init": "mae",
}
BASE = {"train.epochs": 100, "optim.lr": 2e-3, "optim.layer_decay": 0.65, "student.drop_path": 0.1}
LARGE = {"train.epochs": 50, "optim.lr": 4e-3, "optim.layer_decay": 0.75, "student.drop_path": 0.2}
CO_ADVISE = {
    **{f"data.augment.{key}": value for key, value in DEIT_VIEWS.items()},
    "data.augment.repeated_aug": 1,
    "train.epochs": 300,
    "optim.opt": "adamw",
    "optim.weight_decay": 0.05,
    "optim.warmup_epochs": 20,
    "optim.lr": 5e-4 * 1024 / 512,
    "optim.warmup_lr": 5e-7 * 1024 / 512,
    "optim.min_lr": 5e-6 * 1024 / 512,
    "optim.clip_grad": 5 * 3,
    "student.drop_path": 0.1,
}


def recipe_of(name: str) -> Recipe:
    recipe = named_recipe(name)
    assert isinstance(recipe, Recipe)
    return recipe


def stages_of(name: str) -> dict[str, Recipe]:
    found = named_recipe(name)
    assert isinstance(found, Stages) and [*found.stages] == ["pretrain", "finetune"]
    assert found.name == name.replace(":", "_")
    return found.stages


@pytest.mark.parametrize(
    ("name", "stage", "settings"),
    [
        *((name, "", CO_ADVISE) for name in LIBKD),
        *((name, "pretrain", {**PRE_TRAINING, "train.epochs": 100}) for name in DMAE_NAMES),
        *((name, "finetune", {**FINE_TUNING, "optim.lr": 2e-3}) for name in DMAE_NAMES),
        ("mae_base", "pretrain", {**PRE_TRAINING, "train.epochs": 800}),
        ("mae_large", "pretrain", {**PRE_TRAINING, "train.epochs": 800}),
        ("mae_base", "finetune", {**FINE_TUNING, **BASE, "optim.warmup_epochs": 5}),
        ("mae_large", "finetune", {**FINE_TUNING, **LARGE, "optim.warmup_epochs": 5}),
    ],
)
def test_settings_of_the_source(name: str, stage: str, settings: dict[str, Any]) -> None:
    found = flatten(stages_of(name)[stage] if stage else recipe_of(name))
    for field, value in settings.items():
        expected = pytest.approx(value) if isinstance(value, float) else value
        assert found[field] == expected, field


# --- masked autoencoders -------------------------------------------------------------------------


def test_the_releases_differ_in_five_settings_and_the_module_lists_them() -> None:
    def fields(name: str) -> dict[str, Any]:
        stages = stages_of(name).items()
        return {f"{key}.{path}": v for key, r in stages for path, v in flatten(r).items()}

    first, last = (fields(f"dmae_tiny_from_mae_base{of}") for of in (":first_release", ""))
    changed = {key: [first[key], last[key]] for key in last if first[key] != last[key]}
    rows = re.findall(r"^(\w+\.[\w.]+) +(\S+) +(\S+)$", dmae.__doc__ or "", re.MULTILINE)
    assert changed == {key: [parse_yaml(a, ""), parse_yaml(b, "")] for key, a, b in rows}
    assert len(changed) == 5


def test_objectives_and_mask_rates_of_dmae() -> None:
    stages = [stages_of(name)["pretrain"] for name in DMAE_NAMES]
    assert all(stage.objectives["dmae"] == DMAE() for stage in stages)
    rates = [getattr(stage.masking, "mask_rate", None) for stage in stages]
    assert rates == [0.75, 0.9, 0.95, 0.98, 0.75, 0.75]


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "student", "size"),
    [
        ("mae_base", "dmae_small_from_mae_base", 86e6),
        ("mae_large", "dmae_base_from_mae_large", 303e6),
    ],
)
def test_what_mae_pre_trains_teaches_dmae(name: str, student: str, size: float) -> None:
    built, _ = build_blank(stages_of(name)["pretrain"], 1)
    assert built.network.num_parameters == pytest.approx(size, rel=0.01)
    assert built.network.num_classes == 0
    published = stages_of(student)["pretrain"]
    learner, teachers = build_blank(published, 1)
    theirs = teachers["teacher"]
    for fact in ("grid", "depth", "dim"):
        assert getattr(built.network, fact) == getattr(theirs.network, fact)
    # ImageNet's, as Meta's files want it.
    assert built.spec.mean == theirs.spec.mean == learner.spec.mean
    networks = {"teacher": built.network}
    assert make_plan(learner.network, networks, published.objectives, None, published.masking)


# --- a token for each teacher --------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LIBKD, "small_images_libkd", "small_images_cit"])
def test_every_head_has_its_own_teacher(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.objectives == LOSSES
    assert {objective.weight for objective in recipe.objectives.values()} == {1}
    network = build_student(recipe.student, 20).network
    assert network.heads == ("class", "conv", "inv") and network.num_prefix_tokens == 3
    teachers = {key: Network(key, "resnet18", (64, 64), 5, 512, 20, 9) for key in recipe.teachers}
    plan_of(recipe, network, teachers)
    trained: dict[str, Any] = {
        key: objective.trains_heads(network) for key, objective in recipe.objectives.items()
    }
    assert trained == {"ce": ("class",), "kd_conv": ("conv",), "kd_inv": ("inv",)}


def test_small_teachers_are_small() -> None:
    student = build_student(recipe_of("small_images_libkd").student, 10)
    own = forward_flops(student.model, student.spec.image_size)
    for name in ("small_images_conv_teacher", "small_images_inv_teacher"):
        built = build_student(recipe_of(name).student, 10)
        assert built.spec.image_size == (64, 64) and 1e6 < built.network.num_parameters < 1.3e6
        assert forward_flops(built.model, built.spec.image_size) < min(2 * 30e6, 0.6 * own)
    cit = build_student(recipe_of("small_images_cit").student, 10)
    assert student.spec.image_size == cit.spec.image_size == (32, 32)
