"""The recipe: what is out of bounds, and what cannot take effect together, is refused by field."""

import dataclasses
from typing import Any

import pytest
import torch

from vitdistill.data.augment import Augment
from vitdistill.errors import ConfigError
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.option import options_of
from vitdistill.recipes.config import Recipe, TeacherConfig
from vitdistill.recipes.convert import flatten, replace_fields
from vitdistill.recipes.settings import EVERY_STAGE, FIRST_STAGE, PARTS, settings_with_flags


def refused(recipe: Recipe, changes: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        replace_fields(recipe, changes)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.epochs", 0),
        ("train.ema_decay", 1.0),
        ("optim.lr", 0.0),
        ("optim.layer_decay", 1.5),
        ("optim.warmup_epochs", -1.0),
        ("data.workers", -1),
        ("data.augment.hflip", 1.5),
        ("data.augment.scale", [0.5, 0.2]),
        ("train.seed", 2**64),
        ("data.seed", 2**64),
        ("name", "../up"),
        ("student.model_args.num_classes", 10),
        ("student.model_args.checkpoint", "a.pth"),
        ("student.model_args.pretrained", True),
        ("student.model_args.image_size", 64),
        ("student.model_args.drop_path", 0.1),
        ("student.model_args.name", "vit"),
    ],
)
def test_values_out_of_bounds(field: str, value: Any) -> None:
    assert refused(Recipe(), {field: value}).field == field


@pytest.mark.parametrize("name", ["num_classes", "checkpoint", "pretrained", "image_size", "name"])
def test_an_argument_of_a_teacher_that_is_a_setting_elsewhere(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(teachers={"conv": TeacherConfig(model="resnet18", model_args={name: 10})})
    assert caught.value.field == f"teachers.conv.model_args.{name}"


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**64 - 1])
def test_every_seed_that_is_taken_is_one_for_torch(seed: int) -> None:
    assert replace_fields(Recipe(), {"train.seed": seed, "data.seed": seed}).train.seed == seed
    torch.Generator().manual_seed(seed)


def test_bounds_of_a_recipe_made_in_python() -> None:
    conv = TeacherConfig()
    object.__setattr__(conv, "precision", "float8")  # past the type checks of these tests
    with pytest.raises(ConfigError) as caught:
        Recipe(teachers={"conv": conv})
    assert caught.value.field == "teachers.conv.precision"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"train.epochs": 5}, "optim.warmup_epochs"),
        ({"optim.sched": "none"}, "optim.warmup_epochs"),
        ({"optim.lr": 1e-6}, "optim.min_lr"),
        ({"optim.min_lr": 0.1}, "optim.min_lr"),
        ({"data.views": 2, "data.augment.repeated_aug": 3}, "data.views"),
        ({"objectives": {"loss": {"method": "ce"}}}, "objectives"),
        ({"objectives": {"a.b": {"method": "ce"}}}, "objectives"),
        ({"teachers": {"student": {"model": "x"}}}, "teachers"),
        ({"teachers": {"a": {"missing": "online"}}}, "teachers.a.labels"),
        ({"teachers": {"a": {"missing": "online", "labels": "x"}}}, "teachers.a.model"),
    ],
)
def test_what_cannot_take_effect_together(changes: dict[str, Any], field: str) -> None:
    error = refused(Recipe(), changes)
    assert error.field == field and error.fixes


def test_every_setting_is_described_and_every_flag_leads_to_a_field() -> None:
    for part in (*PARTS.values(), Augment):
        assert options_of(part).keys() == {field.name for field in dataclasses.fields(part)}
    settings = [*settings_with_flags()]
    flags = [word for _, _, option in settings for word in option.spellings]
    assert len(flags) == len(set(flags))
    recipe = Recipe(teachers={"teacher": TeacherConfig()}, selector=MaskedKD())
    recipe = replace_fields(recipe, {"objectives.kd": {"method": "kd"}})
    known = flatten(recipe)
    assert all(path in known for path, _, _ in settings)
    assert {*EVERY_STAGE, *FIRST_STAGE} <= {path for path, _, _ in settings}
