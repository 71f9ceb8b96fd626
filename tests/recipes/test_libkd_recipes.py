"""Recipes of students with a token for each teacher: Co-advise's settings, and that every part of
them can be built.
"""

from dataclasses import replace
from typing import Any

import pytest

from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import from_dict, replace_fields, to_dict
from vitdistill.recipes.named import named_recipe
from vitdistill.runs.networks import build_student, plan_of
from vitdistill.vit.flops import forward_flops
from vitdistill.vit.network import Network

STUDENTS = ("libkd", "libkd_cit_tiny", "libkd_cit_small", "small_images_libkd", "small_images_cit")
TEACHERS = ("small_images_conv_teacher", "small_images_inv_teacher")


def recipe_of(name: str) -> Recipe:
    recipe = named_recipe(name)
    assert isinstance(recipe, Recipe) and recipe.name == name
    assert from_dict(to_dict(recipe)) == recipe
    return recipe


@pytest.mark.parametrize("name", STUDENTS)
def test_every_head_has_its_own_teacher(name: str) -> None:
    recipe = recipe_of(name)
    losses = {
        "ce": CrossEntropy(smoothing=0.1),
        "kd_conv": SoftKD(teacher="conv"),
        "kd_inv": SoftKD(teacher="inv"),
    }
    assert recipe.objectives == losses and all(
        (o.weight, o.schedule) == (1, None) for o in losses.values()
    )
    assert {o.temperature for o in losses.values() if isinstance(o, SoftKD)} == {1}
    built = build_student(recipe.student, 20)
    assert built.network.heads == ("class", "conv", "inv") and built.network.num_prefix_tokens == 3
    teachers = {key: Network(key, "resnet18", (64, 64), 5, 512, 20, 9) for key in recipe.teachers}
    plan_of(replace(recipe), built.network, teachers)
    trained: dict[str, Any] = {
        key: objective.trains_heads(built.network) for key, objective in recipe.objectives.items()
    }
    assert trained == {"ce": ("class",), "kd_conv": ("conv",), "kd_inv": ("inv",)}


@pytest.mark.parametrize("name", ["libkd", "libkd_cit_tiny", "libkd_cit_small"])
def test_the_recipe_of_co_advise(name: str) -> None:
    recipe = recipe_of(name)
    optim, train, augment = recipe.optim, recipe.train, recipe.data.augment
    scale = train.batch_size / 512
    assert (train.epochs, optim.opt, optim.weight_decay, optim.warmup_epochs) == (
        300,
        "adamw",
        0.05,
        20,
    )
    assert (optim.lr, optim.warmup_lr, optim.min_lr) == pytest.approx(
        (5e-4 * scale, 5e-7 * scale, 5e-6 * scale)
    )
    assert optim.clip_grad == 5 * len(recipe.objectives) and recipe.student.drop_path == 0.1
    assert (augment.aa, augment.reprob, augment.mixup, augment.cutmix) == (
        "rand-m9-mstd0.5-inc1",
        0.25,
        0.8,
        1.0,
    )
    assert augment.repeated_aug == 1


@pytest.mark.parametrize("name", ["libkd", "small_images_libkd", "small_images_cit"])
def test_teachers_are_yours_to_name(name: str) -> None:
    given = replace_fields(recipe_of(name), {"teachers.conv.model": "a", "teachers.inv.model": "b"})
    assert {key: config.model for key, config in given.teachers.items()} == {
        "conv": "a",
        "inv": "b",
    }


def test_small_teachers_are_small() -> None:
    student = build_student(recipe_of("small_images_libkd").student, 10)
    own = forward_flops(student.model, student.spec.image_size)
    for name in TEACHERS:
        built = build_student(recipe_of(name).student, 10)
        assert built.spec.image_size == (64, 64) and 1e6 < built.network.num_parameters < 1.3e6
        assert forward_flops(built.model, built.spec.image_size) < min(2 * 30e6, 0.6 * own)
    assert (
        student.spec.image_size
        == build_student(recipe_of("small_images_cit").student, 10).spec.image_size
        == (32, 32)
    )
