"""What flags make of a recipe: whose arguments hold when the network is another, whom a flag is
for, and what other scripts call it.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from vitdistill.cli import read_arguments
from vitdistill.cli.arguments import TrainArguments, groups_of
from vitdistill.cli.flags import ELSEWHERE
from vitdistill.cli.recipe import resolve_recipe
from vitdistill.cli.render import render
from vitdistill.errors import UserError
from vitdistill.recipes import RECIPES
from vitdistill.recipes.config import Recipe, StudentConfig
from vitdistill.recipes.convert import flatten
from vitdistill.recipes.stages import Stages, dump


def parsed(*words: str) -> Recipe:
    recipe = resolve_recipe(read_arguments("explain", words))
    assert isinstance(recipe, Recipe)
    return recipe


def refused(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_recipe(read_arguments("train", words))
    sentence = render(caught.value, TrainArguments)
    assert "\n" not in sentence
    return sentence


# --- another network than the recipe's -----------------------------------------------------------

OWN: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}


DEIT = "--model deit_small_patch16_224"


@pytest.mark.parametrize(
    ("command", "args"),
    [
        (DEIT, {}),
        ("--model resnet18", {}),
        ("--model runs/teacher/best", {}),
        ("--model hf-hub:timm/deit_tiny_patch16_224.fb_in1k", {}),
        ("--set student.model=deit_small_patch16_224", {}),
        (f"{DEIT} --set student.model_args.img_size=64", {"img_size": 64}),
    ],
)
def test_the_arguments_of_a_recipes_network_are_not_those_of_another(
    command: str, args: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    student = parsed("small_images_alone", *command.split()).student
    assert student.model_args == args
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("student.model_args of the recipe (img_size=32, patch_size=4, ")
    assert student.model in line and "--set student.model_args.NAME=VALUE" in line


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("", OWN),
        ("--model vit_tiny_patch16_224", OWN),
        ("--model vit_tiny_patch16_224.augreg_in21k", OWN),
        (f'{DEIT} --set student.model_args={{"img_size":64}}', {"img_size": 64}),
        ("--img-size 64", {**OWN, "img_size": 64}),
    ],
)
def test_nothing_is_said_where_nothing_is_left_out(
    command: str, args: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert parsed("small_images_alone", *command.split()).student.model_args == args
    assert capsys.readouterr().out == ""


def test_a_size_given_with_another_network_is_that_networks() -> None:
    student = parsed("small_images_alone", *DEIT.split(), "--img-size", "64").student
    assert (student.image_size, student.model_args) == (64, {})


def test_arguments_on_top_of_a_run_stay_and_those_of_a_teachers_network_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("student: {model: runs/a, model_args: {global_pool: avg}}\n")
    assert parsed(str(file), "--model", "runs/b").student.model_args == {"global_pool": "avg"}
    assert capsys.readouterr().out == ""
    file.write_text(
        "teachers: {teacher: {model: vit_base_patch16_224, model_args: {depth: 4}}}\n"
        "objectives: {kd: {method: kd}}\n"
    )
    recipe = parsed(str(file), "--teacher-model", "runs/teacher")
    assert recipe.teachers["teacher"].model_args == {}
    assert capsys.readouterr().out.startswith("teachers.teacher.model_args of the recipe (depth=4)")


def test_of_stages_the_first_gets_another_network_and_the_later_keep_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["small_images_mae_finetuned", "--model", "deit_small_patch16_224"]
    recipe = resolve_recipe(read_arguments("explain", words))
    assert isinstance(recipe, Stages)
    assert recipe.stages["pretrain"].student.model_args == {}
    assert recipe.stages["finetune"].student.model_args == {"global_pool": "avg"}
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        line.startswith("pretrain.student.model_args of the recipe (")
        and "--set pretrain.student.model_args.NAME=VALUE" in line
    )


def test_it_is_said_once_and_never_before_a_printed_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["small_images_alone", "--model", "deit_small_patch16_224"]
    resolve_recipe(read_arguments("explain", [*words, "--recipe-yaml"]))
    monkeypatch.setenv("RANK", "1")
    parsed(*words)
    assert capsys.readouterr().out == ""


# --- whom a flag is for --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--teacher-model", "x"], "model"),
        (["--teacher-path", "x.pth"], "checkpoint"),
        (["--reorder-classes"], "reorder_classes"),
    ],
)
def test_a_flag_for_the_one_teacher_says_how_to_name_others(
    words: list[str], field: str, tmp_path: Path
) -> None:
    sentence = refused("libkd", *words)
    assert sentence.endswith(
        f": give --set teachers.conv.{field}=VALUE, or give --set teachers.inv.{field}=VALUE"
    )
    second = Recipe(student=StudentConfig(model="stage:first"))
    stages = Stages(stages={"first": parsed("small_images_libkd"), "second": second})
    (tmp_path / "staged.yaml").write_text(dump(stages))
    value = words[1] if len(words) > 1 else "true"
    sentence = refused(str(tmp_path / "staged.yaml"), *words)
    assert f": give --set first.teachers.conv.{field}={value}, or " in sentence


# --- flags of other scripts ----------------------------------------------------------------------

GROUPS = groups_of(TrainArguments)
KNOWN = {word for flags in GROUPS.values() for flag in flags for word in flag.spellings}


@pytest.mark.parametrize("flag", ELSEWHERE)
def test_a_flag_of_another_script_is_answered_with_one_that_exists(flag: str) -> None:
    advice = ELSEWHERE[flag]
    assert flag not in KNOWN and set(re.findall(r"--[\w-]+", advice)) <= KNOWN
    for spelling in (flag, "--" + flag[2:].replace("-", "_")):
        assert refused("alone", spelling, "1") == f"there is no flag {spelling}: {advice}"
    assert flag != "--distillation-type" or {"kd", "hard_kd", "alone"} <= RECIPES.keys()
    for setting in re.findall(r"--set (\S+)", advice):
        path = setting.partition("=")[0]
        changed = parsed("small_images_mae", "--mixup", "0.8", "--cutmix", "1", "--set", setting)
        assert path in flatten(changed)


def test_advice_is_only_given_where_it_can_be_followed() -> None:
    with pytest.raises(UserError, match=r"there is no flag --output-dir: (?!write --output)"):
        read_arguments("explain", ["--output-dir", "x"])
    assert "write --output" in refused("alone", "--output-dir", "x")


def test_underscores_are_understood() -> None:
    assert parsed("alone", "--batch_size", "8", "--data_dir", "photos").train.batch_size == 8
