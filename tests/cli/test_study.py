"""``vitdistill study``: killed and resumed it comes to the same; it refuses before it runs."""

import contextlib
import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import Child, result, until

from tests.cli.home import CONFIG, NETWORK, run, tree, write_images
from vitdistill.report.document import Table
from vitdistill.report.files import find_runs
from vitdistill.report.page import make_report

pytestmark = pytest.mark.whole

TEXT = f"""
seeds: [0, 1]
set:
  data.dir: photos
  data.workers: 0
  data.augment.aa: null
  train.epochs: 2
  train.batch_size: 12
  train.log_every: 1
  train.save_every: 2
  train.amp_dtype: float32
  optim.warmup_epochs: 0
  student.model_args: {NETWORK}
shared:
  teacher: {{recipe: small_images_alone}}
  labels: {{label: small_images_kd, options: {{part_size: 20}}}}
rows:
  kd: {{recipe: small_images_kd}}
  masked: {{recipe: small_images_maskedkd, set: {{selector.keep_rate: 0.5}}}}
  stored: {{recipe: small_images_kd, set: {{teachers.teacher.labels: "stage:labels"}}}}
"""
ROWS = ("alone", "kd", "masked", "stored")
RUNS = ("teacher", *(f"{row}/seed-{s}" for s in (0, 1) for row in ROWS))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a study's file, and the study done without a break."""
    root = tmp_path_factory.mktemp("home")
    write_images(root / "photos")
    (root / "s.yaml").write_text(TEXT)
    with contextlib.chdir(root):
        assert run("study s.yaml --output whole --device cpu") == 0
    return root


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def test_a_study_that_is_killed_five_times_comes_to_the_same(here: Path) -> None:
    def work() -> int:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return run("study s.yaml --output broken --device cpu")

    for name in RUNS[1:6]:
        child = Child(work)
        until(lambda name=name: (Path("broken") / name / "environment.json").exists(), 300)
        child.kill()
        child.wait()
    assert run("study s.yaml --output broken --device cpu") == 0
    assert [str(p.relative_to("broken")) for p in find_runs(["broken"])] == sorted(RUNS)
    for name in RUNS:
        assert result(Path("broken") / name) == result(Path("whole") / name), name
    assert told("broken") == told("whole")


def told(folder: str) -> dict[str, list[object]]:
    """Return what a report says but for times and places."""
    found: dict[str, list[object]] = {}
    for title, blocks in make_report([folder]).sections:
        for block in blocks if title != "Where they ran" else ():
            if isinstance(block, Table):
                out = {"time", "images/s", "predictions/s"}
                kept = [i for i, head in enumerate(block.head) if head not in out]
                block = replace(block, rows=[[row[i] for i in kept] for row in block.rows])
            found.setdefault(title, []).append(block)
    return found


def test_two_processes_share_a_study(here: Path) -> None:
    child = Child(lambda: run("study s.yaml --output shared --device cpu"))
    assert run("study s.yaml --output shared --device cpu") == 0
    assert child.wait(300) == 0
    for name in RUNS:
        assert result(Path("shared") / name) == result(Path("whole") / name), name
    shutil.rmtree("shared/labels")  # nothing needs them any more
    for row in ROWS:
        Path("shared", row, "seed-0", "answers.json").unlink()
    assert run("study s.yaml --output shared --device cpu") == 0
    assert Path("shared/stored/seed-0/answers.json").is_file()


def test_a_row_may_have_stages(here: Path) -> None:
    sets = f"--data-dir photos --seeds 0 --device cpu --set pretrain.student.model_args={NETWORK!r}"
    for field in (
        "train.epochs=2",
        "train.batch_size=12",
        "optim.warmup_epochs=0",
    ):
        sets += f" --set {field}"
    assert run(f"study small_images_mae_finetuned --output two {sets}") == 0
    folders = [path.name for path in find_runs(["two"])]
    assert len(folders) == 2 and sorted(folders)[0].endswith("-finetune")
    before = tree(Path("two"))
    assert run(f"study small_images_mae_finetuned --output two {sets}") == 0
    assert tree(Path("two")) == before


def test_a_study_ends_with_a_report_and_takes_more_seeds(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path("whole/report.html").read_text()
    for words in ("Did it help?", "± seeds", "agrees with it on"):
        assert words in page
    old = {name: result(Path("whole") / name) for name in RUNS}
    assert run("study s.yaml --output whole --device cpu --seeds 0 1 2") == 0
    assert "left for all" in capsys.readouterr().out
    assert len(find_runs(["whole"])) == 13
    assert "13 runs in 5 rows" in Path("whole/report.html").read_text()
    assert {name: result(Path("whole") / name) for name in RUNS} == old


def test_before_it_runs_it_tells_the_cost_and_what_is_wrong(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(here)
    assert run("study s.yaml --output new --device cpu --dry-run") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {line[0]: int(line[1]) for line in lines[2:9]}
    assert counts == {"teacher": 1, "labels": 1, **dict.fromkeys(ROWS, 2), "together": 10}
    for words in (
        "s.yaml --output photos",
        "s.yaml --output whole --set optim.lr=0.5",
        "s.yaml --output new --set selector.keep_rate=0.5",
        "small_images_kd --data-dir photos --output new --set train.batch_size=12",
        "nothing.yaml",
    ):
        for dry in ("", "--dry-run"):
            assert run(f"study {words} --device cpu {dry}") == CONFIG, words
    assert tree(here) == before
