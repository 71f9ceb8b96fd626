"""What flags make of a recipe: methods added, settings replaced, and whose arguments hold when the
network is another.
"""

import re
from itertools import pairwise
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
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import flatten
from vitdistill.recipes.stages import Stages


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


def test_flags_reach_the_recipe() -> None:
    command = (
        "kd --teacher_model x --lr=2e-3 -b 8 --torchcompile --set optim.opt_args.eps=1e-8"
        " student.model_args.depth=6 --set train.keep_checkpoints=3 --clip-grad 1"
        " --aa none --in-memory false --with maskedkd hard_kd nkd:cnn"
    )
    recipe = parsed(*command.split())
    optim, train, data = recipe.optim, recipe.train, recipe.data
    assert (optim.lr, optim.clip_grad, optim.opt_args) == (2e-3, 1.0, {"eps": 1e-8})
    assert (train.batch_size, train.compile, train.keep_checkpoints) == (8, True, 3)
    assert (data.augment.aa, data.in_memory) == (None, False)
    assert recipe.student.model_args == {"depth": 6} and recipe.teachers["teacher"].model == "x"
    weights = {name: objective.weight for name, objective in recipe.objectives.items()}
    assert weights == {"ce": 0.5, "kd": 0.5, "hard_kd": 1.0, "nkd_cnn": 1.0}
    assert recipe.selector is not None and [*recipe.teachers] == ["teacher", "cnn"]


def test_one_setting_takes_the_place_of_another(tmp_path: Path) -> None:
    counted = parsed("maskedkd", "--num-keep", "98").selector
    assert counted is not None and (counted.keep_rate, counted.num_keep) == (0.5, 98)
    (tmp_path / "mine.yaml").write_text("selector: {method: maskedkd, num_keep: 98}\n")
    rated = parsed(f"{tmp_path}/mine.yaml", "--keep-rate", "0.25").selector
    assert rated is not None and (rated.keep_rate, rated.num_keep) == (0.25, None)
    assert parsed("alone", "--img-size", "64").student.image_size == 64
    teacher = parsed("deit_tiny_from_deit_small", "--teacher-path", "a.pth").teachers["teacher"]
    assert (teacher.checkpoint, teacher.pretrained) == ("a.pth", False)


def test_labels_are_found_by_the_teachers_name(tmp_path: Path) -> None:
    def stored(recipe: str) -> list[str | None]:
        found = parsed(recipe, "--labels", str(tmp_path)).teachers.values()
        return [teacher.labels for teacher in found]

    assert stored("kd") == [str(tmp_path)]
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "manifest.json").touch()
    assert stored("kd") == [str(tmp_path / "teacher")]
    assert stored("libkd") == [str(tmp_path), str(tmp_path)]  # where there are none of them


@pytest.mark.parametrize(
    "words",
    [
        "alone --labels x",
        "kd --min-lr 0.1 --sched none --warmup-epochs 0",
        "alone --lr 1e-6",
        "alone --set optim.min_lr=1",
        "kd --set optim.momentum=0.5",
        "kd --warmup-epochs 0 --set optim.warmup_lr=1e-3",
        "kd --with kd:cnn kd:cnn",
        "kd --set optim.lr=[",
    ],
)
def test_a_flag_that_cannot_take_effect_is_refused(words: str) -> None:
    assert refused(*words.split())


# --- another network than the recipe's -----------------------------------------------------------

OWN: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
DEIT = "--model deit_small_patch16_224"


