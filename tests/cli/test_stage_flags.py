"""Flags of a staged recipe: which stages each is for."""

from pathlib import Path
from typing import Any, get_args

import pytest

from tests.recipes.strategies import three
from vitdistill.cli import read_arguments
from vitdistill.cli.arguments import ExplainArguments, recipe_flags
from vitdistill.cli.recipe import resolve_recipe
from vitdistill.cli.render import render
from vitdistill.errors import UserError
from vitdistill.recipes.convert import flatten
from vitdistill.recipes.settings import EVERY_STAGE, FIRST_STAGE, UNLABELLED
from vitdistill.recipes.stages import Stages
from vitdistill.recipes.yaml import dump_recipe

USAGE, CONFIG = 64, 78


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The staged recipe alone."""
    made = tmp_path_factory.mktemp("staged")
    (made / "three.yaml").write_text(dump_recipe(three()))
    return made


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, dict[str, Any]]:
    """The fields of every stage without any flag."""
    return composed(file=str(folder / "three.yaml"))


def composed(*words: str, file: str = "three.yaml") -> dict[str, dict[str, Any]]:
    """The fields of every stage after the flags."""
    stages = resolve_recipe(read_arguments("explain", [file, *words]))
    assert isinstance(stages, Stages)
    return {key: flatten(recipe) for key, recipe in stages.stages.items()}


def sentence_of(*words: str, code: int) -> str:
    with pytest.raises(UserError) as caught:
        composed(*words)
    sentence = render(caught.value, ExplainArguments)
    assert caught.value.exit_code == code and "\n" not in sentence
    return sentence


WORDS = {"--model": "deit_tiny_patch16_224.fb_in1k", "--teacher-model": "stage:finetune"}


@pytest.mark.parametrize("path", sorted(recipe_flags().keys() - UNLABELLED))
def test_a_flag_is_for_every_stage_for_the_first_or_for_the_only_one_with_the_field(
    path: str, plain: dict[str, dict[str, Any]]
) -> None:
    flag = recipe_flags()[path]
    choices = get_args(flag.value_kind)
    word = "64" if flag.value_kind is int else choices[-1] if choices else flag.alone or "0.25"
    word = WORDS.get(flag.name, word)
    having = [key for key in plain if path in plain[key]]
    if path in ("teachers.teacher.checkpoint", "teachers.teacher.pretrained"):
        assert "would take the place of the weights" in sentence_of(flag.name, word, code=CONFIG)
        return
    if not having:
        assert f"{flag.name} cannot take effect" in sentence_of(flag.name, word, code=USAGE)
        return
    meant = having if path in EVERY_STAGE else having[:1] if path in FIRST_STAGE else having
    if len(meant) > 1 and path not in EVERY_STAGE:
        sentence = sentence_of(flag.name, word, code=USAGE)
        assert all(f"give --set {key}.{path}={word}" in sentence for key in having)
        return
    changed = composed(flag.name, word)
    for key in plain:
        differing = {p for p in plain[key] if plain[key][p] != changed[key].get(p)}
        expected = {path} if key in meant and word != plain[key][path] else set()
        assert differing == expected, key


@pytest.mark.parametrize(
    ("command", "part", "code"),
    [
        ("--epochs 10", "give --set pretrain.train.epochs=10, or give --set finetune.", USAGE),
        ("--clip-grad none", "--set pretrain.optim.clip_grad=null, or", USAGE),
        ("--keep-rate 0.5", "add --with distill.maskedkd", USAGE),
        ("--without distill.kd distill.teacher --teacher-model x", "distill.kd", USAGE),
        ("--with finetune.kd --teacher-precision float32", "or give --set distill.", USAGE),
        (
            "--lr 1 --epochs 2",
            "no stage is named for --lr, --epochs: give --set pretrain.optim.lr=1.0"
            " --set pretrain.train.epochs=2, or give --set finetune.optim.lr=1.0 --set finetune.",
            USAGE,
        ),
        (
            "--with kd --set optim.lr=1",
            "no stage is named for --set optim.lr=1, --with kd: give --set pretrain.optim.lr=1"
            " --with pretrain.kd, or",
            USAGE,
        ),
        ("--with kd", "give --with pretrain.kd, or", USAGE),
        ("--without finetune.kd", "choose from ce", USAGE),
        ("--with finetune.random_masking:teacher", "leave :teacher out", USAGE),
        ("--set finetune", "", USAGE),
        ("--set finetune.optim", "in the stage 'finetune'", USAGE),
        ("--set finetune.optim.lrr=1", "in the stage 'finetune'", CONFIG),
        ("--seed 1 --set finetune.train.seed=2", "in the stage 'finetune'", USAGE),
        ("--teacher-model vit_tiny_patch16_224", "'finetune'", CONFIG),
        ("--labels x --with finetune.kd", "--set STAGE.teachers.NAME.labels=FOLDER", USAGE),
    ],
)
def test_a_flag_that_is_not_plain_is_refused(command: str, part: str, code: int) -> None:
    assert part in sentence_of(*command.split(), code=code)


def test_unlabelled_images_are_for_the_stages_that_learn_from_them() -> None:
    plain, stages = composed(), three().stages
    changed = composed("--unlabelled-dir", ".", "--labelled-share", "0.5")
    for key in plain:
        differing = {path for path in plain[key] if plain[key][path] != changed[key][path]}
        assert differing == (set(UNLABELLED) if stages[key].learns_without_labels else set())
    assert {stages[key].learns_without_labels for key in stages} == {True, False}
    assert sentence_of("--labelled-share", "0.5", code=CONFIG)


def test_methods_come_and_go_by_stage() -> None:
    words = "--with distill.maskedkd finetune.kd --without distill.ce --keep-rate 0.25"
    found = composed(*words.split())
    assert found["distill"]["selector.keep_rate"] == 0.25
    assert "objectives.ce.weight" not in found["distill"]
    assert found["finetune"]["objectives.kd.method"] == "kd"
    assert found["pretrain"] == flatten(three().stages["pretrain"])


def test_parts_of_a_recipe_are_judged_when_all_is_said() -> None:
    """Without its teacher nothing uses the second stage, as the student's start it is used again."""
    words = ["--without", "distill.kd", "distill.teacher"]
    assert sentence_of(*words, code=CONFIG)
    found = composed(*words, "--set", "distill.student.model=stage:finetune")
    assert found["distill"]["student.model"] == "stage:finetune"


def test_the_documentation_lists_the_flags_of_every_stage_and_of_the_first() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "stages.md").read_text().splitlines()
    for paths, words in ((EVERY_STAGE, "every stage"), (FIRST_STAGE, "the first stage")):
        line = next(line for line in lines if line.startswith("| `--") and words in line)
        assert all(recipe_flags()[path].name in line for path in paths)
