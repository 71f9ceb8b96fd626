"""Recipes by their name, by a file, or by the folder of a run."""

from collections.abc import Callable
from importlib import import_module

from ..errors import ConfigError
from ..messages import printable, suggest
from . import RECIPES, find_file, unknown_recipe
from .config import Recipe
from .stages import Stages, load


def named_recipe(name: str) -> Recipe | Stages:
    """Return the recipe ``NAME`` or ``NAME:VARIANT``; raises `ConfigError` for another."""
    plain, _, variant = name.partition(":")
    if plain not in RECIPES:
        raise unknown_recipe(name)
    family = RECIPES[plain]
    if variant and variant not in family.variants:
        fix = suggest(variant, family.variants, f"write {plain} alone")
        raise ConfigError(f"{plain} has no variant {printable(variant)!r}", fix, field="recipe")
    make: Callable[..., Recipe | Stages]
    make = import_module(f".{family.module}", __package__).make
    return make(plain, **{variant: True}) if variant else make(plain)


def find_recipe(name: str) -> Recipe | Stages:
    """Return a recipe by its name, by the path of a YAML file, or by the folder of a run or of
    stages, which holds its recipe; raises `ConfigError` with a suggestion.
    """
    file = find_file(name)
    return named_recipe(name) if file is None else load(file)
