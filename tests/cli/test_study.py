"""``vitdistill study``: killed and resumed it comes to the same; it refuses before it runs."""

import contextlib
import io
from pathlib import Path

import pytest
from small_runs import Child, result, until

from tests.cli.home import CONFIG, NETWORK, run, tree, write_images
from vitdistill.report.files import find_runs

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
rows:
  kd: {{recipe: small_images_kd}}
  masked: {{recipe: small_images_maskedkd, set: {{selector.keep_rate: 0.5}}}}
"""
RUNS = ("teacher", *(f"{row}/seed-{s}" for s in (0, 1) for row in ("alone", "kd", "masked")))


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
        until(lambda name=name: (Path("broken") / name / "environment.json").exists())
        child.kill()
        child.wait()
    assert run("study s.yaml --output broken --device cpu") == 0
    assert [str(p.relative_to("broken")) for p in find_runs(["broken"])] == sorted(RUNS)
    for name in RUNS:
        assert result(Path("broken") / name) == result(Path("whole") / name), name


def test_a_study_ends_with_a_report_and_takes_more_seeds(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path("whole/report.html").read_text()
    for words in ("Did it help?", "over 2 pairs of runs", "agrees with it on"):
        assert words in page
    old = {name: result(Path("whole") / name) for name in RUNS}
    assert run("study s.yaml --output whole --device cpu --seeds 0 1 2") == 0
    assert "left for all" in capsys.readouterr().out
    assert (
        len(find_runs(["whole"])) == 10
        and "over 3 pairs of runs" in Path("whole/report.html").read_text()
    )
    assert {name: result(Path("whole") / name) for name in RUNS} == old


def test_before_it_runs_it_tells_the_cost_and_what_is_wrong(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(here)
    assert run("study s.yaml --output new --device cpu --dry-run") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[2:7]] == [
        *(["teacher", "1"], ["alone", "2"], ["kd", "2"], ["masked", "2"], ["together", "7"])
    ]
    for words in (
        "s.yaml --output photos",
        "s.yaml --output whole --set optim.lr=0.5",
        "s.yaml --output new --set selector.keep_rate=0.5",
        "small_images_kd --data-dir photos --output new --set train.batch_size=12",
        "nothing.yaml",
    ):
        assert run(f"study {words} --device cpu") == CONFIG, words
    assert tree(here) == before
