"""The command line as a user meets it; what it says of mistakes is in tests/messages.txt."""

import hashlib
import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.home import (
    CONFIG,
    DATA,
    DISK,
    NETWORK,
    SHORT,
    USAGE,
    VIT,
    make_home,
    rename_classes,
    run,
    tree,
)
from vitdistill import __version__
from vitdistill.cli import COMMANDS, main, read_arguments
from vitdistill.cli.arguments import ExplainArguments, LabelArguments, groups_of
from vitdistill.cli.recipe import resolve_recipe
from vitdistill.cli.render import render
from vitdistill.errors import ConfigError, Give, Set
from vitdistill.recipes import RECIPES
from vitdistill.recipes.config import Recipe
from vitdistill.weights.create import create_model

ALONE = f"train small_images_alone --output runs/new {SHORT}"
KD = f"train small_images_kd --output runs/new {SHORT} --teacher-model"
EVAL = "eval runs/teacher --workers 0 --device cpu --data-dir"
TEACHERS_NETWORK = f"--set 'teachers.teacher.model_args={NETWORK}'"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``home``, as the current folder; what a test writes into it is removed."""
    monkeypatch.chdir(home)
    yield home
    for entry in [*home.iterdir(), *(home / "runs").iterdir()]:
        if entry.name not in ("photos", "runs", "teacher"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str, int], str]:
    """Run a command that has to fail in one sentence, and to change no file."""

    def refuse(command: str, code: int) -> str:
        before = tree(here)
        capsys.readouterr()
        assert run(command) == code
        said = capsys.readouterr().err
        assert said.startswith("vitdistill") and said.count("\n") == 1, said
        assert tree(here) == before
        return said

    return refuse


def resolved(command: str) -> Recipe:
    recipe = resolve_recipe(read_arguments("explain", shlex.split(command)))
    assert isinstance(recipe, Recipe)
    return recipe


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS if " " not in name)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_fits_80_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(f"{command} --help") == 0
    printed, errors = capsys.readouterr()
    assert f"usage: vitdistill {command}" in printed and errors == ""
    assert max(map(len, printed.splitlines())) <= 80
    for flags in groups_of(COMMANDS[command][1]).values():
        assert all(flag.positional or f"  {flag.name}" in printed for flag in flags)


def test_the_recipes_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in RECIPES)
    assert run("--version") == 0
    assert capsys.readouterr().out == f"vitdistill {__version__}\n"


spellings = {
    word
    for flags in groups_of(ExplainArguments).values()
    for flag in flags
    for word in flag.option.spellings
}
values = [
    *("", "0", "-1", "2", "0.5", "1e-3", "1e999", "nan", "none", "true", "x", "=", "a=b", "["),
    *("optim.lr=1", "selector=1", "kd", "maskedkd", "é"),
]
words = st.sampled_from([*sorted(spellings - {"--time", "RECIPE"}), *values, *RECIPES])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(words, max_size=6))
def test_no_words_whatsoever_end_in_a_traceback(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    code = main(["explain", *words, "--recipe-yaml"])
    printed, errors = capsys.readouterr()
    if code == 0:
        assert printed.startswith("name: ") and errors == ""
    else:
        assert code in (USAGE, CONFIG) and errors.count("\n") == 1 and printed == ""


# --- images --------------------------------------------------------------------------------------


def test_unlabelled_images_teach_by_the_teacher_alone(
    here: Path, refused: Callable[[str, int], str]
) -> None:
    Path("flat").mkdir()
    for i, file in enumerate(sorted(Path("photos/train").rglob("*.png"))):
        shutil.copy(file, f"flat/{i}.png")
    command = f"{KD} runs/teacher".replace("photos", "flat")
    refused(command, CONFIG)
    assert run(f"{command} --without ce") == 0


# --- teachers ------------------------------------------------------------------------------------


def test_a_teacher_of_another_class_order_is_refused_unless_asked_for(
    here: Path, refused: Callable[[str, int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    rename_classes("turned", ["green", "red", "blue"])
    weights, described = Path("turned/model.safetensors"), Path("turned/config.json")
    state = safetensors.torch.load_file(weights)
    turned = {key: state[key][[1, 2, 0]] for key in ("head.weight", "head.bias")}
    safetensors.torch.save_file({**state, **turned}, weights, {"format": "pt"})
    config = json.loads(described.read_text())
    config["vitdistill"]["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    described.write_text(json.dumps(config))
    refused(f"{KD} turned", CONFIG)
    assert run(f"{KD} turned --reorder-classes") == 0
    assert "right on 100.0%" in capsys.readouterr().out


def test_a_teacher_is_compared_by_the_names_of_its_classes(
    here: Path, refused: Callable[[str, int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    rename_classes("other", ["green", "red", "blue"])
    command = f"{EVAL} photos --teacher-model other --json"
    refused(command, CONFIG)
    assert run(f"{command} --reorder-classes") == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["top1"], scores["agreement"]) == (1.0, 0.0)  # what is blue, it calls green
    assert run(command.replace("--json", "--reorder-classes")) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("100.00%", "calibration error", "images/s"))


def test_a_teachers_own_file_needs_no_word_about_its_classes(
    here: Path, refused: Callable[[str, int], str]
) -> None:
    state = safetensors.torch.load_file("runs/teacher/last/model.safetensors")
    torch.save({"model": state}, "mine.pth")
    command = f"{KD} vit_tiny_patch16_224 {TEACHERS_NETWORK} --teacher-path mine.pth"
    torch.save({"model": {**state, "head.weight": 0 * state["head.weight"]}}, "zero.pth")
    refused(command.replace("mine.pth", "zero.pth"), CONFIG)
    assert run(command) == 0


# --- runs ----------------------------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is(
    here: Path, refused: Callable[[str, int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(here)
    assert run(ALONE.replace("runs/new", "runs/teacher")) == 0
    assert "finished already" in capsys.readouterr().out
    assert run("train runs/teacher") == 0
    assert run("train runs/teacher/recipe.yaml --output runs/teacher") == 0
    assert tree(here) == before
    refused(f"{KD} runs/teacher".replace("runs/new", "runs/teacher"), CONFIG)


def test_a_finished_run_is_not_taken_for_one_of_other_images(
    here: Path, refused: Callable[[str, int], str]
) -> None:
    command = ALONE.replace("runs/new", "runs/teacher")
    shutil.copytree("photos", "moved")
    assert run(command.replace("photos", "moved")) == 0
    next(Path("moved/train").rglob("*.png")).unlink()
    said = refused(command.replace("photos", "moved"), DATA)
    assert "training images of this run have changed" in said
    assert "has no images" in refused(command.replace("photos", "runs/teacher/last"), DATA)
    shutil.rmtree("moved")
    assert run("train runs/teacher") == 0


@pytest.mark.parametrize("gone", ["last", "best", "last/model.safetensors"])
def test_a_finished_run_without_its_weights_is_not_called_done(
    gone: str, here: Path, refused: Callable[[str, int], str]
) -> None:
    shutil.copytree("runs/teacher", "runs/new")
    place = Path("runs/new", gone)
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert gone.partition("/")[0] in refused("train runs/new", DATA)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("summary.json", content) for content in (b"", b"{", b"[]", b"null", b"\xff\xfe")),
        *(
            (name, b'{"scores": 1}')
            for name in ("summary.json", "environment.json", "identity.json")
        ),
        *((name, b"{") for name in ("environment.json", "identity.json")),
    ],
)
def test_a_damaged_record_is_one_sentence(
    name: str, content: bytes, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("runs/teacher", "runs/new")
    if name != "summary.json":
        Path("runs/new/summary.json").unlink()
    Path("runs/new", name).write_bytes(content)
    code, said = run("train runs/new"), capsys.readouterr().err
    if content.startswith(b"{") and len(content) > 1 and name != "summary.json":
        assert code == 0  # no key that is read
    else:
        assert code == DATA and f"runs/new/{name} is damaged" in said and said.count("\n") == 1


def test_the_road_of_the_readme(here: Path) -> None:
    """From a folder of classes without splits to a fine-tuned teacher, a student and an export."""
    shutil.copytree("photos/train", "mine")
    images = "--data-dir mine --val-split 0.25"
    short = f"{images} --epochs 2 --warmup-epochs 0 -b 9 --workers 0 --device cpu"
    assert run(f"train finetune {short} --model runs/teacher --output runs/new") == 0
    command = f"train distill {short} --teacher-model runs/new --output runs/student"
    assert run(f"{command} --model vit_tiny_patch16_224 --pretrained false {VIT}") == 0
    assert "val_split: 0.25" in Path("runs/student/recipe.yaml").read_text()
    assert run("eval runs/new runs/student --workers 0") == 0
    assert run("export runs/student --output student") == 0


def test_a_method_reads_the_teacher_it_is_given(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        f"small_images_kd --teacher-model runs/teacher {VIT} teachers.cnn.model=resnet10t"
        " 'teachers.cnn.model_args={channels: [8, 8, 16, 16]}' objectives.kd_cnn.weight=0.25"
        " --with kd:cnn maskedkd:teacher"
    )
    recipe = resolved(command)
    assert [*recipe.teachers] == ["teacher", "cnn"] and [*recipe.objectives][-1] == "kd_cnn"
    assert recipe.objectives["kd_cnn"].teacher == "cnn"  # type: ignore[attr-defined]
    assert recipe.selector is not None and recipe.selector.teachers == ("teacher",)
    assert run(f"explain {command} --data-dir photos -b 10") == 0
    printed = capsys.readouterr().out
    assert "teacher, runs/teacher, 16 x 16 pixels: 8 of 16 patches" in printed
    assert re.search(r"cnn, resnet10t, 176 .*: records logits", " ".join(printed.split()))


def test_explaining_reads_no_weights(
    here: Path, refused: Callable[[str, int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("runs/teacher/last", "bare")
    Path("bare/model.safetensors").write_bytes(b"")
    command = f"explain small_images_kd --teacher-model bare --data-dir photos {VIT} -b"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(f"{command} 10 --teacher-path nowhere.pth") == 0
    assert "30 images x 30 epochs" in capsys.readouterr().out
    refused(f"{command} 64", DATA)


def test_a_measured_step_implies_hours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitdistill.explain.measure.SECONDS", 0.2)
    command = "explain small_images_maskedkd --teacher-model vit_tiny_patch16_224 -b 8"
    assert run(f"{command} {VIT} {TEACHERS_NETWORK} --time --device cpu") == 0
    printed = capsys.readouterr().out
    assert "s a step of 8 images" in printed and "the whole run would take" in printed


@pytest.mark.parametrize("method", ["vitkd", "dist"])
def test_shares_of_objectives_are_said_before_a_run_and_at_its_start(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    monkeypatch.setattr("vitdistill.explain.measure.SECONDS", 0.0)
    words = f"small_images_kd --with {method} --teacher-model runs/teacher {SHORT}"
    said = []
    for command in (f"explain {words} --time", f"train {words} --output runs/{method}"):
        assert run(command) == 0
        printed = capsys.readouterr().out.splitlines()
        said.append([line for line in printed if line.startswith("shares of the loss")])
    assert said[0] == said[1] and f" {method} " in said[0][0]


def test_exporting_a_run(here: Path, refused: Callable[[str, int], str]) -> None:
    assert run("export runs/teacher --output student") == 0
    model = timm.create_model("local-dir:student", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), create_model("runs/teacher/best").eval()(images))
    refused("export runs/teacher --output student", CONFIG)


# --- the machine ---------------------------------------------------------------------------------


@pytest.mark.whole
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(here: Path) -> None:
    before = tree(here)
    failed = subprocess.run(
        [sys.executable, "-m", "vitdistill", *shlex.split(ALONE)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
    )
    assert failed.returncode == DISK and len(failed.stderr.splitlines()) == 2, failed.stderr
    after = tree(here)
    assert {key: value for key, value in after.items() if not key.startswith("runs/new")} == before
    new = [key for key in after if key.startswith("runs/new")]
    assert not [key for key in new if key.endswith((".safetensors", ".tmp"))]
    assert run(ALONE) == 0


@pytest.mark.parametrize("value", ["it's", "a b", "$HOME", "{a: 1}", "x;y", "*", "runs/mine-1.0"])
def test_a_remedy_is_words_of_the_shell(value: str) -> None:
    for fix in (Give("output", value), Set("student.model", value)):
        sentence = render(ConfigError("what", fix), LabelArguments)
        assert shlex.split(sentence.partition(": give ")[2])[-1] == value
