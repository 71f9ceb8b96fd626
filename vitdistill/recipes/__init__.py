"""What a run is: its settings, how they are read and written, and the named recipes.

A named recipe is what ``make(name)`` in the file of its family returns, a `Recipe` or `Stages`;
`FAMILIES` is the table of them. Importing it imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, Set
from ..messages import suggest

STAGES, RECIPE = "stages.yaml", "recipe.yaml"
"""The recipe files in a folder of stages, and in a run's."""


@dataclass(frozen=True)
class Family:
    """Recipes that share a file, ``module``; the help shows ``about``.

    Each line of ``table`` is a name and a description. ``variants`` are keyword arguments that
    ``make`` takes, given as ``NAME:VARIANT``.
    """

    module: str
    about: str
    table: str
    variants: tuple[str, ...] = ()

    @property
    def recipes(self) -> dict[str, str]:
        """The descriptions by name."""
        return dict(line.split(maxsplit=1) for line in self.table.strip().splitlines())


FAMILIES = (
    Family(
        "plain",
        "your own folder of photos, pretrained networks",
        """
        finetune      a pretrained ViT fine-tuned on your own folder, 20 epochs: a teacher
        finetune_cnn  a pretrained CNN fine-tuned on your own folder, 20 epochs: a teacher
        distill       a small ViT that learns your own folder from a fine-tuned teacher, 40 epochs
        few_labels    a small ViT that learns it where most images have no labels, by stored answers
        """,
    ),
    Family(
        "plain",
        "any data, student and teacher",
        """
        maskedkd         MaskedKD from a teacher that sees half of its patches
        kd               plain logit distillation from a teacher
        alone            a ViT without a teacher, DeiT's training recipe
        hard_kd          from the top class of a teacher (DeiT's form: a student with its token)
        standardized_kd  KD of standardised logits from a teacher
        nkd              NKD from a teacher
        vitkd            ViTKD (features) from a teacher
        vitkd_nkd        ViTKD (features) and NKD (logits) from a teacher
        guidance         locality guidance (stages) from a convolutional teacher
        """,
    ),
    Family(
        "deit",
        "DeiT-Ti on ImageNet-1k",
        """
        deit_tiny            DeiT-Ti alone, 300 epochs; 72.2 % top-1 in the paper
        deit_tiny_distilled  with its token, hard labels of RegNetY-16GF; 74.5 % in the paper
        """,
    ),
    Family(
        "maskedkd",
        "the pairs of the MaskedKD paper",
        """
        deit_tiny_from_deit_small   MaskedKD at 50 %: 75.2 % in the paper; whole 75.0, alone 72.0
        deit_tiny_from_deit3_small  MaskedKD at 50 %: 75.2 % in the paper; whole 75.1, quarter 74.8
        deit_tiny_from_deit3_base   MaskedKD at 50 %: 74.7 % in the paper; whole 74.4, quarter 74.7
        deit_small_from_deit_base   MaskedKD at 50 %: 81.0 % in the paper; whole 80.8, alone 79.9
        deit_small_from_deit3_base  MaskedKD at 50 %: 81.3 % in the paper; whole 81.3, at 75 % 81.4
        deit_base_from_deit3_large  MaskedKD at 50 %: 83.6 % in the paper; whole 83.5, alone 81.8
        """,
    ),
    Family(
        "vitkd",
        "the pairs of the ViTKD and NKD papers",
        """
        deit_tiny_nkd         DeiT-Ti from DeiT III-S (21k): 76.7 % in the paper, alone 74.4
        deit_tiny_vitkd       DeiT-Ti from DeiT III-S (21k): 76.1 % in the paper, alone 74.4
        deit_tiny_vitkd_nkd   DeiT-Ti from DeiT III-S (21k): 77.8 % in the paper, alone 74.4
        deit_small_nkd        DeiT-S from DeiT III-B (21k): no number was published, alone 80.6
        deit_small_vitkd      DeiT-S from DeiT III-B (21k): 82.0 % in the paper, alone 80.6
        deit_small_vitkd_nkd  DeiT-S from DeiT III-B (21k): 83.6 % in the paper, alone 80.6
        deit_base_nkd         DeiT-B from DeiT III-L (21k): 85.0 % in the paper, alone 81.8
        deit_base_vitkd       DeiT-B from DeiT III-L (21k): 83.5 % in the paper, alone 81.8
        deit_base_vitkd_nkd   DeiT-B from DeiT III-L (21k): 85.4 % in the paper, alone 81.8
        """,
    ),
    Family(
        "mae",
        "masked autoencoders, in stages",
        """
        mae_base   ViT-B, 800 epochs at 75 %, then fine-tuned; 83.6 % in the paper, after 1,600
        mae_large  ViT-L, 800 epochs at 75 %, then fine-tuned; 85.9 % in the paper, after 1,600
        """,
    ),
    Family(
        "dmae",
        "the pairs of the DMAE paper, in stages (and NAME:first_release)",
        """
        dmae_base_from_mae_large     ViT-B from MAE ViT-L at 75 %; 84.0 % in the paper
        dmae_base_from_mae_large_90  ViT-B from MAE ViT-L at 90 %; no number is known
        dmae_base_from_mae_large_95  ViT-B from MAE ViT-L at 95 %; 83.6 % in the paper
        dmae_base_from_mae_large_98  ViT-B from MAE ViT-L at 98 %; 82.4 % in the paper
        dmae_small_from_mae_base     ViT-S from MAE ViT-B at 75 %; 79.3 % in the paper
        dmae_tiny_from_mae_base      ViT-Ti from MAE ViT-B at 75 %; no number is known
        """,
        variants=("first_release",),
    ),
    Family(
        "libkd",
        "two teachers, a token for each (LIB-KD)",
        """
        libkd            DeiT-Ti with a token for each of two teachers, conv and inv
        libkd_cit_tiny   Co-advise's CiT-Ti from RegNetY-4GF and RedNet-101 (give its weights)
        libkd_cit_small  Co-advise's CiT-S from RegNetY-4GF and RedNet-101 (give its weights)
        """,
    ),
    Family(
        "small_images",
        "32 x 32 images, on a laptop",
        """
        small_images_teacher           a ViT 192 wide, 6 deep: a teacher for small students
        small_images_alone             the student, a ViT 96 wide, 6 deep, alone, 30 epochs
        small_images_kd                the student by plain KD from a teacher run
        small_images_maskedkd          the student by MaskedKD from a teacher run
        small_images_standardized_kd   the student by KD of standardised logits
        small_images_few_labels        by KD of standardised logits, most images without labels
        small_images_nkd               the student by NKD from a teacher run
        small_images_vitkd             the student by ViTKD (features) from a teacher run
        small_images_vitkd_nkd         the student by ViTKD and NKD from a teacher run
        small_images_guidance          the student by the stages of a small_images_conv_teacher
        small_images_masked_vitkd_nkd  the student by ViTKD and NKD under MaskedKD
        small_images_mae               the student pre-trained by MAE at 75 %: no labels, 30 epochs
        small_images_mae_finetuned     the student pre-trained by MAE, then fine-tuned
        small_images_dmae              the student pre-trained by DMAE from a MAE run, fine-tuned
        small_images_conv_teacher      a narrow ResNet at 64 x 64: a teacher for small_images_libkd
        small_images_inv_teacher       a narrow RedNet at 64 x 64: a teacher for small_images_libkd
        small_images_libkd             the student with tokens for two teachers, conv and inv
        small_images_cit               the student with two stems and tokens for conv and inv (CiT)
        """,
    ),
)

RECIPES: dict[str, Family] = {name: family for family in FAMILIES for name in family.recipes}


def find_file(name: str) -> Path | None:
    """Return the file of a recipe that is given by its path or by the folder of a run or of stages.

    None: it is the name of a recipe. Raises `ConfigError` where it is none of these.
    """
    if name.partition(":")[0] in RECIPES:
        return None
    path = Path(name)
    for file in (path / STAGES, path / RECIPE, path):
        if file.is_file():
            return file
    if path.is_dir():
        what = f"the folder {name} holds no recipe"
        raise ConfigError(what, Set("data.dir", name), field="recipe")
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise ConfigError(f"there is no recipe file {name}", field="recipe")
    raise unknown_recipe(name)


def unknown_recipe(name: str) -> ConfigError:
    fix = suggest(name, RECIPES, "'vitdistill recipes' lists them")
    return ConfigError(f"there is no recipe {name!r}", fix, field="recipe")
