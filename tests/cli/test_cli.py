"""The command line as a user meets it; what it says of mistakes is in tests/messages.txt."""

import hashlib
import json
import os
import resource
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.cli.home import (
    COLOURS,
    CONFIG,
    DATA,
    DISK,
    NETWORK,
    SHORT,
    USAGE,
    VIT,
    make_home,
    run,
    tree,
)
from vitdistill import __version__
from vitdistill.cli import COMMANDS, main, read_arguments
from vitdistill.cli.arguments import ExplainArguments, groups_of
from vitdistill.cli.recipe import resolve_recipe
from vitdistill.data.sources.open import open_source
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
    for flags in groups_of(COMMANDS[command].arguments).values():
        assert all(flag.positional or f"  {flag.name}" in printed for flag in flags)


def test_help_of_a_recipe_all_recipes_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train --help small_images_kd") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "(default: 128)" in printed and "no effect: --keep-rate, --num-keep." in printed
    assert run("recipes") == 0
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in RECIPES)
    assert run("--version") == 0
    assert capsys.readouterr().out == f"vitdistill {__version__}\n"


spellings = {
    word
    for flags in groups_of(ExplainArguments).values()
    for flag in flags
    for word in flag.spellings
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


def test_ctrl_c_before_anything_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(words: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitdistill.cli.train.run", interrupted)
    assert run("train") == 130
    assert capsys.readouterr().err.count("\n") == 1


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + b"x" * 50, b"<html>not found</html>"])
def test_a_damaged_image_is_named(
    split: str, content: bytes, here: Path, refused: Callable[[str, int], str]
) -> None:
    shutil.copytree("photos", "odd")
    Path("odd", split, "red", "03.png").write_bytes(content)
    command = f"{KD} runs/teacher".replace("photos", "odd")
    assert f"{split}/red/03.png" in refused(command, DATA)


