"""Named recipes, and the other ways to say which recipe is meant."""

from pathlib import Path
from typing import Any

import pytest

from vitdistill.errors import ConfigError
from vitdistill.methods import METHODS, method_class
from vitdistill.recipes import RECIPES
from vitdistill.recipes.convert import to_dict
from vitdistill.recipes.named import find_recipe, method_of_recipes, named_recipe
from vitdistill.recipes.stages import load
from vitdistill.recipes.yaml import dump_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe = named_recipe(name)
    assert recipe.name == name and recipe.description
    (tmp_path / "mine.yaml").write_text(dump_recipe(recipe))
    assert load(tmp_path / "mine.yaml") == recipe
    for variant in RECIPES[name].variants:
        assert to_dict(named_recipe(f"{name}:{variant}")) != to_dict(recipe)


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name in (str(tmp_path / "no.yaml"), "no.yaml", "a/b", str(tmp_path / "folder.yaml")):
        with pytest.raises(ConfigError, match="no recipe"):
            find_recipe(name)
    for name in ("maskdkd", "maskedkd:first_release", "dmae_tiny_from_mae_base:first"):
        with pytest.raises(ConfigError) as caught:
            find_recipe(name)
        assert caught.value.field == "recipe" and caught.value.fixes != ("",)


def test_a_run_folder_stands_for_its_recipe(tmp_path: Path) -> None:
    recipe = named_recipe("small_images_alone")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert find_recipe(str(tmp_path)) == recipe


MEANS, MAE = {"reduction": "mean"}, {"decoder_dim": 64, "norm_pix": True}
ADDED: list[tuple[str, str, dict[str, Any]]] = [
    *[(beside, "vitkd", MEANS) for beside in RECIPES],
    *[(name, "vitkd", MEANS) for name in ("run", "deit_tiny_nkd:x", "")],
    ("alone", "kd", {"temperature": 1.0}),
    ("small_images_alone", "kd", {"temperature": 4.0}),
    ("small_images_alone", "mae", MAE),
    ("small_images_libkd", "maskedkd", {"keep_rate": 0.5}),
    ("alone", "wttm", {"temperature": 1.25}),
]


@pytest.mark.parametrize(("beside", "name", "settings"), ADDED)
def test_a_method_added_by_name_means_what_its_recipes_mean(
    beside: str, name: str, settings: dict[str, Any]
) -> None:
    method = method_of_recipes(name, beside)
    assert type(method) is method_class(name) and getattr(method, "weight", 1.0) == 1.0
    assert {key: getattr(method, key) for key in settings} == settings


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_added_to_recipes_of_any_size(name: str) -> None:
    for beside in ("alone", "small_images_maskedkd"):
        assert type(method_of_recipes(name, beside)) is method_class(name)
