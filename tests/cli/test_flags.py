"""The parser: spellings, values, and mistakes, which are answered before torch is imported."""

from functools import partial
from typing import Any

import pytest

from vitdistill.cli import main, read_arguments
from vitdistill.cli.arguments import (
    EvalArguments,
    RecipeArguments,
    StudyArguments,
    TrainArguments,
)
from vitdistill.cli.render import render, teller
from vitdistill.errors import Add, ConfigError, Drop, Give, Set, UserError
from vitdistill.evaluate.knn import K
from vitdistill.recipes.stages import spell_in_stage


def settings(*words: str) -> dict[str, Any]:
    return dict(read_arguments("train", words).settings)


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--lr", "1e-3"], "optim.lr", 1e-3),
        (["--batch_size", "8"], "train.batch_size", 8),
        (["--grad-accum-steps", "2"], "train.accumulate", 2),
        (["--distillation-tau", "3"], "objectives.kd.temperature", 3.0),
        (["--clip-grad", "none"], "optim.clip_grad", None),
        (["--sched", "none"], "optim.sched", "none"),
        (["--seed", "-1"], "train.seed", -1),
        (["--pretrained"], "student.pretrained", True),
        (["--pretrained", "false"], "student.pretrained", False),
        (["--pretrained", "kd"], "student.pretrained", True),
        (["--pretrained=No"], "student.pretrained", False),
        (["--pretrained", "0"], "student.pretrained", False),
        (["--no-pretrained"], "student.pretrained", False),
        (["--no_in_memory"], "data.in_memory", False),
    ],
)
def test_spellings(words: list[str], path: str, value: Any) -> None:
    found = settings(*words)
    assert found == {path: value} and type(found[path]) is type(value)


def test_a_recipe_stands_anywhere_and_lists_given_twice_are_joined() -> None:
    for words in (["kd", "--lr", "1"], ["--lr", "1", "kd"], ["--pretrained", "kd", "--lr=1"]):
        assert read_arguments("train", words).recipe == "kd"
    words = ["--set", "a=1", "b=2", "--lr", "1", "--set=c=d=3", "--with", "dkd", "nkd"]
    arguments = read_arguments("train", words)
    assert arguments.set == ("a=1", "b=2", "c=d=3") and arguments.with_ == ("dkd", "nkd")


def test_a_flag_that_can_stand_alone_takes_a_number_if_there_is_one() -> None:
    words = ["MODEL", "--data-dir", "x", "--knn"]
    assert read_arguments("eval", words).knn == K
    assert read_arguments("eval", [*words, "5"]).knn == 5
    assert read_arguments("eval", ["--knn", *words[:3]]).models == ("MODEL",)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "kd", "--lr", "1e999"],
        ["train", "kd", "--teacher", "x"],
        ["train", "kd", "--set"],
        ["train", "kd", "--epoch", "1"],
        ["eval", "runs/teacher", "--data-dir", "photos", "-b", "none"],
        ["label", "mrege", "x"],
        ["label", "merge", "x"],
    ],
)
def test_a_mistyped_command_is_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == UserError.exit_code
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.count("\n") == 1 and errors.startswith("vitdistill")


# --- remedies as flags ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fix", "stage", "words"),
    [
        (Set("optim.lr", 0.1), "pretrain", "give --set pretrain.optim.lr=0.1"),
        (Set("optim.lr"), "", "give --lr NUMBER"),
        (Set("masking.mask_rate", 0.75), "", "give --set masking.mask_rate=0.75"),
        (Set("student.pretrained", True), "", "give --pretrained"),
        (Set("teachers.conv.pretrained", True), "", "give --set teachers.conv.pretrained=true"),
        (Set("teachers.teacher.checkpoint"), "", "give --teacher-path FILE"),
        (Give("labels", "photos"), "", "give --labels photos"),
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


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("labels holds no labels", "labels holds no labels"),  # a folder of that name
        ("labels is 3", "--labels is 3"),
        ("optim.lr has no effect", "--lr has no effect"),
        ("optim.min_lr 1 is above optim.lr 0.1", "--min-lr 1 is above --lr 0.1"),
        ("optim.opt_args.eps is 1", "optim.opt_args.eps is 1"),
        ("train.batch_size=16 is in a/train.seed/b", "--batch-size=16 is in a/train.seed/b"),
    ],
)
def test_a_field_is_named_by_its_flag_and_a_folder_by_its_name(what: str, words: str) -> None:
    error = ConfigError(what, field=what.split()[0])
    assert render(error, TrainArguments) == words
    assert render(error, StudyArguments) == what  # which has no such flags
    assert render(UserError(what), TrainArguments) == what
    error.stage = "pretrain"
    assert what in render(error, TrainArguments) or "." not in what


def test_what_a_part_of_the_recipe_calls_its_own_fields_are_flags_too() -> None:
    fixes = Set("train.batch_size"), Set("train.accumulate")
    error = ConfigError("batch_size 12 and lr_scale do not", fixes, field="train.batch_size")
    assert render(error, TrainArguments).startswith("--batch-size 12 and lr_scale do not: give --b")


def test_an_error_that_is_told_is_a_warning_with_flags(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError("optim.lr is little", Set("train.batch_size", 16))
    teller(TrainArguments())(error)
    assert capsys.readouterr().out == "warning: --lr is little: give --batch-size 16\n"
    assert str(error) == "optim.lr is little: set train.batch_size=16"
    in_stage = spell_in_stage("pretrain", partial(render, arguments=TrainArguments()))
    assert in_stage(error).endswith("give --set pretrain.train.batch_size=16")


def test_what_was_given_is_not_advised_again() -> None:
    fixes = Give("output"), Set("train.batch_size"), Set("teachers.cnn.model")
    error = ConfigError("what", fixes)
    said = (
        "what: give --output FOLDER, or give --batch-size N, or give --set teachers.cnn.model=VALUE"
    )
    assert render(error, TrainArguments) == render(error, TrainArguments()) == said
    settings = {"train.batch_size": 2}
    given = TrainArguments(output="x", settings=settings, set=("teachers.cnn.model=y",))
    for name in ("--output", "--batch-size", "--set"):
        assert f"give another {name}" in render(error, given)


def test_what_cannot_be_printed_is_escaped() -> None:
    error = ConfigError("the file a\x1b[2Jb\n", Give("output", "\x07"))
    assert render(error, RecipeArguments).isprintable()