def test_unusual_images_are_read_right(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CMYK, 16-bit, transparent and animated images: the teacher knows the colour of each."""
    odd = here / "odd" / "val"
    for name in COLOURS:
        (odd / name).mkdir(parents=True)
        plain = Image.new("RGB", (16, 16), COLOURS[name])
        plain.convert("CMYK").save(odd / name / "cmyk.tiff")
        see_through = Image.new("RGBA", (16, 16), (*COLOURS[name], 230))
        see_through.save(odd / name / "transparent.png")
        other = Image.new("RGB", (16, 16), COLOURS["red" if name != "red" else "blue"])
        plain.save(odd / name / "animated.gif", save_all=True, append_images=[other, other])
        plain.quantize().save(odd / name / "palette.png")
    grey = Image.fromarray(np.full((16, 16), 30_000, dtype=np.uint16))
    grey.save(odd / "red" / "sixteen.png")
    assert run(f"{EVAL} odd --json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["num_samples"] == 13 and scores["top1"] >= 12 / 13
    source = open_source("odd", "val")
    (sixteen,) = [i for i in range(len(source)) if source.key(i) == "red/sixteen.png"]
    assert np.asarray(source.load(sixteen)).mean() == pytest.approx(30_000 / 257, abs=1)


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


def renamed(folder: str, classes: list[str], order: list[int] | None = None) -> None:
    """Copy the teacher under other class names, and with its classes in another order."""
    shutil.copytree("runs/teacher/last", folder)
    weights, described = Path(folder, "model.safetensors"), Path(folder, "config.json")
    config = json.loads(described.read_text())
    (config if "label_names" in config else config["pretrained_cfg"])["label_names"] = classes
    if order is not None:
        state = safetensors.torch.load_file(weights)
        state |= {key: state[key][order] for key in ("head.weight", "head.bias")}
        safetensors.torch.save_file(state, weights, {"format": "pt"})
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        config["vitdistill"]["weights_sha256"] = digest
    described.write_text(json.dumps(config))


def test_a_teacher_of_another_class_order_is_refused_unless_asked_for(
    here: Path, refused: Callable[[str, int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    renamed("turned", ["green", "red", "blue"], [1, 2, 0])
    refused(f"{KD} turned", CONFIG)
    assert run(f"{KD} turned --reorder-classes") == 0
    assert "right on 100.0%" in capsys.readouterr().out


def test_a_teacher_is_compared_by_the_names_of_its_classes(
    here: Path, refused: Callable[[str, int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    renamed("other", ["green", "red", "blue"])
    command = f"{EVAL} photos --teacher-model other --json"
    refused(command, CONFIG)
    assert run(f"{command} --reorder-classes") == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["top1"], scores["agreement"]) == (1.0, 0.0)  # what is blue, it calls green


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


@pytest.mark.whole
@pytest.mark.parametrize("name", RECIPES)
def test_a_printed_recipe_runs_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"explain {name} --recipe-yaml") == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(text)
    assert run(f"explain {tmp_path}/mine.yaml --recipe-yaml") == 0
    assert capsys.readouterr().out == text


def test_flags_reach_the_recipe() -> None:
    recipe = resolved(
        "kd --teacher_model x --lr=2e-3 -b 8 --torchcompile --set optim.opt_args.eps=1e-8"
        " student.model_args.depth=6 --set train.keep_checkpoints=3 --distillation-alpha 0.25"
        " --clip-grad 1 --aa none --in-memory false --with maskedkd hard_kd"
    )
    optim, train, data = recipe.optim, recipe.train, recipe.data
    assert (optim.lr, optim.clip_grad, optim.opt_args) == (2e-3, 1.0, {"eps": 1e-8})
    assert (train.batch_size, train.compile, train.keep_checkpoints) == (8, True, 3)
    assert (data.augment.aa, data.in_memory) == (None, False)
    assert recipe.student.model_args == {"depth": 6} and recipe.teachers["teacher"].model == "x"
    weights = {name: objective.weight for name, objective in recipe.objectives.items()}
    assert weights == {"ce": 0.75, "kd": 0.25, "hard_kd": 1.0} and recipe.selector is not None


def test_one_setting_takes_the_place_of_another(tmp_path: Path) -> None:
    counted = resolved("maskedkd --num-keep 98").selector
    assert counted is not None and (counted.keep_rate, counted.num_keep) == (0.5, 98)
    (tmp_path / "mine.yaml").write_text("selector: {method: maskedkd, num_keep: 98}\n")
    rated = resolved(f"{tmp_path}/mine.yaml --keep-rate 0.25").selector
    assert rated is not None and (rated.keep_rate, rated.num_keep) == (0.25, None)
    assert resolved("alone --img-size 64").student.image_size == 64
    assert resolved("small_images_alone --img-size 64").student.model_args["img_size"] == 64
    teacher = resolved("deit_tiny_from_deit_small --teacher-path a.pth").teachers["teacher"]
    assert (teacher.checkpoint, teacher.pretrained) == ("a.pth", False)


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
    assert "teacher, runs/teacher: 8 of 16 patches" in printed
    assert "cnn, resnet10t: records logits" in printed


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


def test_evaluating_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    command = f"{EVAL} photos --teacher-model runs/teacher/last"
    assert run(f"{command} --json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["num_samples"], scores["top1"], scores["agreement"]) == (60, 1.0, 1.0)
    assert scores["flops"] > 0 and scores["images_per_second"] > 0
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("100.00%", "calibration error", "images/s"))
    assert tree(here) == before


def test_a_run_in_the_place_of_a_recipes_student_keeps_its_shape(here: Path) -> None:
    short = SHORT.removesuffix(VIT)
    assert run(f"train small_images_alone --model runs/teacher --output runs/new {short}") == 0
    assert create_model("runs/new/last").embed_dim == 24


def test_exporting_a_run(here: Path, refused: Callable[[str, int], str]) -> None:
    assert run("export runs/teacher --output student") == 0
    model = timm.create_model("local-dir:student", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), create_model("runs/teacher/best").eval()(images))
    refused("export runs/teacher --output student", CONFIG)


# --- the machine ---------------------------------------------------------------------------------


def in_child(command: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run in a forked process; return its exit code and what it wrote to stderr."""
    read, write = os.pipe()
    capsys.readouterr()
    with warnings.catch_warnings():
        # Python 3.12 dislikes forks of processes with threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            code = command()
            os.write(write, capsys.readouterr().err.encode()[:4000])
        except BaseException as error:
            os.write(write, repr(error).encode()[:4000])
            code = 99
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


@pytest.mark.whole
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_little_room() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return run(ALONE)

    before = tree(here)
    code, said = in_child(with_little_room, capsys)
    assert code == DISK and said.count("\n") == 1 and said.startswith("vitdistill train: ")
    after = tree(here)
    assert {key: value for key, value in after.items() if not key.startswith("runs/new")} == before
    new = [key for key in after if key.startswith("runs/new")]
    assert not [key for key in new if key.endswith((".safetensors", ".tmp"))]
    assert run(ALONE) == 0


def test_a_folder_that_may_not_be_written(here: Path) -> None:
    if os.geteuid() == 0:
        return  # root may write anywhere
    Path("locked").mkdir(mode=0o500)
    assert run(ALONE.replace("runs/new", "locked/run")) == 77
