"""Settings of methods: described, bounded, and the same after JSON and YAML."""

import dataclasses
import json
import math
from dataclasses import replace
from typing import Any, Literal, get_origin, get_type_hints

import pytest
from method_cases import OBJECTIVES, SELECTORS

from vitdistill.errors import ConfigError
from vitdistill.methods import METHODS, method_class
from vitdistill.methods.base import WeightSchedule
from vitdistill.option import options_of
from vitdistill.recipes.config import Recipe, TeacherConfig
from vitdistill.recipes.convert import from_dict, to_dict
from vitdistill.recipes.yaml import dump_recipe, load_recipe


@pytest.mark.parametrize("name", METHODS)
def test_a_method_survives_json_and_yaml(name: str, tmp_path: Any) -> None:
    method: Any = method_class(name)()
    parts: dict[str, Any] = {"masking": method}
    if name in SELECTORS:
        parts = {"selector": method}
    elif name in OBJECTIVES:
        method = replace(method, schedule=WeightSchedule(to=0.5, end=0.75, shape="cosine"))
        parts = {"objectives": {"it": method}, "teachers": {"teacher": TeacherConfig(model="x")}}
    recipe = Recipe(**parts)
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


DECLARED = [*((name, method_class(name)) for name in METHODS), ("schedule", WeightSchedule)]


def test_every_setting_of_a_method_is_described() -> None:
    for name, method in DECLARED:
        assert {field.name for field in dataclasses.fields(method)} == set(options_of(method)), name


@pytest.mark.parametrize(("name", "method"), DECLARED)
def test_a_setting_out_of_its_bounds_is_refused_by_its_name(name: str, method: Any) -> None:
    base = {"to": 0.5} if method is WeightSchedule else {}
    hints = get_type_hints(method)
    wrong = [(field, "no such") for field, hint in hints.items() if get_origin(hint) is Literal]
    for field, about in options_of(method).items():
        outside = [about.above, about.below, math.nan, math.inf]
        outside += [] if about.at_least is None else [about.at_least - 1, about.at_least - 1e-9]
        outside += [] if about.at_most is None else [about.at_most + 1e-9]
        wrong += [(field, x) for x in outside if about.bounds and x is not None]
    for field, value in wrong:
        with pytest.raises(ConfigError) as caught:
            method(**{**base, field: value})
        assert caught.value.field.rpartition(".")[2] == field
