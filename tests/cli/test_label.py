"""``vitdistill label`` as its user meets it: the whole way once, and mistakes that change no file."""

import contextlib
import os
import shlex
import shutil
from pathlib import Path

import pytest

from tests.cli.home import CONFIG, DATA, SHORT, USAGE, VIT, make_home, run, tree
from vitdistill.cli import main
from vitdistill.labels import LabelStore
from vitdistill.labels.layout import Layout
from vitdistill.labels.manifest import Manifest

pytestmark = pytest.mark.whole

TEACHER = "--teacher-model runs/teacher/last"
LABEL = f"label small_images_kd {SHORT} {TEACHER}"
TRAIN = f"train small_images_kd {SHORT} --output runs/stored --labels labels"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a teacher, and its labels of two views."""
    root = make_home(tmp_path_factory.mktemp("home"), train=11)
    with contextlib.chdir(root):
        assert run(f"{LABEL} --output labels") == 0
    return root


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def test_from_a_teacher_to_a_student_that_never_saw_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LabelStore.open("labels")
    assert store.path.name == "teacher" and store.status().records == 33 * 2
    assert store.records(1, [32, 0]).logits().shape == (2, 3)
    explain = TRAIN.replace("train", "explain", 1).replace("--output runs/stored", "")
    assert run(explain.replace("--device cpu", "")) == 0
    assert "does not run" in capsys.readouterr().out
    assert run(f"{TRAIN} --seed 3") == 0
    assert "66 of 66 records, 2 views used" in capsys.readouterr().out
    assert "seed: 0" in Path("runs/stored/recipe.yaml").read_text()  # the labels', for the views
    assert run("eval runs/stored --data-dir photos --device cpu") == 0
    assert run("train runs/stored --device cpu") == 0
    assert "finished already" in capsys.readouterr().out


def test_what_label_says_to_do_next_can_be_done(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of fewer views than the recipe has, too."""
    recipe = f"small_images_few_labels {SHORT}"
    assert run(f"label {recipe} {TEACHER} --views 1 --output {tmp_path / 'labels'}") == 0
    flags = capsys.readouterr().out.splitlines()[-1].partition("recipe and ")[2]
    assert run(f"train {recipe} {flags} --output {tmp_path / 'run'}") == 0
    assert "1 view used" in capsys.readouterr().out


def test_labels_are_looked_after(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(command: str) -> str:
        capsys.readouterr()
        assert run(f"label {command}") == 0
        return capsys.readouterr().out

    before = tree(here / "labels")
    assert "complete, 2 of 2 parts, 66 records, " in printed("status labels")
    text = printed("info labels")
    for words in ("3 logits in float16", "33 images x 2 views", "teacher.weights"):
        assert words in text
    assert "0 files" in printed("verify labels")
    assert "20 records" in printed("check labels --samples 20 --device cpu")
    one, two, both = (tmp_path / name for name in ("one", "two", "both"))
    printed(f"prune labels/teacher --to {one} --views 1")
    printed(f"merge {both} --from {one} labels/teacher")
    assert LabelStore.open(both).status().records == 66
    printed(f"prune labels --to {two} --encoding topk --k 2 --views 1")
    assert LabelStore.open(two).layout.logits.temperatures == (1.0,)  # type: ignore[union-attr]
    assert tree(here / "labels") == before


def test_long_work_is_not_silent(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitdistill.runs.label._EVERY_S", 0.0)
    place = tmp_path / "it's $HOME; a folder"
    assert run(f"{LABEL} --output {shlex.quote(str(place))} --set train.eval_batch_size=4") == 0
    said = capsys.readouterr().out.splitlines()
    shares = [float(line.split("% of 66 v")[0]) for line in said if "% of 66 views, " in line]
    assert shares == sorted(shares) and shares[-1] == 100 and len(set(shares)) > 8  # inside a part
    assert shlex.split(said[-1])[-2:] == ["--labels", str(place)]  # what is told can be run
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # a terminal, to rich
    assert run(f"label merge {tmp_path}/long --from labels/teacher") == 0
    assert "2 of 2 parts copied" in capsys.readouterr().out
    assert run(f"label prune labels/teacher --to {tmp_path}/one --views 1") == 0
    assert "1 of 1 parts written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("label status", USAGE),
        (f"{LABEL} --labels labels", USAGE),
        (f"{LABEL} --k 3 --output new", CONFIG),
        (f"{LABEL} --seed 9 --output labels", DATA),
        ("label small_images_dmae --data-dir photos", USAGE),
        ("label prune labels", USAGE),
        ("label prune labels --to new --temperatures 2", CONFIG),
        ("label check labels --samples 0", CONFIG),
        ("label export labels --to new.npz", CONFIG),
        (f"{TRAIN} --mixup 0.5", DATA),
        (TRAIN.replace("_kd", "_libkd", 1).replace(VIT, ""), DATA),
        (TRAIN.replace("_kd", "_maskedkd", 1), CONFIG),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
    here: Path, command: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(here)
    # The run of another test is in the place.
    assert run(command.replace("runs/stored", "runs/new")) == code
    error = capsys.readouterr().err
    assert error.startswith("vitdistill") and error.count("\n") == 1, error
    assert tree(here) == before


def test_damage_is_named(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    assert run(f"label prune labels/teacher --to {copy} --views 1") == 0
    part = LabelStore.open(copy).part_path(0, 0)
    data = bytearray(part.read_bytes())
    data[17] ^= 1
    part.write_bytes(data)
    for bad in (part, part.parent / "notes.txt"):
        bad.touch()
        capsys.readouterr()
        assert run(f"label verify {copy}") == DATA
        out, error = capsys.readouterr()
        assert bad.name in out and error.count("\n") == 1


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_labelling_over_a_cut_part_does_not_say_done(
    here: Path, tmp_path: Path, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("labels", tmp_path / "labels")
    part = LabelStore.open(tmp_path / "labels/teacher").part_path(1, 0)
    part.write_bytes(part.read_bytes()[:kept])
    assert run(f"{LABEL} --output {tmp_path / 'labels'}") == DATA
    out, error = capsys.readouterr()
    assert "done" not in out and part.name in error and error.count("\n") == 1


def test_what_a_foreign_manifest_says_is_fit_for_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "a\x1b[31m\u202eb\udcff\n\x07"
    folder = tmp_path / "labels" / os.fsdecode(b"\xff\x1b")
    layout = Layout(hidden=((0, 1, 1),))
    manifest = Manifest(
        identity={odd: odd, "list": [odd]},
        layout=layout,
        num_samples=1,
        num_views=1,
        about={"versions": {odd: odd}, "command": odd},
    )
    LabelStore.create(folder, manifest)
    (folder / odd.replace("\n", "")).touch()
    for command in ("info", "status", "verify", "check"):
        main(["label", command, str(folder.parent)])
    out, error = capsys.readouterr()
    assert "a teacher, hidden states" in out and "Traceback" not in error
    assert all(c == "\n" or c.isprintable() for c in out + error)
