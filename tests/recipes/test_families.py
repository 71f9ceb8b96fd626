"""Named recipes are those of their sources, and their networks can be built."""

import re
from typing import Any

import pytest

from vitdistill.distill.plan import make_plan
from vitdistill.methods.dmae import DMAE
from vitdistill.recipes import RECIPES, dmae
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import flatten
from vitdistill.recipes.libkd import LOSSES
from vitdistill.recipes.named import named_recipe
from vitdistill.recipes.stages import Stages
from vitdistill.recipes.yaml import parse_yaml
from vitdistill.runs.networks import build_blank, build_student, plan_of
from vitdistill.vit.flops import forward_flops
from vitdistill.vit.network import Network

DMAE_NAMES = [name for name in RECIPES if name.startswith("dmae_")]
LIBKD = ("libkd", "libkd_cit_tiny", "libkd_cit_small")


def recipe_of(name: str) -> Recipe:
    recipe = named_recipe(name)
    assert isinstance(recipe, Recipe)
    return recipe


def stages_of(name: str) -> dict[str, Recipe]:
    found = named_recipe(name)
    assert isinstance(found, Stages) and [*found.stages] == ["pretrain", "finetune"]
    assert found.name == name.replace(":", "_")
    return found.stages


# --- masked autoencoders -------------------------------------------------------------------------


def test_the_releases_differ_in_five_settings_and_the_module_lists_them() -> None:
    def fields(name: str) -> dict[str, Any]:
        stages = stages_of(name).items()
        return {f"{key}.{path}": v for key, r in stages for path, v in flatten(r).items()}

    first, last = (fields(f"dmae_tiny_from_mae_base{of}") for of in (":first_release", ""))
    changed = {key: [first[key], last[key]] for key in last if first[key] != last[key]}
    rows = re.findall(r"^(\w+\.[\w.]+) +(\S+) +(\S+)$", dmae.__doc__ or "", re.MULTILINE)
    assert changed == {key: [parse_yaml(a, ""), parse_yaml(b, "")] for key, a, b in rows}
    assert len(changed) == 5


def test_objectives_and_mask_rates_of_dmae() -> None:
    stages = [stages_of(name)["pretrain"] for name in DMAE_NAMES]
    assert all(stage.objectives["dmae"] == DMAE() for stage in stages)
    rates = [getattr(stage.masking, "mask_rate", None) for stage in stages]
    assert rates == [0.75, 0.9, 0.95, 0.98, 0.75, 0.75]


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "student", "size"),
    [
        ("mae_base", "dmae_small_from_mae_base", 86e6),
        ("mae_large", "dmae_base_from_mae_large", 303e6),
    ],
)
def test_what_mae_pre_trains_teaches_dmae(name: str, student: str, size: float) -> None:
    built, _ = build_blank(stages_of(name)["pretrain"], 1)
    assert built.network.num_parameters == pytest.approx(size, rel=0.01)
    assert built.network.num_classes == 0
    published = stages_of(student)["pretrain"]
    learner, teachers = build_blank(published, 1)
    theirs = teachers["teacher"]
    for fact in ("grid", "depth", "dim"):
        assert getattr(built.network, fact) == getattr(theirs.network, fact)
    # ImageNet's, as Meta's files want it.
    assert built.spec.mean == theirs.spec.mean == learner.spec.mean
    networks = {"teacher": built.network}
    assert make_plan(learner.network, networks, published.objectives, None, published.masking)


# --- a token for each teacher --------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LIBKD, "small_images_libkd", "small_images_cit"])
def test_every_head_has_its_own_teacher(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.objectives == LOSSES
    assert {objective.weight for objective in recipe.objectives.values()} == {1}
    network = build_student(recipe.student, 20).network
    assert network.heads == ("class", "conv", "inv") and network.num_prefix_tokens == 3
    teachers = {key: Network(key, "resnet18", (64, 64), 5, 512, 20, 9) for key in recipe.teachers}
    plan_of(recipe, network, teachers)
    trained: dict[str, Any] = {
        key: objective.trains_heads(network) for key, objective in recipe.objectives.items()
    }
    assert trained == {"ce": ("class",), "kd_conv": ("conv",), "kd_inv": ("inv",)}


def test_small_teachers_are_small() -> None:
    student = build_student(recipe_of("small_images_libkd").student, 10)
    own = forward_flops(student.model, student.spec.image_size)
    for name in ("small_images_conv_teacher", "small_images_inv_teacher"):
        built = build_student(recipe_of(name).student, 10)
        assert built.spec.image_size == (64, 64) and 1e6 < built.network.num_parameters < 1.3e6
        assert forward_flops(built.model, built.spec.image_size) < min(2 * 30e6, 0.6 * own)
    cit = build_student(recipe_of("small_images_cit").student, 10)
    assert student.spec.image_size == cit.spec.image_size == (32, 32)
