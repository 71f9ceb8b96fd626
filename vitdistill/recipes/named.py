"""Recipes by their name, by a file, or by the folder of a run."""

from dataclasses import replace
from importlib import import_module
from typing import Any

from ..errors import ConfigError
from ..messages import suggest
from ..methods import method_class
from ..methods.base import Objective
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
        raise ConfigError(f"{plain} has no variant {variant!r}", fix, field="recipe")
    make = import_module(f".{family.module}", __package__).make
    made: Recipe | Stages = make(plain, **({variant: True} if variant else {}))
    about = f"recipe {name}, {family.recipes[plain]}"
    return replace(made, name=name.replace(":", "_"), description=about)


def method_of_recipes(name: str, beside: str = "") -> Any:
    """Return the method ``name`` as the recipe of that name has it, but with weight 1.

    A recipe in the family of ``beside``, which it is added to, comes first: what fits small images
    need not fit large ones. A method without a recipe has its defaults.
    """
    kind, family = method_class(name), RECIPES.get(beside.partition(":")[0])
    words = [f"{family.module}_{name}" if family else name, name]
    for found in (named_recipe(word) for word in words if word in RECIPES):
        for recipe in found.stages.values() if isinstance(found, Stages) else [found]:
            for method in (*recipe.objectives.values(), recipe.selector, recipe.masking):
                if type(method) is kind:
                    return replace(method, weight=1.0) if isinstance(method, Objective) else method
    return kind()


def find_recipe(name: str) -> Recipe | Stages:
    """Return a recipe by its name, its YAML file, or the folder of a run or of stages.

    Raises `ConfigError` with a suggestion.
    """
    file = find_file(name)
    return named_recipe(name) if file is None else load(file)
