"""What a run is: its settings, how they are read and written, and the named recipes.

A named recipe is what ``make(name)`` in the file of its family returns, a `Recipe` or `Stages`;
`FAMILIES` is the table of them. Importing it imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..messages import printable, suggest

FILES = ("stages.yaml", "recipe.yaml")
"""What holds the recipe in the folder of stages, and in that of a run."""


@dataclass(frozen=True)
class Family:
    """Recipes that share a file, ``module``; ``about`` them is said in the help.

    ``variants`` are keyword arguments that its ``make`` takes, given as ``NAME:VARIANT``.
    """

    module: str
    about: str
    words: str
    variants: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return self.words.split()


FAMILIES = (
    Family("plain", "your own folder of photos, pretrained networks", "finetune distill"),
    Family(
        "plain", "any data, student and teacher", "maskedkd kd alone hard_kd nkd vitkd vitkd_nkd"
    ),
    Family("deit", "DeiT-Ti on ImageNet-1k", "deit_tiny deit_tiny_distilled"),
    Family(
        "maskedkd",
        "the pairs of the MaskedKD paper",
        "deit_tiny_from_deit_small deit_tiny_from_deit3_small deit_tiny_from_deit3_base"
        " deit_small_from_deit_base deit_small_from_deit3_base deit_base_from_deit3_large",
    ),
    Family(
        "vitkd",
        "the pairs of the ViTKD and NKD papers",
        "deit_tiny_nkd deit_tiny_vitkd deit_tiny_vitkd_nkd deit_small_nkd deit_small_vitkd"
        " deit_small_vitkd_nkd deit_base_nkd deit_base_vitkd deit_base_vitkd_nkd",
    ),
    Family("mae", "masked autoencoders, in stages", "mae_base mae_large"),
    Family(
        "dmae",
        "the pairs of the DMAE paper, in stages",
        "dmae_base_from_mae_large dmae_base_from_mae_large_90 dmae_base_from_mae_large_95"
        " dmae_base_from_mae_large_98 dmae_small_from_mae_base dmae_tiny_from_mae_base",
        variants=("first_release",),
    ),
    Family(
        "libkd", "two teachers, a token for each (LIB-KD)", "libkd libkd_cit_tiny libkd_cit_small"
    ),
    Family(
        "small_images",
        "32 x 32 images, on a laptop",
        "small_images_teacher small_images_alone small_images_kd small_images_maskedkd"
        " small_images_nkd small_images_vitkd small_images_vitkd_nkd small_images_masked_vitkd_nkd"
        " small_images_mae small_images_mae_finetuned small_images_dmae small_images_conv_teacher"
        " small_images_inv_teacher small_images_libkd small_images_cit",
    ),
)

RECIPES: dict[str, Family] = {name: family for family in FAMILIES for name in family.names}


def find_file(name: str) -> Path | None:
    """Return the file of a recipe that is given by its path or by the folder of a run or of stages.

    None: it is the name of a recipe. Raises `ConfigError` where it is none of these.
    """
    path, known = Path(name), name.partition(":")[0] in RECIPES
    if known:
        return None
    inside = [path / file for file in FILES if (path / file).is_file()]
    if inside or path.is_file():
        return inside[0] if inside else path
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise ConfigError(f"there is no recipe file {printable(name)}", field="recipe")
    raise unknown_recipe(name)


def unknown_recipe(name: str) -> ConfigError:
    """Return the error of a name that is no recipe's."""
    fix = suggest(name, RECIPES, "'vitdistill recipes' lists them")
    return ConfigError(f"there is no recipe {printable(name)!r}", fix, field="recipe")
