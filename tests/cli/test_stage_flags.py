"""Flags of a staged recipe: which stages each is for."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from vitdistill.cli import main, read_arguments
from vitdistill.cli.arguments import ExplainArguments, recipe_flags
from vitdistill.cli.recipe import resolve_recipe
from vitdistill.cli.render import render
from vitdistill.data.augment import Augment
from vitdistill.errors import UserError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import flatten
from vitdistill.recipes.settings import (
    DataConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from vitdistill.recipes.stages import Stages, dump

USAGE, CONFIG = 64, 78
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def three() -> Stages:
    """From nothing, from its weights at another size, and a fresh student taught by that."""
    plain = Recipe(
        student=StudentConfig(model="vit_tiny_patch16_224", model_args=VIT),
        data=DataConfig(dir="images", workers=0, augment=Augment(crop="pad", crop_padding=2)),
        optim=OptimConfig(lr=2e-3, warmup_epochs=1.0),
        train=TrainConfig(epochs=2, batch_size=16, log_every=1, save_every=2, eval_batch_size=4),
    )
    return Stages(
        name="three",
        stages={
            "pretrain": plain,
            "finetune": replace(
                plain, student=StudentConfig(model="stage:pretrain", image_size=24, drop_path=0.2)
            ),
            "distill": replace(
                plain,
                teachers={"teacher": TeacherConfig(model="stage:finetune")},
                objectives={"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)},
            ),
        },
    )


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The staged recipe alone, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.yaml").write_text(dump(three()))
    return tmp_path


def composed(*words: str) -> dict[str, dict[str, Any]]:
    """The fields of every stage after the flags."""
    stages = resolve_recipe(read_arguments("explain", ["three.yaml", *words]))
    assert isinstance(stages, Stages)
    return {key: flatten(recipe) for key, recipe in stages.stages.items()}


def sentence_of(*words: str, code: int) -> str:
    with pytest.raises(UserError) as caught:
        composed(*words)
    sentence = render(caught.value, ExplainArguments)
    assert caught.value.exit_code == code and "\n" not in sentence
    return sentence


VALUES = {
    "data_dir": "elsewhere",
    "model": "vit_tiny_patch16_224.augreg_in21k",
    "model_path": "a.pth",
    "teacher_model": "stage:finetune",
    "amp_dtype": "bfloat16",
    "teacher_precision": "bfloat16",
    "workers": "7",
    "seed": "7",
    "save_every": "7",
    "log_every": "7",
    "img_size": "64",
    "teacher_img_size": "64",
}


def test_a_flag_is_for_the_stages_its_option_says(bare: Path) -> None:
    plain = composed()
    stages = {"every": [*plain], "first": ["pretrain"], "taught": ["distill"], "one": []}
    for path, flag in recipe_flags().items():
        name, choices = flag.name, get_args(flag.value_kind)
        word = VALUES.get(
            name[2:].replace("-", "_"), choices[-1] if choices else flag.alone or "0.5"
        )
        word = "1" if flag.value_kind is int and word == "0.5" else word
        having = [key for key in plain if path in plain[key]]
        if path in ("teachers.teacher.checkpoint", "teachers.teacher.pretrained"):
            assert "would take the place of the weights" in sentence_of(name, word, code=CONFIG)
        elif not having:
            assert f"{name} cannot take effect" in sentence_of(name, word, code=USAGE)
        elif flag.option.stages == "one":
            sentence = sentence_of(name, word, code=USAGE)
            assert all(f"give --set {key}.{path}={word}" in sentence for key in having)
        else:
            changed = composed(name, word)
            path = "student.model_args.img_size" if path == "student.image_size" else path
            for key in plain:
                fields = plain[key].keys() | changed[key].keys()
                differing = {p for p in fields if plain[key].get(p) != changed[key].get(p)}
                meant = key in stages[flag.option.stages] and word != "stage:finetune"
                assert differing == ({path} if meant else set()), name


@pytest.mark.parametrize(
    ("command", "part", "code"),
    [
        ("--epochs 10", "give --set pretrain.train.epochs=10, or give --set finetune.", USAGE),
        ("--kd-weight 1", "give --set distill.objectives.kd.weight=1", USAGE),
        ("--clip-grad none", "--set pretrain.optim.clip_grad=null, or", USAGE),
        ("--sched none", "--set pretrain.optim.sched=none, or", USAGE),
        ("--distillation-alpha 0.5", "", USAGE),
        ("--keep-rate 0.5", "add --with STAGE.maskedkd", USAGE),
        ("--without distill.kd distill.teacher --teacher-model x", "", USAGE),
        (
            "--with finetune.kd --teacher-precision float32",
            "--set finetune.teachers.teacher.precision=float32, or give --set distill.",
            USAGE,
        ),
        ("--with kd", "write --with pretrain.kd or", USAGE),
        ("--with finetun.kd", "did you mean 'finetune'?", USAGE),
        ("--with distill.kd", "", USAGE),
        ("--without finetune.kd", "choose from ce", USAGE),
        ("--with finetune.random_masking:teacher", "", USAGE),
        ("--set optim.lr=1", "write --set pretrain.optim.lr=1 or", USAGE),
        ("--set finetune", "", USAGE),
        ("--set finetune.optim", "in the stage 'finetune'", USAGE),
        ("--set finetune.optim.lrr=1", "in the stage 'finetune'", CONFIG),
        ("--seed 1 --set finetune.train.seed=2", "in the stage 'finetune'", USAGE),
        ("--teacher-model vit_tiny_patch16_224", "'finetune'", CONFIG),
        ("--set finetune.train.epochs=0", "in the stage 'finetune'", CONFIG),
    ],
)
def test_a_flag_that_is_not_plain_is_refused(
    command: str, part: str, code: int, bare: Path
) -> None:
    assert part in sentence_of(*command.split(), code=code)


def test_methods_come_and_go_by_stage(bare: Path) -> None:
    words = "--with distill.maskedkd finetune.kd --without distill.ce --keep-rate 0.25"
    found = composed(*words.split())
    assert found["distill"]["selector.keep_rate"] == 0.25
    assert "objectives.ce.weight" not in found["distill"]
    assert found["finetune"]["objectives.kd.method"] == "kd"
    assert "teachers.teacher.model" in found["finetune"]
    assert found["pretrain"] == flatten(three().stages["pretrain"])
    words = "--with pretrain.random_masking"
    masked = resolve_recipe(read_arguments("explain", ["three.yaml", *words.split()]))
    assert isinstance(masked, Stages) and masked.stages["pretrain"].masking is not None
    assert masked.stages["finetune"].masking is None
    Path("three.yaml").write_text(dump(masked))
    assert composed("--without", "pretrain.masking")["pretrain"]["masking"] is None


def test_parts_of_a_recipe_are_judged_when_all_is_said(bare: Path) -> None:
    """Without its teacher nothing uses the second stage, as the student's start it is used again."""
    words = ["--without", "distill.kd", "distill.teacher"]
    assert sentence_of(*words, code=CONFIG)
    found = composed(*words, "--set", "distill.student.model=stage:finetune")
    assert found["distill"]["student.model"] == "stage:finetune"


def test_the_help_of_a_staged_recipe(
    bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "three.yaml", "--help"]) == 0
    printed, errors = capsys.readouterr()
    words = " ".join(printed.split())
    assert (
        "The recipe 'three.yaml' has the stages pretrain, finetune, distill." in words
        and errors == ""
    )
    assert "the first by --model, --model-path, --pretrained, --img-size;" in words
    assert "(default: 16)" in printed and max(map(len, printed.splitlines())) <= 80


def test_the_documentation_lists_the_flags_of_every_stage_and_of_the_first() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "stages.md").read_text().splitlines()
    for scope, words in (("every", "every stage"), ("first", "the first stage")):
        line = next(line for line in lines if line.startswith("| `--") and words in line)
        for flag in recipe_flags().values():
            if flag.option.stages == scope:
                assert flag.name in line
