"""Recipes by their name, by a file, or by the folder of a run."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ..errors import ConfigError
from ..messages import printable, suggest
from . import RECIPES
from .config import Recipe
from .stages import STAGES, Stages, load


def named_recipe(name: str) -> Recipe | Stages:
    """Return the recipe ``NAME`` or ``NAME:VARIANT``; raises `ConfigError` with a suggestion."""
    plain, _, variant = name.partition(":")
    if plain not in RECIPES:
        fix = suggest(plain, RECIPES, "'vitdistill recipes' lists them")
        raise ConfigError(f"there is no recipe {printable(name)!r}", fix, field="recipe")
    family = RECIPES[plain]
    if variant and variant not in family.variants:
        fix = suggest(variant, family.variants, f"write {plain} alone")
        raise ConfigError(f"{plain} has no variant {printable(variant)!r}", fix, field="recipe")
    make: Callable[..., Recipe | Stages]
    make = import_module(f".{family.module}", __package__).make
    return make(plain, **{variant: True}) if variant else make(plain)


def find_recipe(name: str) -> Recipe | Stages:
    """Return a recipe by its name, by the path of a YAML file, or by the folder of a run or of
    stages, which holds its recipe.
    """
    if name in RECIPES:
        return named_recipe(name)
    path = Path(name)
    for file in (STAGES, "recipe.yaml"):
        if (path / file).is_file():
            return load(path / file)
    if path.suffix in (".yaml", ".yml") or "/" in name:
        if not path.is_file():
            raise ConfigError(f"there is no recipe file {printable(name)}", field="recipe")
        return load(path)
    return named_recipe(name)
