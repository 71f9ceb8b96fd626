"""A run's numbers in other places: the same as in its log, and never in its way."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import ranks, records, run, unfinished

from vitdistill.errors import ConfigError
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.fingerprint import fingerprint
from vitdistill.runs.loggers import LoggedRun, Loggers, check_loggers
from vitdistill.runs.report import name_for_loggers

pytestmark = pytest.mark.whole

MINE = """
import json, os

class Mine:
    def __init__(self, run):
        self.path = run.folder / "mine.jsonl"
        self.write({"id": run.id, "step": run.step, "epochs": run.settings["train.epochs"]})

    def write(self, record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + chr(10))

    def log(self, values, step):
        self.write({"step": step, **values})
        if os.environ.get("MINE_BREAKS"):
            raise OSError("no room")

    def picture(self, name, pixels, step):
        self.write({"step": step, name: pixels.shape})

    def close(self):
        self.write({"closed": True})
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A package with a logger of its own."""
    about = tmp_path / "site" / "mine-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vitdistill.loggers]\nmine = mine_logger:Mine\n")
    (about.parent / "mine_logger.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(about.parent))
    return {"train.log_to": ["mine"], "train.log_every": 1}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "mine.jsonl").read_text().splitlines()]


def test_a_logger_of_ones_own_gets_what_the_log_gets(taught, mine, tmp_path):
    recipe = taught(**mine)
    run(recipe, tmp_path / "run")
    first, *logged = lines(tmp_path / "run")
    assert first["step"] == 0 and first["epochs"] == 3 and logged[-1] == {"closed": True}
    for kind, group in (("train", "train"), ("eval", "validation")):
        expected = [
            {"step": it["step"]} | {f"{group}/{k}": v for k, v in it.items()}
            for it in records(tmp_path / "run", kind)
        ]
        keys = {f"{group}/{key}" for key in ("kind", "step", "epoch")}
        expected = [{k: v for k, v in it.items() if k not in keys} for it in expected]
        assert [it for it in logged if any(k.startswith(group) for k in it)] == expected
    assert any("pictures" in it for it in logged)
    run(recipe, unfinished(tmp_path / "run", tmp_path / "again", 4))
    _, *rest = lines(tmp_path / "again")
    (begun,) = [it for it in rest if "id" in it]
    assert begun["id"] == first["id"] and begun["step"] == 4


def test_one_that_fails_is_said_once_and_stops_nothing(taught, mine, tmp_path, monkeypatch):
    monkeypatch.setenv("MINE_BREAKS", "1")
    said: list[str] = []
    assert run(taught(**mine), tmp_path / "run", said)["steps"] == 9
    assert sum("no room" in line for line in said) == 1
    assert len(lines(tmp_path / "run")) == 2


def test_only_the_main_process_logs(taught, mine, tmp_path):
    recipe = taught(**mine)
    ranks(2, lambda rank: run(recipe, tmp_path / "run")["steps"])
    assert sum("id" in it for it in lines(tmp_path / "run")) == 1


def test_what_cannot_log_is_refused_before_anything_is_written(taught, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for name in ("wandb", "wandbb"):
        with pytest.raises(ConfigError) as refused:
            run(taught(**{"train.log_to": [name]}), tmp_path / "run")
        assert refused.value.field == "train.log_to"
    assert not (tmp_path / "run").exists()
    check_loggers(["auto"])


def test_where_a_run_logs_is_no_part_of_what_it_is(taught):
    assert fingerprint(taught(**{"train.log_to": []})) == fingerprint(taught())


# -- through the clients --------------------------------------------------------------------------


def log_twice(name: str, folder: Path) -> None:
    """Log as a run and its continuation do."""
    import numpy as np

    said: list[str] = []
    for step in (1, 2):
        run = LoggedRun("run", folder, "0123456789ab", step - 1, {"train.epochs": 3})
        loggers = Loggers([name], run, said.append)
        loggers.log({"train/kd": step / 2, "train/lr": 0.1}, step)
        loggers.log({"validation/top1": 0.5}, step)
        loggers.picture("pictures", np.zeros((4, 6, 3), np.uint8), step)
        loggers.close()
    assert said == []


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_twice("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(it.step, it.value) for it in events.Scalars("train/kd")] == [(1, 0.5), (2, 1.0)]


@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    log_twice("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("vitdistill").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["train.epochs"] == "3"
    history = client.get_metric_history(found.info.run_id, "train/kd")
    assert [(it.step, it.value) for it in history] == [(1, 0.5), (2, 1.0)]


@pytest.mark.filterwarnings("ignore")
def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for key, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    log_twice("wandb", tmp_path)
    files = [*(tmp_path / "wandb").glob("offline-run-*/run-0123456789ab.wandb")]
    assert files and all(b"train/kd" in file.read_bytes() for file in files)


@pytest.mark.filterwarnings("ignore")
def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    log_twice("trackio", tmp_path)
    (found,) = trackio.Api().runs("vitdistill")
    assert found.name == "run-0123456789ab"


def test_a_stage_is_named_after_the_folder_of_its_stages(tmp_path: Path) -> None:
    recipe = Recipe(name="pretrain")
    assert name_for_loggers(recipe, tmp_path / "mine" / "pretrain") == "pretrain"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stages.yaml").write_text("")
    assert name_for_loggers(recipe, tmp_path / "mine" / "pretrain") == "mine-pretrain"
