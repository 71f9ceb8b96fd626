"""``vitdistill report``: from real runs to one file, and nothing else is written."""

import contextlib
import json
from pathlib import Path

import pytest

from tests.cli.home import CONFIG, SHORT, USAGE, make_home, run, tree
from vitdistill.report.files import find_runs, read_run
from vitdistill.report.groups import group_runs

pytestmark = pytest.mark.whole

TAUGHT = f"{SHORT} --teacher-model runs/teacher/last"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student of it, and one of its stored labels."""
    root = make_home(tmp_path_factory.mktemp("home"))
    with contextlib.chdir(root):
        assert run(f"train small_images_maskedkd --output runs/live {TAUGHT}") == 0
        assert run(f"label small_images_kd --output labels {TAUGHT}") == 0
        assert run(f"train small_images_kd --output runs/stored --labels labels {SHORT}") == 0
    return root


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def test_a_report_says_what_eval_says_and_counts_labels_and_teachers(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(here)
    assert run("report runs --output page.html") == 0
    assert {*tree(here)} - {*before} == {"page.html"}
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 < said.err.count("vitdistill: ")
    # Of the network behind stored labels all is known that is known of one that runs.
    proved = [read_run(Path("runs", name)).top1_of("teacher") for name in ("live", "stored")]
    assert proved[0] == proved[1] and proved[0][1] == 60
    assert run("report runs --output notes.md --ask --device cpu") == 0
    left = {
        "page.html",
        "notes.md",
        *(f"runs/{n}/answers.json" for n in ("live", "stored", "teacher")),
    }
    assert {*tree(here)} - {*before} == left
    assert all(tree(here)[name] == digest for name, digest in before.items())
    assert "| agrees with it on |" in Path("notes.md").read_text()
    times = {p: p.stat().st_mtime_ns for p in here.rglob("answers.json")}
    assert run("report runs --output notes.md --ask --device cpu") == 0
    assert {p: p.stat().st_mtime_ns for p in here.rglob("answers.json")} == times, "asked once"

    runs = {path.name: read_run(path) for path in find_runs(["runs"])}
    for name in ("live", "stored"):
        capsys.readouterr()
        assert (
            run(
                f"eval runs/{name}/last --teacher-model runs/teacher/last --data-dir photos"
                " --device cpu --json"
            )
            == 0
        )
        said, kept = json.loads(capsys.readouterr().out), runs[name].scores
        assert kept["agreement.teacher"] == said["agreement"]
        assert kept["kl.teacher"] == pytest.approx(said["kl"], rel=1e-6)
        assert kept["top1"] == said["top1"]
        answers = runs[name].answers
        assert answers is not None and answers.right.mean() == said["top1"]
        assert (answers.teachers["teacher"] == answers.student).mean() == said["agreement"]

    paid = {group.runs[0].path.name: group.paid[0] for group in group_runs([*runs.values()])}
    live, stored, teacher = paid["live"], paid["stored"], paid["teacher"]
    assert teacher.own and live.own and stored.own
    assert live.labels == 0 and live.total == live.own + teacher.own
    # Two views of 36 images by the teacher: its forward pass is its prediction.
    assert stored.labels == 2 * 36 * (teacher.prediction or 0) > 0
    assert stored.teachers == 0 and stored.total == stored.own + stored.labels + teacher.own


def test_what_cannot_be_reported_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    assert run("report runs --device cpu") == USAGE
    assert run("report photos") == CONFIG
    assert run("report nowhere") == CONFIG
    assert tree(here) == before


def test_without_its_teacher_a_student_is_asked_alone(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("runs/teacher").rename("gone")
    try:
        Path("runs/live/answers.json").unlink(missing_ok=True)
        assert run("report runs/live --output notes.md --ask --device cpu") == 0
        assert "teacher cannot be asked" in capsys.readouterr().err
        answers = read_run(Path("runs/live")).answers
        assert answers is not None and not answers.teachers
    finally:
        Path("gone").rename("runs/teacher")
        Path("runs/live/answers.json").unlink()
