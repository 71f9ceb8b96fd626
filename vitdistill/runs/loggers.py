"""Where a run's numbers go besides its log: TensorBoard, W&B, Trackio, MLflow, or a user's own.

A logger is a class that is made with a `LoggedRun` and has the methods of `Logger`. `LOGGERS` names
ours, and the entry points of the group ``vitdistill.loggers`` name others. Each client is imported
when it is asked for. One that fails never stops a run.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, Say
from ..messages import first_line, suggest

PROJECT = "vitdistill"
AUTO = ("auto",)
"""TensorBoard, if it is installed."""

LOGGERS: dict[str, str] = {
    "tensorboard": "vitdistill.runs.loggers:TensorBoard",
    "wandb": "vitdistill.runs.loggers:WandB",
    "trackio": "vitdistill.runs.loggers:Trackio",
    "mlflow": "vitdistill.runs.loggers:MLflow",
}
"""Each imports the package of its name."""


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of its run.

    Args:
        name: of the run's folder; for a stage, after that of the folder of stages.
        folder: where the client may keep its files.
        id: of the run, by which the client continues it after a resume.
        step: steps taken before; later ones that were logged are taken again.
        settings: the recipe, flat.
    """

    name: str
    folder: Path
    id: str
    step: int
    settings: Mapping[str, Any]


class Logger(Protocol):
    """Takes numbers and pictures after so many steps."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take values by name, such as ``train/kd``."""

    def picture(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        """Take an image (H, W, 3)."""

    def close(self) -> None:
        """Write what is left; the run may be resumed later."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a logger that does not exist, or whose package is not installed."""
    known = _known()
    for name in () if tuple(names) == AUTO else names:
        if name not in known:
            fix = suggest(name, [*known, *AUTO])
            raise ConfigError(f"there is no logger {name!r}", fix, field="train.log_to")
        if name in LOGGERS and find_spec(name) is None:
            what = f"the logger {name} needs the package of that name"
            raise ConfigError(what, f"pip install {name}", field="train.log_to")


def _known() -> dict[str, str]:
    return {**{p.name: p.value for p in entry_points(group="vitdistill.loggers")}, **LOGGERS}


class Loggers:
    """The loggers of a run; one that fails is left out from then on, and that is said once."""

    def __init__(self, names: Sequence[str], run: LoggedRun, say: Say) -> None:
        if tuple(names) == AUTO:
            names = ["tensorboard"] if find_spec("tensorboard") else []
        self._open: dict[str, Logger] = {}
        self._say, known = say, _known()
        for name in names:
            with self._leave_out_if_it_fails(name):
                self._open[name] = resolve_name(known[name])(run)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tell_each(lambda logger: logger.log(values, step))

    def picture(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        self._tell_each(lambda logger: logger.picture(name, pixels, step))

    def close(self) -> None:
        self._tell_each(lambda logger: logger.close())

    def _tell_each(self, tell: Callable[[Logger], None]) -> None:
        for name, logger in [*self._open.items()]:
            with self._leave_out_if_it_fails(name):
                tell(logger)

    @contextmanager
    def _leave_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a client raises: of its network, its disk, its login
            self._open.pop(name, None)
            self._say(f"warning: the logger {name} failed and is left out ({first_line(error)})")


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Drop what it has of steps from this one on.
        first = run.step + 1
        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=first)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases, as its own environment variables say (WANDB_PROJECT, WANDB_MODE, ...)."""

    def __init__(self, run: LoggedRun) -> None:
        self._client = import_module("wandb")
        self._run = self._client.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        self._run.log({name: self._client.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(WandB):
    """Trackio, on this machine or where its environment variables say; used like W&B."""

    def __init__(self, run: LoggedRun) -> None:
        self._client = import_module("trackio")
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = f"{run.name}-{run.id}"  # by which it goes on with a run
        self._run = self._client.init(
            project, name=name, resume="allow", config=dict(run.settings), embed=False
        )


class MLflow:
    """MLflow, where MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say."""

    def __init__(self, run: LoggedRun) -> None:
        mlflow = import_module("mlflow")
        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        runs = self._client.search_runs([place], f"tags.`vitdistill.id` = '{run.id}'")
        if not runs:
            tags = {"vitdistill.id": run.id}
            runs = [self._client.create_run(place, run_name=run.name, tags=tags)]
            for key, value in run.settings.items():
                self._client.log_param(runs[0].info.run_id, key, str(value)[:500])
        self._id: str = runs[0].info.run_id
        self._client.update_run(self._id, status="RUNNING")

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metric = self._entities.Metric
        metrics = [metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        self._client.log_image(self._id, pixels, key=name, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)
