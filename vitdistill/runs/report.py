"""What a run writes of itself, on the main process: logs, exports, pictures and TensorBoard."""

import math
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from ..storage.atomic import write_atomic
from ..weights.export import export_timm
from .display import Speed
from .folder import METRICS, PICTURES, TIMING, RunFolder
from .pictures import draw_sheet, png
from .prepare import Prepared


class Report:
    """Writes into the folder of a run that goes on after ``step``."""

    def __init__(self, prepared: Prepared, folder: RunFolder, step: int) -> None:
        self.prepared, self.folder = prepared, folder
        self.steps_per_epoch = prepared.loaders.train.steps_per_epoch
        self.board: Any = None
        with suppress(ImportError):  # an extra; metrics.jsonl holds everything
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step)
        self._proved = False  # an export of this network, by loading it

    def close(self) -> None:
        """Close TensorBoard's files."""
        if self.board is not None:
            self.board.close()

    def training(self, step: int, values: dict[str, float], speed: Speed) -> None:
        """Log what was computed since the last line, and how fast it went."""
        self._write("train", step, values)
        if math.isfinite(speed.images_per_second):
            pace = {
                "images_per_second": round(speed.images_per_second, 1),
                "wait_share": round(speed.wait_share, 4),
            }
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
        if rows:
            sheet = draw_sheet(rows, prepared.networks.spec)
            write_atomic(self.folder.path / PICTURES, png(sheet))
            if self.board is not None:
                self.board.add_image("pictures", np.array(sheet), step, dataformats="HWC")

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        at = {"kind": kind, "step": step, "epoch": step / self.steps_per_epoch}
        self.folder.log(METRICS, {**at, **values})
        self._show("validation" if kind == "eval" else kind, step, values)

    def _show(self, group: str, step: int, values: dict[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, step)
