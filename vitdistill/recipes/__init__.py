"""Named recipes: Python functions that return a `Recipe` or `Stages`; `RECIPES` is the table of
them, name to function.
"""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from ..errors import ConfigError
from .config import Recipe
from .stages import STAGES, Stages, load

RECIPES: dict[str, str] = {
    "alone": "vitdistill.recipes.plain:alone",
    "kd": "vitdistill.recipes.plain:kd",
    "hard_kd": "vitdistill.recipes.plain:hard_kd",
    "maskedkd": "vitdistill.recipes.plain:maskedkd",
    "nkd": "vitdistill.recipes.plain:nkd",
    "vitkd": "vitdistill.recipes.plain:vitkd",
    "vitkd_nkd": "vitdistill.recipes.plain:vitkd_nkd",
    "deit_tiny": "vitdistill.recipes.deit:deit_tiny",
    "deit_tiny_distilled": "vitdistill.recipes.deit:deit_tiny_distilled",
    "deit_tiny_from_deit_small": "vitdistill.recipes.maskedkd:deit_tiny_from_deit_small",
    "deit_tiny_from_deit3_small": "vitdistill.recipes.maskedkd:deit_tiny_from_deit3_small",
    "deit_tiny_from_deit3_base": "vitdistill.recipes.maskedkd:deit_tiny_from_deit3_base",
    "deit_small_from_deit_base": "vitdistill.recipes.maskedkd:deit_small_from_deit_base",
    "deit_small_from_deit3_base": "vitdistill.recipes.maskedkd:deit_small_from_deit3_base",
    "deit_base_from_deit3_large": "vitdistill.recipes.maskedkd:deit_base_from_deit3_large",
    "deit_tiny_nkd": "vitdistill.recipes.vitkd:deit_tiny_nkd",
    "deit_tiny_vitkd": "vitdistill.recipes.vitkd:deit_tiny_vitkd",
    "deit_tiny_vitkd_nkd": "vitdistill.recipes.vitkd:deit_tiny_vitkd_nkd",
    "deit_small_nkd": "vitdistill.recipes.vitkd:deit_small_nkd",
    "deit_small_vitkd": "vitdistill.recipes.vitkd:deit_small_vitkd",
    "deit_small_vitkd_nkd": "vitdistill.recipes.vitkd:deit_small_vitkd_nkd",
    "deit_base_nkd": "vitdistill.recipes.vitkd:deit_base_nkd",
    "deit_base_vitkd": "vitdistill.recipes.vitkd:deit_base_vitkd",
    "deit_base_vitkd_nkd": "vitdistill.recipes.vitkd:deit_base_vitkd_nkd",
    "mae_base": "vitdistill.recipes.mae:mae_base",
    "mae_large": "vitdistill.recipes.mae:mae_large",
    "dmae_base_from_mae_large": "vitdistill.recipes.dmae:dmae_base_from_mae_large",
    "dmae_base_from_mae_large_90": "vitdistill.recipes.dmae:dmae_base_from_mae_large_90",
    "dmae_base_from_mae_large_95": "vitdistill.recipes.dmae:dmae_base_from_mae_large_95",
    "dmae_base_from_mae_large_98": "vitdistill.recipes.dmae:dmae_base_from_mae_large_98",
    "dmae_small_from_mae_base": "vitdistill.recipes.dmae:dmae_small_from_mae_base",
    "dmae_tiny_from_mae_base": "vitdistill.recipes.dmae:dmae_tiny_from_mae_base",
    "dmae_base_from_mae_large_first_release": (
        "vitdistill.recipes.dmae:dmae_base_from_mae_large_first_release"
    ),
    "dmae_base_from_mae_large_90_first_release": (
        "vitdistill.recipes.dmae:dmae_base_from_mae_large_90_first_release"
    ),
    "dmae_base_from_mae_large_95_first_release": (
        "vitdistill.recipes.dmae:dmae_base_from_mae_large_95_first_release"
    ),
    "dmae_base_from_mae_large_98_first_release": (
        "vitdistill.recipes.dmae:dmae_base_from_mae_large_98_first_release"
    ),
    "dmae_small_from_mae_base_first_release": (
        "vitdistill.recipes.dmae:dmae_small_from_mae_base_first_release"
    ),
    "dmae_tiny_from_mae_base_first_release": (
        "vitdistill.recipes.dmae:dmae_tiny_from_mae_base_first_release"
    ),
    "libkd": "vitdistill.recipes.libkd:libkd",
    "libkd_cit_tiny": "vitdistill.recipes.libkd:libkd_cit_tiny",
    "libkd_cit_small": "vitdistill.recipes.libkd:libkd_cit_small",
    "small_images_teacher": "vitdistill.recipes.small_images:small_images_teacher",
    "small_images_alone": "vitdistill.recipes.small_images:small_images_alone",
    "small_images_kd": "vitdistill.recipes.small_images:small_images_kd",
    "small_images_maskedkd": "vitdistill.recipes.small_images:small_images_maskedkd",
    "small_images_nkd": "vitdistill.recipes.small_images:small_images_nkd",
    "small_images_vitkd": "vitdistill.recipes.small_images:small_images_vitkd",
    "small_images_vitkd_nkd": "vitdistill.recipes.small_images:small_images_vitkd_nkd",
    "small_images_masked_vitkd_nkd": (
        "vitdistill.recipes.small_images:small_images_masked_vitkd_nkd"
    ),
    "small_images_mae": "vitdistill.recipes.small_images:small_images_mae",
    "small_images_mae_finetuned": "vitdistill.recipes.small_images:small_images_mae_finetuned",
    "small_images_dmae": "vitdistill.recipes.small_images:small_images_dmae",
    "small_images_conv_teacher": "vitdistill.recipes.small_images:small_images_conv_teacher",
    "small_images_inv_teacher": "vitdistill.recipes.small_images:small_images_inv_teacher",
    "small_images_libkd": "vitdistill.recipes.small_images:small_images_libkd",
    "small_images_cit": "vitdistill.recipes.small_images:small_images_cit",
}


def named_recipe(name: str) -> Recipe | Stages:
    """The recipe of that name; raises `ConfigError` with a suggestion."""
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "'vitdistill train --help' lists them"
        raise ConfigError(f"there is no recipe {name!r}: {hint}")
    module, _, function = RECIPES[name].partition(":")
    make: Callable[[], Recipe | Stages] = getattr(import_module(module), function)
    return make()


def find_recipe(name: str) -> Recipe | Stages:
    """A recipe by its name, by the path of a YAML file, or by the folder of a run or of stages,
    which holds its recipe.
    """
    if name in RECIPES:
        return named_recipe(name)
    path = Path(name)
    for file in (STAGES, "recipe.yaml"):
        if path.is_dir() and (path / file).is_file():
            return load(path / file)
    if path.suffix in (".yaml", ".yml") or "/" in name:
        if not path.is_file():
            raise ConfigError(f"there is no recipe file {name}")
        return load(path)
    return named_recipe(name)
