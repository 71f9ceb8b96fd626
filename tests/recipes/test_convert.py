"""Plain data becomes a recipe strictly, and fields are replaced all at once."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from tests.recipes.strategies import RECIPES
from vitdistill.errors import Add, ConfigError, Set
from vitdistill.methods.base import WeightSchedule
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import MaskedKD, RandomPatches
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import convert, flatten, from_dict, replace_fields, to_dict
from vitdistill.recipes.named import named_recipe


@given(recipe=RECIPES)
def test_any_recipe_survives_json_and_flattening(recipe: Recipe) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    flat = flatten(recipe)
    assert flat["student.model"] == recipe.student.model
    nested = ("model_args", "opt_args")
    leaves = {k: v for k, v in flat.items() if not any(part in k for part in nested)}
    assert (
        replace_fields(Recipe(**vars(recipe)), {k: leaves[k] for k in ("optim.lr", "train.epochs")})
        == recipe
    )


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"optim": {"lr": "fast"}}, "optim.lr"),
        ({"optim": {"lr": None}}, "optim.lr"),
        ({"optim": {"lr": float("nan")}}, "optim.lr"),
        ({"optim": {"lr": 10**400}}, "optim.lr"),
        ({"optim": {"sched": "cosin"}}, "optim.sched"),
        ({"train": {"epochs": 1.5}}, "train.epochs"),
        ({"train": {"epochs": "--5"}}, "train.epochs"),
        ({"train": {"epochs": "²"}}, "train.epochs"),
        ({"train": {"compile": "soon"}}, "train.compile"),
        ({"name": 5}, "name"),
        ({"student": {"model_args": [1]}}, "student.model_args"),
        ({"student": {"model_args": {"a": float("nan")}}}, "student.model_args.a"),
        ({"data": {"augment": {"scale": [1, "big"]}}}, "data.augment.scale[1]"),
        ({"teachers": ["a"]}, "teachers"),
        ({"objectives": {"kd": {"weight": 1}}}, "objectives.kd"),
        ({"objectives": {"kd": {"method": "maskedkd"}}}, "objectives.kd"),
        ({"objectives": {"kd": {"method": "kd", "temprature": 2}}}, "objectives.kd.temprature"),
        ({"selector": {"method": "maskedkd", "keep_rate": "half"}}, "selector.keep_rate"),
        ({"unknown": "x" * 9000}, "unknown"),
    ],
)
def test_wrong_data_is_refused_by_field(data: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(data, "mine.yaml")
    assert caught.value.field == field and "mine.yaml" in caught.value.what
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("objectives.kd", {"temperature": -1}, "objectives.kd.temperature"),
        ("objectives.kd", {"schedule": {"to": -1}}, "objectives.kd.schedule.to"),
        ("selector", {"method": "maskedkd", "keep_rate": 2}, "selector.keep_rate"),
        ("masking", {"method": "random_masking", "mask_rate": 1}, "masking.mask_rate"),
    ],
)
def test_a_wrong_setting_of_a_method_is_named_from_the_root(
    path: str, value: dict[str, Any], field: str
) -> None:
    section, _, name = path.partition(".")
    whole: dict[str, Any] = {"method": "kd", **value}
    with pytest.raises(ConfigError) as caught:
        from_dict({section: {name: whole} if name else whole})
    assert caught.value.field == field
    recipe = Recipe(objectives={"kd": SoftKD(schedule=WeightSchedule(to=1.0))}, selector=MaskedKD())
    leaves = {f"{path}.{key}": part for key, part in value.items()}
    if path != "masking":
        with pytest.raises(ConfigError) as caught:
            replace_fields(recipe, leaves)
        assert caught.value.field == field


def test_numbers_are_also_read_from_text() -> None:
    assert convert("3", int | None, "x") == 3 and convert("1e-3", float, "x") == 1e-3
    with pytest.raises(ConfigError):
        convert("3.5", int, "x")


# --- replacing fields ----------------------------------------------------------------------------


def test_fields_are_replaced_together() -> None:
    recipe = Recipe(objectives={"kd": SoftKD(weight=0.5)}, selector=MaskedKD())
    changes = {
        "train.epochs": 3,
        "optim.warmup_epochs": 1,
        "selector.keep_rate": 0.25,
        "objectives.kd.temperature": "2",
    }
    changed = replace_fields(recipe, changes)
    assert (changed.train.epochs, changed.optim.warmup_epochs) == (3, 1.0)
    assert changed.selector == MaskedKD(keep_rate=0.25)
    assert changed.objectives["kd"] == SoftKD(weight=0.5, temperature=2.0)
    same = {name: getattr(recipe, name) for name in ("train", "optim", "selector", "objectives")}
    assert replace(changed, **same) == recipe


def test_open_ended_fields_take_new_keys() -> None:
    changed = replace_fields(Recipe(), {"student.model_args.depth": 6, "optim.opt_args.eps": 1e-8})
    assert changed.student.model_args == {"depth": 6} and changed.optim.opt_args == {"eps": 1e-8}


def test_a_method_may_change_with_its_fields() -> None:
    recipe = replace_fields(Recipe(), {"selector": {"method": "maskedkd"}})
    assert recipe.selector == MaskedKD()
    other = {"selector.method": "random_patches", "selector.num_keep": 3}
    recipe = replace(recipe, selector=RandomPatches(keep_rate=0.25))
    assert replace_fields(recipe, other).selector == RandomPatches(keep_rate=0.25, num_keep=3)


@pytest.mark.parametrize(
    ("path", "fix"),
    [
        ("optim.lrr", "did you mean 'lr'?"),
        ("optm.lr", Set("optim.lr", 1)),
        ("selector.keep_rate", Add("maskedkd")),
        ("masking.mask_rate", Add("random_masking")),
        ("objectives.ce.schedule.to", Set("objectives.ce.schedule")),
        ("optim.clip_grad.x", Set("optim.clip_grad")),
    ],
)
def test_a_wrong_path_is_refused_with_what_to_do(path: str, fix: object) -> None:
    with pytest.raises(ConfigError) as caught:
        replace_fields(Recipe(), {path: 1})
    assert caught.value.fixes == (fix,)


@pytest.mark.parametrize("path", ["optim.lr.x", "teachers.teacher.model", "", "..", "objectives.x"])
def test_a_path_that_leads_nowhere(path: str) -> None:
    with pytest.raises(ConfigError):
        replace_fields(Recipe(), {path: 1})


def test_a_field_that_is_elsewhere_is_found() -> None:
    recipe = named_recipe("kd")
    for path, places in (
        ("kd.temperature", ["objectives.kd.temperature"]),
        ("pretrained", ["student.pretrained", "teachers.teacher.pretrained"]),
        ("teachers.cnn.model", ["teachers.teacher.model"]),
        ("data.lr", ["optim.lr"]),
    ):
        with pytest.raises(ConfigError) as caught:
            replace_fields(recipe, {path: 2})
        assert caught.value.fixes == tuple(Set(place, 2) for place in places)
