"""The parser: spellings, values, and mistakes, which are answered before torch is imported."""

import subprocess
import sys
from typing import Any

import pytest

from vitdistill.cli import COMMANDS, main, read_arguments
from vitdistill.cli.arguments import EvalArguments, RecipeArguments, groups_of
from vitdistill.cli.recipe import resolve_recipe
from vitdistill.cli.render import render
from vitdistill.errors import Add, ConfigError, Drop, Give, Set, UserError
from vitdistill.evaluate.knn import K
from vitdistill.recipes.config import Recipe


def settings(*words: str) -> dict[str, Any]:
    return dict(read_arguments("train", words).settings)


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--lr", "1e-3"], "optim.lr", 1e-3),
        (["--lr=1e-3"], "optim.lr", 1e-3),
        (["--batch_size", "8"], "train.batch_size", 8),
        (["-b", "8"], "train.batch_size", 8),
        (["--grad-accum-steps", "2"], "train.accumulate", 2),
        (["--distillation-tau", "3"], "objectives.kd.temperature", 3.0),
        (["--clip-grad", "none"], "optim.clip_grad", None),
        (["--save-every", "null"], "train.save_every", None),
        (["--sched", "none"], "optim.sched", "none"),
        (["--seed", "-1"], "train.seed", -1),
        (["--pretrained"], "student.pretrained", True),
        (["--pretrained", "false"], "student.pretrained", False),
        (["--pretrained", "kd"], "student.pretrained", True),
        (["--in-memory", "none"], "data.in_memory", None),
    ],
)
def test_spellings(words: list[str], path: str, value: Any) -> None:
    found = settings(*words)
    assert found == {path: value} and type(found[path]) is type(value)


def test_a_recipe_stands_anywhere() -> None:
    for words in (["kd", "--lr", "1"], ["--lr", "1", "kd"], ["--pretrained", "kd", "--lr=1"]):
        assert read_arguments("train", words).recipe == "kd"
    assert read_arguments("train", ["--lr", "1"]).recipe == "maskedkd"


def test_lists_given_twice_are_joined() -> None:
    words = ["--set", "a=1", "b=2", "--lr", "1", "--set=c=d=3", "--with", "dkd", "nkd"]
    arguments = read_arguments("train", words)
    assert arguments.set == ("a=1", "b=2", "c=d=3") and arguments.with_ == ("dkd", "nkd")


def test_a_flag_that_can_stand_alone_takes_a_number_if_there_is_one() -> None:
    words = ["MODEL", "--data-dir", "x", "--knn"]
    assert read_arguments("eval", words).knn == K
    assert read_arguments("eval", [*words, "5"]).knn == 5
    assert read_arguments("eval", ["--knn", *words[:3]]).model == "MODEL"


@pytest.mark.parametrize(
    "words",
    [
        ["trian"],
        ["train", "--lrr", "1"],
        ["train", "kd", "--keep-rate", "half"],
        ["train", "kd", "--epochs", "1.5"],
        ["train", "kd", "--lr", "nan"],
        ["train", "kd", "--lr", "1e999"],
        ["train", "kd", "--sched", "cosin"],
        ["train", "kd", "--lr"],
        ["train", "kd", "--lr", "--epochs", "3"],
        ["train", "kd", "--lr", "1", "--lr", "2"],
        ["train", "kd", "--temperature", "1", "--distillation-tau", "2"],
        ["train", "kd", "again"],
        ["train", "kd", "--set"],
        ["train", "kd", "--epoch", "1"],
        ["explain", "kd", "--time=yes"],
        ["eval"],
        ["eval", "runs/teacher"],
        ["eval", "runs/teacher", "--data-dir", "photos", "--split", "test"],
        ["eval", "runs/teacher", "--data-dir", "photos", "-b", "none"],
        ["label", "mrege", "x"],
        ["label", "merge", "x"],
        ["export"],
        ["demo", "--ouput", "x"],
    ],
)
def test_a_mistyped_command_is_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == UserError.exit_code
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.count("\n") == 1 and errors.startswith("vitdistill")


def test_out_of_bounds_is_a_wrong_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--epochs", "0"]) == ConfigError.exit_code
    assert "--epochs is 0: give at least 1" in capsys.readouterr().err