@pytest.mark.parametrize(
    ("command", "args", "said_so"),
    [
        (DEIT, {}, True),
        ("--model runs/teacher/best", {}, False),
        ("--model hf-hub:timm/deit_tiny_patch16_224.fb_in1k", {}, False),
        ("--set student.model=deit_small_patch16_224", {}, True),
        (f"{DEIT} --set student.model_args.img_size=64", {"img_size": 64}, True),
        (f'{DEIT} --set student.model_args={{"img_size":64}}', {"img_size": 64}, False),
        ("--model vit_tiny_patch16_224.augreg_in21k", OWN, False),
        ("--img-size 64", {**OWN, "img_size": 64}, False),
    ],
)
def test_the_arguments_of_a_recipes_network_are_not_those_of_another(
    command: str, args: dict[str, Any], said_so: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    student = parsed("small_images_alone", *command.split()).student
    assert student.model_args == args
    said = capsys.readouterr().err
    assert said.count("\n") == said_so == (student.model in said)
    assert ("student.model_args.NAME=VALUE" in said) == said_so


def test_a_size_given_with_another_network_is_that_networks() -> None:
    student = parsed("small_images_alone", *DEIT.split(), "--img-size", "64").student
    assert (student.image_size, student.model_args) == (64, {})


def test_arguments_on_top_of_a_run_stay_and_those_of_a_teachers_network_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("student: {model: runs/a, model_args: {global_pool: avg}}\n")
    assert parsed(str(file), "--model", "runs/b").student.model_args == {"global_pool": "avg"}
    assert capsys.readouterr().err == ""
    teacher = "{teacher: {model: vit_base_patch16_224, model_args: {depth: 4}}}"
    file.write_text(f"teachers: {teacher}\nobjectives: {{kd: {{method: kd}}}}\n")
    recipe = parsed(str(file), "--teacher-model", "runs/teacher")
    assert recipe.teachers["teacher"].model_args == {}
    assert capsys.readouterr().err == ""


def test_of_stages_the_first_gets_another_network_and_the_later_keep_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["small_images_mae_finetuned", *DEIT.split()]
    recipe = resolve_recipe(read_arguments("explain", words))
    assert isinstance(recipe, Stages)
    assert recipe.stages["pretrain"].student.model_args == {}
    assert recipe.stages["finetune"].student.model_args == {"global_pool": "avg"}
    said = capsys.readouterr()
    assert said.out == "" and "pretrain.student.model_args.NAME=VALUE" in said.err
    monkeypatch.setenv("RANK", "1")
    resolve_recipe(read_arguments("explain", words))
    assert capsys.readouterr().err == "", "said once"


@pytest.mark.parametrize("flag", ["--teacher-model x", "--reorder-classes"])
def test_a_flag_for_the_one_teacher_says_how_to_name_others(flag: str) -> None:
    assert re.search(
        r"give --set teachers\.conv\.\w+=VALUE, or give --set teachers\.inv\.",
        refused("libkd", *flag.split()),
    )


# --- flags of other scripts ----------------------------------------------------------------------

GROUPS = groups_of(TrainArguments)
KNOWN = {word for flags in GROUPS.values() for flag in flags for word in flag.option.spellings}


@pytest.mark.parametrize("flag", ELSEWHERE)
def test_a_flag_of_another_script_is_answered_with_one_that_exists(flag: str) -> None:
    advice = ELSEWHERE[flag]
    assert flag not in KNOWN and set(re.findall(r"--[\w-]+", advice)) <= KNOWN
    for spelling in (flag, "--" + flag[2:].replace("-", "_")):
        assert refused("alone", spelling, "1") == f"there is no flag {spelling}: {advice}"
    assert flag != "--distillation-type" or {"kd", "hard_kd", "alone"} <= RECIPES.keys()
    for setting in re.findall(r"--set (\S+)", advice):
        assert setting.partition("=")[0] in flatten(parsed("small_images_mae", "--set", setting))


def test_advice_is_only_given_where_it_can_be_followed() -> None:
    with pytest.raises(UserError, match=r"there is no flag --mask-ratio: (?!write --set)"):
        read_arguments("eval", ["--mask-ratio", "x"])
    assert "write --set masking" in refused("alone", "--mask-ratio", "x")
    assert refused("alone", "--mixup-prob", "1").endswith("--set data.augment.mixup_prob=VALUE")


# --- a run cut short -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_fewer_epochs_shorten_the_warm_up_without_a_jump(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of more epochs it is never less, never more than a fifth, and at last the recipe's own."""
    whole = resolve_recipe(read_arguments("explain", [name]))
    stages = {"": whole} if isinstance(whole, Recipe) else whole.stages
    lengths = [1, 2, 3, 4, 5, 10, min(recipe.train.epochs for recipe in stages.values())]
    found: dict[str, list[float]] = {key: [] for key in stages}
    for epochs in lengths:
        words = [f"--set={key}.train.epochs={epochs}" for key in stages if key]
        short = resolve_recipe(
            read_arguments("explain", [name, *(words or [f"--epochs={epochs}"])])
        )
        said = capsys.readouterr().err
        for key, recipe in stages.items():
            cut = short if isinstance(short, Recipe) else short.stages[key]
            warmup = cut.optim.warmup_epochs
            assert 0 < warmup < epochs / 5 + 1e-9 and cut.train.epochs == epochs
            assert (warmup < recipe.optim.warmup_epochs) <= ("--warmup-epochs N changes it" in said)
            found[key].append(warmup)
    for key, warmups in found.items():
        pairs = [*zip(lengths, warmups, strict=True)]
        for (few, less), (many, more) in pairwise(pairs):
            assert less <= more <= less + (many - few) / 5 + 1e-9, key


def test_a_warm_up_that_is_given_is_kept_or_refused() -> None:
    given = ("small_images_alone", "--epochs", "2", "--warmup-epochs")
    assert parsed(*given, "0.5").optim.warmup_epochs == 0.5
    assert "warm-up takes the whole run: 2 of 2 epochs" in refused(*given, "2")
    assert parsed(*given[:2], "10").optim.warmup_epochs == 2
