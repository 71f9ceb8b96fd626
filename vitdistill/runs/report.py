"""What a run's main process writes: logs, exports and pictures."""

import json
import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import Say
from ..recipes.config import Recipe
from ..recipes.convert import flatten
from ..recipes.stages import STAGES
from ..storage.atomic import write_atomic
from ..weights.export import export_timm
from .display import Speed
from .folder import FIRST_PICTURES, METRICS, PICTURES, TIMING, RunFolder
from .identity import origin_of_config, read_record
from .loggers import LoggedRun, Loggers
from .pictures import draw_sheet, png
from .prepare import Prepared
from .stored import open_labels

LOG_ID = "log_id.json"


def name_for_loggers(recipe: Recipe, folder: Path) -> str:
    """Return a run's name; a stage's, which many recipes share, after that of its folder."""
    above = folder.absolute().parent
    return f"{above.name}-{recipe.name}" if (above / STAGES).is_file() else recipe.name


class Report:
    """Writes into the folder of a run that goes on after ``step``."""

    def __init__(self, prepared: Prepared, folder: RunFolder, step: int, say: Say) -> None:
        self.prepared, self.folder = prepared, folder
        self.steps_per_epoch = prepared.loaders.train.steps_per_epoch
        # The id by which loggers know the run.
        known = read_record(folder.path / LOG_ID, ("id",)) or {"id": uuid.uuid4().hex[:12]}
        write_atomic(folder.path / LOG_ID, json.dumps(known).encode())
        recipe, name = prepared.recipe, name_for_loggers(prepared.recipe, folder.path)
        run = LoggedRun(name, folder.path, str(known["id"]), step, flatten(recipe))
        self.loggers = Loggers(recipe.train.log_to, run, say)
        self._proved = False  # whether loading an export proved it
        self._origin = lineage(prepared)

    def training(self, step: int, values: dict[str, float], speed: Speed) -> None:
        """Log what was computed since the last line, and how fast it went."""
        self._write("train", step, values)
        rate, share = round(speed.images_per_second, 1), round(speed.wait_share, 4)
        if math.isfinite(rate):
            pace = {"images_per_second": rate, "wait_share": share}
            self.folder.log(TIMING, {"step": step, **pace})
            self._show("speed", step, pace)

    def evaluation(
        self, model: nn.Module, step: int, scores: dict[str, float] | None, best: bool
    ) -> None:
        """Export the weights that were evaluated, draw pictures and log the scores."""
        networks = self.prepared.networks
        architecture, args = networks.architecture
        for name in ("last", "best") if best else ("last",):
            export_timm(
                model,
                self.folder.path / name,
                architecture=architecture,
                model_args=args,
                classes=networks.classes or None,
                input_spec=networks.spec,
                origin=self._origin,
                prove=not self._proved,
            )
            self._proved = True
        self._draw(step)
        if scores is not None:
            self._write("eval", step, scores)

    @torch.no_grad()
    def _draw(self, step: int) -> None:
        """Draw what the objectives have to show of a few images, and what a selector leaves.

        The student is the one that decoders are trained with, not its average.
        """
        prepared, distillation = self.prepared, self.prepared.distillation
        (batch,) = prepared.loaders.shown
        batch.seed = prepared.recipe.train.seed
        distillation.eval()
        with prepared.world.autocast(prepared.amp_dtype):
            rows = distillation.pictures(batch, prepared.teachers)
        if not rows:
            return
        sheet, first = draw_sheet(rows, prepared.networks.spec), self.folder.path / FIRST_PICTURES
        write_atomic(self.folder.path / PICTURES, png(sheet))
        if not first.is_file():
            write_atomic(first, png(sheet))
        self.loggers.picture("pictures", np.array(sheet), step)

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        at = {"kind": kind, "step": step, "epoch": step / self.steps_per_epoch}
        self.folder.log(METRICS, {**at, **values})
        self._show("validation" if kind == "eval" else kind, step, values)

    def _show(self, group: str, step: int, values: dict[str, float]) -> None:
        self.loggers.log({f"{group}/{name}": value for name, value in values.items()}, step)


def lineage(prepared: Prepared) -> dict[str, Any]:
    """Return what the student's weights come from: what it began with, and its teachers."""
    recipe, stores = prepared.recipe, open_labels(prepared.recipe)
    began, teachers = origin_of_config(recipe.student), {}
    for name, config in recipe.teachers.items():
        if name in stores:
            manifest = stores[name].manifest
            network = {"model": manifest.about["network"]["architecture"]}
            known = manifest.about.get("origin") or network
            digest = manifest.identity["teacher.weights"]
        else:
            known = origin_of_config(config) or {"model": Path(config.model).name}
            digest = prepared.networks.digests[name]
        teachers[name] = {**known, "network_sha256": digest}
    return ({} if began is None else {"began_from": began}) | {"teachers": teachers}
