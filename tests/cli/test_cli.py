"""The command line as a new user meets it: each mistake ends in one sentence, the right exit code,
and no file changed.
"""

import hashlib
import json
import os
import resource
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

from vitdistill import __version__
from vitdistill.cli import COMMANDS, main
from vitdistill.cli.arguments import ExplainArguments, groups_of
from vitdistill.data.sources.open import open_source
from vitdistill.recipes import RECIPES
from vitdistill.recipes.yaml import load_recipe
from vitdistill.weights.create import create_model

USAGE, DATA, DISK, CONFIG = 64, 65, 74, 78
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
VIT = "student.model_args={img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}"
SHORT = ["--epochs", "2", "--warmup-epochs", "0", "-b", "12", "--device", "cpu", "--set", VIT]


def write_images(
    root: Path, classes: dict[str, tuple[int, int, int]] = COLOURS, train: int = 12, val: int = 20
) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + generator.normal(0, 40, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype("uint8")).save(root / split / name / f"{i:02d}.png")
    return root


def tree(root: Path) -> dict[str, str]:
    """Every file's digest, every folder, and the target of every link."""
    found = {}
    for path in sorted(root.rglob("*")):
        found[str(path.relative_to(root))] = (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a teacher trained on them by the command line."""
    root = tmp_path_factory.mktemp("home")
    write_images(root / "photos")
    before = Path.cwd()
    os.chdir(root)
    try:
        assert (
            main(
                [
                    "train",
                    "small_images_alone",
                    "--data-dir",
                    "photos",
                    "--output",
                    "runs/teacher",
                    *SHORT,
                ]
            )
            == 0
        )
    finally:
        os.chdir(before)
    return root


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``home``, as the current folder; what a test writes into it is removed."""
    monkeypatch.chdir(home)
    yield home
    for entry in home.iterdir():
        if entry.name not in ("photos", "runs"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for entry in (home / "runs").iterdir():
        if entry.name != "teacher":
            shutil.rmtree(entry)


Refused = Callable[..., str]


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that has to fail; its one sentence, after checking that it changed nothing."""

    def run(*words: str, code: int) -> str:
        before = tree(here)
        capsys.readouterr()
        found = main(list(words))
        captured = capsys.readouterr()
        assert found == code, captured.err
        assert captured.err.endswith("\n") and captured.err.count("\n") == 1, captured.err
        assert (
            captured.err.startswith("vitdistill") and "Traceback" not in captured.err + captured.out
        )
        assert tree(here) == before
        return captured.err

    return run


def kd(*words: str) -> list[str]:
    return [
        "train",
        "small_images_maskedkd",
        "--data-dir",
        "photos",
        "--teacher-model",
        "runs/teacher",
        *SHORT,
        *words,
    ]


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS if " " not in name)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vitdistill {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_fits_80_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command.split(), "--help"]) == 0
    printed, errors = capsys.readouterr()
    assert f"usage: vitdistill {command}" in printed and errors == ""
    assert max(map(len, printed.splitlines())) <= 80
    assert "{None}" not in printed


def test_the_help_shows_the_defaults_of_the_recipe_that_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--help", "small_images_kd"]) == 0
    printed = capsys.readouterr().out
    assert "(default: 128)" in printed
    assert "have no effect: --keep-rate, --num-keep." in " ".join(printed.split())
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in RECIPES)


# --- any words ---------------------------------------------------------------------------------

spellings = sorted(
    {
        word
        for flags in groups_of(ExplainArguments).values()
        for flag in flags
        for word in flag.spellings
    }
    - {"--time", "RECIPE"}
)
values = [
    "",
    "0",
    "-1",
    "2",
    "0.5",
    "1e-3",
    "1e999",
    "nan",
    "none",
    "true",
    "x",
    "=",
    "a=b",
    "optim.lr=1",
    "selector=1",
    "[",
    "kd",
    "maskedkd",
    "é",
]
sentences = st.lists(
    st.one_of(st.sampled_from(spellings), st.sampled_from(values), st.sampled_from([*RECIPES])),
    max_size=6,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=sentences)
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


# --- data ----------------------------------------------------------------------------------------


def on(folder: str) -> list[str]:
    return ["train", "small_images_alone", "--data-dir", folder, "--output", "runs/new", *SHORT]


def test_no_such_folder(refused: Refused) -> None:
    assert "nowhere" in refused(*on("nowhere"), code=DATA)
    assert "nowhere" in refused("eval", "runs/teacher", "--data-dir", "nowhere", code=DATA)
    assert "nowhere" in refused("explain", "alone", "--data-dir", "nowhere", code=DATA)


def test_no_split(here: Path, refused: Refused) -> None:
    (here / "flat" / "red").mkdir(parents=True)
    sentence = refused(*on("flat"), code=DATA)
    assert "'red'" in sentence and "flat/train/" in sentence


def test_an_empty_class_folder(here: Path, refused: Refused) -> None:
    shutil.copytree(here / "photos", here / "odd")
    (here / "odd" / "train" / "violet").mkdir()
    assert "train/violet" in refused(*on("odd"), code=DATA)


def test_classes_that_differ_between_the_splits(here: Path, refused: Refused) -> None:
    shutil.copytree(here / "photos", here / "odd")
    shutil.rmtree(here / "odd" / "val" / "red")
    assert "'red'" in refused(*on("odd"), code=DATA)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "03.png"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 50, "03.png"),
        (b"<html>not found</html>", "03.png"),
    ],
    ids=["zero-byte", "corrupt", "a web page"],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_named(
    split: str, content: bytes, sentence: str, here: Path, refused: Refused
) -> None:
    shutil.copytree(here / "photos", here / "odd")
    (here / "odd" / split / "red" / "03.png").write_bytes(content)
    words = kd("--output", "runs/new")
    words[3] = "odd"
    message = refused(*words, code=DATA)
    assert sentence in message and f"{split}/red/03.png" in message


def test_a_truncated_image_is_named(here: Path, refused: Refused) -> None:
    shutil.copytree(here / "photos", here / "odd")
    file = here / "odd" / "train" / "red" / "03.png"
    file.write_bytes(file.read_bytes()[:-200])
    assert "train/red/03.png" in refused(*on("odd"), code=DATA)


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
    assert (
        main(
            [
                "eval",
                "runs/teacher",
                "--data-dir",
                "odd",
                "--workers",
                "0",
                "--device",
                "cpu",
                "--json",
            ]
        )
        == 0
    )
    scores = json.loads(capsys.readouterr().out)
    assert scores["num_samples"] == 13 and scores["top1"] >= 12 / 13
    source = open_source("odd", "val")
    (sixteen,) = [i for i in range(len(source)) if source.key(i) == "red/sixteen.png"]
    assert np.asarray(source.load(sixteen)).mean() == pytest.approx(30_000 / 257, abs=1)


# --- teachers ------------------------------------------------------------------------------------


def renamed(here: Path, name: str, classes: list[str]) -> str:
    """The teacher's weights, naming its classes otherwise."""
    shutil.copytree(here / "runs" / "teacher" / "last", here / name)
    config = json.loads((here / name / "config.json").read_text())
    (config if "label_names" in config else config["pretrained_cfg"])["label_names"] = classes
    (here / name / "config.json").write_text(json.dumps(config))
    return name


def with_teacher(folder: str, *words: str) -> list[str]:
    return [
        "train",
        "small_images_kd",
        "--data-dir",
        "photos",
        "--teacher-model",
        folder,
        "--output",
        "runs/new",
        *SHORT,
        *words,
    ]


def test_a_teacher_of_other_classes_is_refused(here: Path, refused: Refused) -> None:
    folder = renamed(here, "other", ["blue", "green", "violet"])
    assert "does not know 1 of the data set's 3 classes ('red')" in refused(
        *with_teacher(folder), code=CONFIG
    )
    assert "('red')" in refused(
        "eval", folder, "--data-dir", "photos", "--device", "cpu", code=CONFIG
    )


def test_a_teacher_of_another_class_order_is_refused_unless_asked_for(
    here: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = renamed(here, "other", ["green", "red", "blue"])
    assert "give --reorder-classes" in refused(*with_teacher(folder), code=CONFIG)
    # Taken at its word it answers wrongly now, and the preflight sees that too.
    assert "which is not above chance (33.3% for 3 classes)" in refused(
        *with_teacher(folder, "--reorder-classes"), code=CONFIG
    )
    state = safetensors.torch.load_file(here / folder / "model.safetensors")
    state["head.weight"], state["head.bias"] = (
        state["head.weight"][[1, 2, 0]],
        state["head.bias"][[1, 2, 0]],
    )
    safetensors.torch.save_file(state, here / folder / "model.safetensors", {"format": "pt"})
    config = json.loads((here / folder / "config.json").read_text())
    config["vitdistill"]["weights_sha256"] = hashlib.sha256(
        (here / folder / "model.safetensors").read_bytes()
    ).hexdigest()
    (here / folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(with_teacher(folder, "--reorder-classes")) == 0
    printed = capsys.readouterr().out
    assert "reordered by name" in printed and "right on 100.0%" in printed


def test_a_teacher_with_random_weights_is_refused(here: Path, refused: Refused) -> None:
    assert "would have random weights" in refused(
        *with_teacher("vit_tiny_patch16_224"), code=CONFIG
    )
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224",
        num_classes=3,
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=2,
    )
    torch.nn.init.zeros_(model.head.weight)
    safetensors.torch.save_file(model.state_dict(), here / "random.safetensors")
    args = "{img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}"
    words = with_teacher(
        "vit_tiny_patch16_224",
        "--teacher-path",
        "random.safetensors",
        "--set",
        f"teachers.teacher.model_args={args}",
    )
    assert "which is not above chance (33.3% for 3 classes)" in refused(*words, code=CONFIG)


def test_a_teachers_own_file_needs_no_word_about_its_classes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = safetensors.torch.load_file(here / "runs" / "teacher" / "last" / "model.safetensors")
    torch.save({"model": state}, here / "mine.pth")
    args = "{img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}"
    words = with_teacher(
        "vit_tiny_patch16_224",
        "--teacher-path",
        "mine.pth",
        "--set",
        f"teachers.teacher.model_args={args}",
    )
    assert main(words) == 0
    assert "it carries no class names" in capsys.readouterr().out


class Canary:
    """Unpickling this makes a folder."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("canary",)


@pytest.mark.parametrize("flag", ["--teacher-path", "--model-path"])
def test_a_pickle_offered_as_weights_is_not_executed(
    flag: str, here: Path, refused: Refused
) -> None:
    torch.save({"model": Canary()}, here / "evil.pth")
    args = "{img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}"
    words = with_teacher("vit_tiny_patch16_224", "--set", f"teachers.teacher.model_args={args}")
    if flag == "--model-path":
        words = on("photos")
    assert "was not executed" in refused(*words, flag, "evil.pth", code=DATA)
    assert not (here / "canary").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no weights file"),
        (b"", "empty"),
        (b"<html>", "web page"),
        (b"PK\x03\x04 cut", "cut short"),
        (b"\x80\x02hello", "no weights file"),
    ],
)
def test_weights_that_are_none(
    content: bytes | None, sentence: str, here: Path, refused: Refused
) -> None:
    if content is not None:
        (here / "w.pth").write_bytes(content)
    assert sentence in refused(*on("photos"), "--model-path", "w.pth", code=DATA)


def test_networks_that_a_method_cannot_use(refused: Refused) -> None:
    student = [
        word if word != VIT else "student.model_args={}"
        for word in kd("--model", "resnet18", "--output", "runs/new")
    ]
    assert "resnet18 has none: take a plain ViT as student" in refused(*student, code=CONFIG)
    sentence = refused(*kd("--keep-rate", "2", "--output", "runs/new"), code=CONFIG)
    assert "keep_rate is 2.0" in sentence


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_folder_of_another_recipe_is_not_touched(refused: Refused) -> None:
    words = [
        "train",
        "small_images_alone",
        "--data-dir",
        "photos",
        "--output",
        "runs/teacher",
        *SHORT,
    ]
    assert "optim.lr is 0.5 here and 0.001 there" in refused(*words, "--lr", "0.5", code=CONFIG)
    assert "holds another run" in refused(*kd("--output", "runs/teacher"), code=CONFIG)


def test_a_folder_that_holds_something_else_is_not_touched(refused: Refused) -> None:
    words = on("photos")
    words[words.index("runs/new")] = "photos"
    assert "photos is not empty (train is in it) and holds no run" in refused(*words, code=CONFIG)
    words[words.index("photos", 5)] = "photos/train/red/00.png"
    assert "the file photos/train/red/00.png is" in refused(*words, code=CONFIG)


def test_a_finished_run_is_left_as_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    assert (
        main(
            [
                "train",
                "small_images_alone",
                "--data-dir",
                "photos",
                "--output",
                "runs/teacher",
                *SHORT,
            ]
        )
        == 0
    )
    assert "finished already" in capsys.readouterr().out
    assert main(["train", "runs/teacher"]) == 0
    assert main(["train", "runs/teacher/recipe.yaml", "--output", "runs/teacher"]) == 0
    assert tree(here) == before


def test_a_recipe_file_with_an_unknown_field(here: Path, refused: Refused) -> None:
    (here / "mine.yaml").write_text("optim: {lr: 1e-3}\nselektor: {method: maskedkd}\n")
    assert "mine.yaml has no field 'selektor': did you mean 'selector'?" in refused(
        "train", "mine.yaml", code=CONFIG
    )
    (here / "mine.yaml").write_text("selector: {method: maskedkd, keep_rate: half}\n")
    assert "selector.keep_rate in mine.yaml is 'half': a number is needed" in refused(
        "train", "mine.yaml", code=CONFIG
    )


@pytest.mark.whole
@pytest.mark.parametrize(
    "name",
    [name for name in RECIPES if name not in ("kd", "hard_kd", "maskedkd", "deit_tiny_distilled")],
)
def test_a_printed_recipe_runs_again(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        ["--teacher-model", "runs/teacher"]
        if name in ("small_images_kd", "small_images_maskedkd")
        else []
    )
    assert main(["explain", name, *words, "--recipe-yaml"]) == 0
    text = capsys.readouterr().out
    (here / "mine.yaml").write_text(text)
    assert main(["explain", "mine.yaml", "--recipe-yaml"]) == 0
    assert capsys.readouterr().out == text
    if name == "small_images_maskedkd":
        assert main(["explain", name, *words]) == 0
        explained = capsys.readouterr().out
        assert main(["explain", "mine.yaml"]) == 0
        assert capsys.readouterr().out == explained


def test_flags_reach_the_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "explain",
        "kd",
        "--recipe-yaml",
        "--teacher_model",
        "x",
        "--lr=2e-3",
        "-b",
        "8",
        "--torchcompile",
        "--no-such",
    ][:-1]
    words += [
        "--set",
        "optim.opt_args.eps=1e-8",
        "student.model_args.depth=6",
        "--set",
        "train.keep_checkpoints=3",
    ]
    words += [
        "--distillation-alpha",
        "0.25",
        "--clip-grad",
        "1",
        "--aa",
        "none",
        "--in-memory",
        "false",
        "--with",
        "maskedkd",
        "hard_kd",
    ]
    assert main(words) == 0
    (here / "mine.yaml").write_text(capsys.readouterr().out)
    recipe = load_recipe(here / "mine.yaml")
    assert (
        recipe.optim.lr,
        recipe.train.batch_size,
        recipe.train.compile,
        recipe.optim.clip_grad,
    ) == (2e-3, 8, True, 1.0)
    assert (
        recipe.optim.opt_args == {"eps": 1e-8}
        and recipe.student.model_args == {"depth": 6}
        and recipe.train.keep_checkpoints == 3
    )
    assert (recipe.objectives["kd"].weight, recipe.objectives["ce"].weight) == (0.25, 0.75)
    assert (
        recipe.data.augment.aa is None
        and recipe.data.in_memory is False
        and recipe.teachers["teacher"].model == "x"
    )
    assert list(recipe.objectives) == ["ce", "kd", "hard_kd"] and recipe.selector is not None


def test_a_rate_replaces_a_count_and_a_count_a_rate(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, expected in (
        (["--num-keep", "98"], (0.5, 98)),
        (["--keep-rate", "0.25"], (0.25, None)),
    ):
        name = "mine.yaml" if (here / "mine.yaml").exists() else "maskedkd"
        assert main(["explain", name, *words, "--recipe-yaml"]) == 0
        (here / "mine.yaml").write_text(capsys.readouterr().out)
        selector = load_recipe(here / "mine.yaml").selector
        assert selector is not None and (selector.keep_rate, selector.num_keep) == expected


def test_unlabelled_images_teach_by_the_teacher_alone(
    here: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "flat").mkdir()
    for i, file in enumerate(sorted((here / "photos" / "train").rglob("*.png"))):
        shutil.copy(file, here / "flat" / f"{i}.png")
    words = [
        "train",
        "small_images_kd",
        "--data-dir",
        "flat",
        "--teacher-model",
        "runs/teacher",
        "--output",
        "runs/new",
        *SHORT,
    ]
    assert "--without ce" in refused(*words, code=CONFIG)
    assert main([*words, "--without", "ce"]) == 0
    assert "done: weights in runs/new/last" in capsys.readouterr().out


def test_a_size_is_set_where_the_recipe_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    for name, expected in (("small_images_alone", "img_size: 64"), ("alone", "image_size: 64")):
        assert main(["explain", name, "--img-size", "64", "--recipe-yaml"]) == 0
        assert expected in capsys.readouterr().out


def test_a_teacher_comes_and_goes_with_its_objective(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["explain", "small_images_alone", "--with", "kd", "--teacher-model", "runs/teacher"])
        == 0
    )
    assert "1 x kd:" in capsys.readouterr().out
    assert main(["explain", "small_images_kd", "--without", "kd", "teacher"]) == 0
    assert "plain training" in capsys.readouterr().out


def test_a_method_reads_the_teacher_it_is_given(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "explain",
        "small_images_kd",
        "--teacher-model",
        "runs/teacher",
        "--set",
        VIT,
        "teachers.cnn.model=resnet10t",
    ]
    words += ["teachers.cnn.model_args={channels: [8, 8, 16, 16]}", "objectives.kd_cnn.weight=0.25"]
    words += ["--with", "kd:cnn", "maskedkd:teacher"]
    assert main([*words, "--recipe-yaml"]) == 0
    (here / "both.yaml").write_text(capsys.readouterr().out)
    recipe = load_recipe(here / "both.yaml")
    assert list(recipe.teachers) == ["teacher", "cnn"] and list(recipe.objectives)[-1] == "kd_cnn"
    assert (recipe.objectives["kd_cnn"].teacher, recipe.objectives["kd_cnn"].weight) == (
        "cnn",
        0.25,
    )  # type: ignore[attr-defined]
    assert recipe.objectives["kd"].teacher == "teacher"  # type: ignore[attr-defined]
    assert recipe.selector is not None and recipe.selector.teachers == ("teacher",)
    assert main([*words, "--data-dir", "photos", "--batch-size", "10"]) == 0
    printed = capsys.readouterr().out
    assert (
        "teacher, runs/teacher: 8 of 16 patches" in printed
        and "cnn, resnet10t: records logits" in printed
    )


def test_explaining_reads_no_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(here / "runs" / "teacher" / "last", here / "bare")
    (here / "bare" / "model.safetensors").write_bytes(b"")
    before = tree(here)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = [
            "explain",
            "small_images_kd",
            "--teacher-model",
            "bare",
            "--teacher-path",
            "nowhere.pth",
            "--data-dir",
            "photos",
        ]
        assert main([*words, "--set", VIT, "--batch-size", "10"]) == 0
        assert "30 images x 30 epochs" in capsys.readouterr().out
    assert main([*words, "--batch-size", "64"]) == DATA
    assert "36 images, fewer than one batch of 64" in capsys.readouterr().err
    (here / "one").mkdir()
    shutil.copy(here / "photos" / "train" / "red" / "00.png", here / "one")
    before = tree(here)
    assert main(["explain", "alone", "--data-dir", "one"]) == DATA
    assert "one has 1 image, fewer than one batch of 1024" in capsys.readouterr().err
    assert tree(here) == before


def test_a_measured_step_implies_hours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitdistill.explain.measure.SECONDS", 0.2)
    words = [
        "explain",
        "small_images_maskedkd",
        "--teacher-model",
        "vit_tiny_patch16_224",
        "--set",
        VIT,
        "--time",
        "--device",
        "cpu",
    ]
    args = (
        "teachers.teacher.model_args={img_size: 16, patch_size: 4, embed_dim: 24, depth: 2,"
        " num_heads: 2}"
    )
    assert (
        main([*[*words, args, "--batch-size", "8"][:-3], "--set", args, "--batch-size", "8"]) == 0
    )
    printed = capsys.readouterr().out
    assert (
        "Measured on this CPU (1 thread), float32" in printed
        and "s a step of 8 images" in printed
        and "the whole run would take" in printed
    )


def test_evaluating_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    words = [
        "eval",
        "runs/teacher",
        "--data-dir",
        "photos",
        "--teacher-model",
        "runs/teacher/last",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    assert main([*words, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (
        scores["num_samples"] == 60
        and scores["top1"] == 1.0
        and scores["flops"] > 0
        and scores["images_per_second"] > 0
    )
    assert 0 <= scores["agreement"] <= 1
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(
        part in printed
        for part in ("top-1", "100.00%", "calibration error", "agreement", "images/s")
    )
    assert tree(here) == before


def test_a_teacher_of_another_class_order_is_compared_by_name(
    here: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = renamed(here, "other", ["green", "red", "blue"])
    words = [
        "eval",
        "runs/teacher",
        "--data-dir",
        "photos",
        "--teacher-model",
        folder,
        "--workers",
        "0",
        "--device",
        "cpu",
        "--json",
    ]
    assert "the teacher has the data set's classes in another order" in refused(*words, code=CONFIG)
    assert "give --reorder-classes" in refused(*words, code=CONFIG)
    assert main([*words, "--reorder-classes"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (
        scores["top1"] == 1.0 and scores["agreement"] == 0.0
    )  # what it calls blue, it calls green now


def test_a_run_in_the_place_of_a_recipes_student_keeps_its_shape(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        "small_images_alone",
        "--data-dir",
        "photos",
        "--model",
        "runs/teacher",
        "--output",
        "runs/new",
    ]
    assert (
        main([*words, "--epochs", "1", "--warmup-epochs", "0", "-b", "12", "--device", "cpu"]) == 0
    )
    assert "are left out for runs/teacher" in capsys.readouterr().out
    assert (
        create_model("runs/new/last").embed_dim == create_model("runs/teacher/last").embed_dim == 24
    )


def test_exporting_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "runs/teacher", "--output", "student"]) == 0
    assert "timm.create_model('local-dir:student', pretrained=True)" in capsys.readouterr().out
    model = timm.create_model("local-dir:student", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), create_model("runs/teacher/best").eval()(images))


# --- the machine ---------------------------------------------------------------------------------


def in_child(run: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run in a forked process; its exit code and what it wrote to stderr."""
    read, write = os.pipe()
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 dislikes forks of processes with threads
        child = os.fork()
    if child == 0:
        try:
            code = run()
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
    words = on("photos")

    def with_little_room() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return main(words)

    before = tree(here)
    code, said = in_child(with_little_room, capsys)
    assert code == DISK and said.count("\n") == 1 and "Traceback" not in said
    assert said.startswith("vitdistill train: ")
    after = tree(here)
    assert {key: value for key, value in after.items() if not key.startswith("runs/new")} == before
    assert not [
        key
        for key in after
        if key.endswith((".safetensors", ".tmp")) and key.startswith("runs/new")
    ]
    assert main(words) == 0


def test_a_folder_that_may_not_be_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        return  # root may write anywhere
    (here / "locked").mkdir(mode=0o500)
    words = on("photos")
    words[words.index("runs/new")] = "locked/run"
    assert main(words) == 77
    assert "no permission" in capsys.readouterr().err


def test_ctrl_c_before_anything_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(words: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitdistill.cli.train.run", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "vitdistill train: interrupted\n"


def test_a_file_given_by_hand_takes_the_place_of_fetched_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's recipes fetch their teacher; ``--teacher-path`` alone is enough to use a local
    file instead.
    """
    assert (
        main(
            [
                "explain",
                "deit_tiny_from_deit_small",
                "--recipe-yaml",
                "--teacher-path",
                "teacher.safetensors",
            ]
        )
        == 0
    )
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    teacher = load_recipe(tmp_path / "recipe.yaml").teachers["teacher"]
    assert teacher.checkpoint == "teacher.safetensors" and teacher.pretrained is False


def test_an_export_never_replaces_what_is_there(here: Path, refused: Refused) -> None:
    assert main(["export", "runs/teacher", "--output", "student"]) == 0
    assert "is not empty" in refused("export", "runs/teacher", "--output", "student", code=CONFIG)
