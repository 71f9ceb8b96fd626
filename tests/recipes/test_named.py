"""Named recipes, and the other ways to say which recipe is meant."""

from pathlib import Path

import pytest

from vitdistill.errors import ConfigError
from vitdistill.recipes import RECIPES
from vitdistill.recipes.convert import to_dict
from vitdistill.recipes.named import find_recipe, named_recipe
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
        with pytest.raises(ConfigError, match="no recipe file"):
            find_recipe(name)
    for name in ("maskdkd", "maskedkd:first_release", "dmae_tiny_from_mae_base:first"):
        with pytest.raises(ConfigError) as caught:
            find_recipe(name)
        assert caught.value.field == "recipe" and caught.value.fixes != ("",)


def test_a_run_folder_stands_for_its_recipe(tmp_path: Path) -> None:
    recipe = named_recipe("small_images_alone")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert find_recipe(str(tmp_path)) == recipe