def refused(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_recipe(read_arguments("train", words))
    return render(caught.value, RecipeArguments)


@pytest.mark.parametrize(
    "words",
    [
        ["kd", "--keep-rate", "0.5"],
        ["alone", "--teacher-model", "runs/teacher"],
        ["alone", "--temperature", "2"],
        ["alone", "--labels", "x"],
        ["hard_kd", "--temperature", "2"],
        ["kd", "--without", "ce", "--smoothing", "0.1"],
        ["--keep-rate", "0.5", "--num-keep", "8"],
        ["kd", "--momentum", "0.5"],
        ["kd", "--min-lr", "0.1", "--sched", "none", "--warmup-epochs", "0"],
        ["kd", "--warmup-lr", "0.1", "--warmup-epochs", "0"],
        ["kd", "--distillation-alpha", "0.5", "--kd-weight", "1"],
        ["alone", "--distillation-alpha", "0.5"],
        ["kd", "--distillation-alpha", "1"],
        ["kd", "--lr", "1", "--set", "optim.lr=2"],
        ["small_images_kd", "--img-size", "64", "--set", "student.model_args={}"],
        ["kd", "--without", "selector"],
        ["kd", "--with", "kd"],
        ["kd", "--with", "kd:cnn", "kd:cnn"],
        ["kd", "--with", "ce:cnn"],
        ["kd", "--set", "lr"],
        ["kd", "--set", "optim.lr=["],
    ],
)
def test_a_flag_that_cannot_take_effect_is_refused(words: list[str]) -> None:
    assert refused(*words)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    printed = capsys.readouterr().out
    for flags in groups_of(COMMANDS[command].arguments).values():
        for flag in flags:
            assert flag.positional or f"  {flag.name}" in printed


def test_words_are_read_without_torch() -> None:
    script = (
        "import sys; from vitdistill.cli import main; main(['train', '--help']);"
        " main(['train', '--lrr', '1']); main(['label', '--help']); main(['--help']);"
        " sys.exit(bool({'torch', 'timm', 'jaxtyping', 'ruamel.yaml', 'rich'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


# --- remedies as flags ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fix", "stage", "words"),
    [
        (Set("optim.lr", 0.1), "", "give --lr 0.1"),
        (Set("optim.lr", 0.1), "pretrain", "give --set pretrain.optim.lr=0.1"),
        (Set("optim.lr"), "", "give --lr NUMBER"),
        (Set("train.save_every", 5), "pretrain", "give --save-every 5"),
        (Set("masking.mask_rate", 0.75), "", "give --set masking.mask_rate=0.75"),
        (Set("student.pretrained", True), "", "give --pretrained"),
        (Set("teachers.conv.pretrained", True), "", "give --set teachers.conv.pretrained=true"),
        (Set("teachers.teacher.checkpoint"), "", "give --teacher-path FILE"),
        (Give("data_dir", "photos"), "", "give --data-dir photos"),
        (Give("output"), "", "give --output"),
        (Add("kd"), "finetune", "add --with finetune.kd"),
        (Drop("selector"), "", "give --without selector"),
        ("take a plain ViT", "", "take a plain ViT"),
    ],
)
def test_remedies(fix: Any, stage: str, words: str) -> None:
    error = ConfigError("no", fix)
    error.stage = stage
    assert render(error, RecipeArguments).endswith(f"no: {words}")


def test_the_model_that_is_evaluated_has_flags_of_its_own() -> None:
    error = ConfigError(
        "no", (Set("teachers.model.checkpoint"), Set("teachers.teacher.checkpoint"))
    )
    sentence = render(error, EvalArguments)
    assert sentence == "no: give --model-path FILE, or give --teacher-path FILE"


def test_what_cannot_be_printed_is_escaped() -> None:
    error = ConfigError("the file a\x1b[2Jb\n", Give("output", "\x07"))
    assert render(error, RecipeArguments).isprintable()


def test_flags_change_the_recipe_they_are_given_with() -> None:
    recipe = resolve_recipe(read_arguments("train", ["kd", "--with", "nkd:cnn", "--lr", "1"]))
    assert isinstance(recipe, Recipe) and [*recipe.objectives] == ["ce", "kd", "nkd_cnn"]
    assert [*recipe.teachers] == ["teacher", "cnn"] and recipe.optim.lr == 1
