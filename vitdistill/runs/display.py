"""What a run prints: lines that stay and, on a terminal, a bar below them."""

import math
import time
from collections.abc import Callable, Mapping

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..distill.step import UNWEIGHTED
from ..errors import Spell, UserError, tell
from ..messages import format_duration, printable_lines

SHOWN = ("top1", "top5", "nll", "knn_top1", "knn_top5")  # of the scores; all are logged


class Display(Progress):
    """Progress of a run, with a bar if the console is a terminal; not ``enabled``: silent.

    ``spell`` makes the sentences of warnings.
    """

    def __init__(self, console: Console, enabled: bool = True, spell: Spell = str) -> None:
        text = TextColumn("{task.description}")
        columns = SpinnerColumn(), BarColumn(), text, TimeElapsedColumn()
        silent = not (enabled and console.is_terminal)
        self._below = Text()  # Progress renders in its constructor
        super().__init__(*columns, console=console, transient=True, disable=silent)
        self.enabled, self.spell = enabled, spell
        self.steps_per_epoch = 1
        self._bar = self.add_task("", total=None)

    def get_renderable(self) -> RenderableType:
        """Show the last log line below the bar."""
        return Group(super().get_renderable(), self._below)

    def say(self, line: str | UserError) -> None:
        """Print a line that stays; an error is a warning."""
        if self.enabled:
            lines, whole = printable_lines(tell(line, self.spell)), not self.console.is_terminal
            self.console.print(lines, highlight=False, markup=False, soft_wrap=whole)

    def begin(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        """Show a run that goes on after ``step`` of ``total_steps`` steps."""
        self.steps_per_epoch = steps_per_epoch
        self.update(self._bar, total=total_steps, completed=step, description="training")

    def working(self, text: str) -> None:
        """Name what is being done while no steps are taken (evaluating, saving)."""
        self.update(self._bar, description=text)

    def watch(self, text: str, total: int) -> Callable[[], bool]:
        """Start a bar of ``total`` batches; return a ``stop`` that moves it and is never true."""

        def tick() -> bool:
            self.advance(self._bar)
            return False

        self.reset(self._bar, total=total, description=text)
        return tick

    def tick(self, step: int) -> None:
        self.update(self._bar, completed=step, description="training")

    def step(self, step: int, losses: Mapping[str, float], lr: float, speed: "Speed") -> None:
        """Show the state after ``step`` steps; ``losses`` are means since the last call."""
        total = int(self.tasks[0].total or 0)
        shown = [f"{n} {value:.4f}" for n, value in losses.items() if not n.endswith(UNWEIGHTED)]
        terms = "  ".join(shown)
        line = (
            f"step {step}/{total}  epoch {step / self.steps_per_epoch:.2f}  {terms}  lr {lr:.2e} "
            f" {speed.images_per_second:,.0f} images/s  {speed.wait_share:.0%} waiting for data "
            f" {format_duration(speed.seconds_left(total - step))} left"
        )
        if self.disable:
            self.say(line)
        self._below = Text(line, style="dim")

    def evaluation(self, step: int, scores: Mapping[str, float], best: bool) -> None:
        shown = [
            f"{name} {value:.4f}" if name == "nll" else f"{name} {value:.2%}"
            for name, value in scores.items()
            if name in SHOWN
        ]
        note = ["(best so far)"] if best else []
        self.say("  ".join([f"epoch {step / self.steps_per_epoch:g}", "validation", *shown, *note]))


class Speed:
    """Throughput since the last log line, and the time left at the whole session's pace."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._begun: float | None = None
        self._window = 0.0
        self._window_steps = self._steps = 0
        self.images_per_second = math.nan
        self.wait_share = 0.0

    def tick(self) -> None:
        """Count a step; the first one, which warms caches up, only starts the clock."""
        if self._begun is None:
            self._begun = self._window = time.perf_counter()
        else:
            self._steps += 1
            self._window_steps += 1

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training (evaluation, saving)."""
        self._window += seconds

    def read(self, waited: float) -> None:
        """Close the window, in which the loop waited ``waited`` seconds for data."""
        now = time.perf_counter()
        if self._window_steps:
            elapsed = max(now - self._window, 1e-9)
            self.images_per_second = self._window_steps * self.batch_size / elapsed
            self.wait_share = min(waited / elapsed, 1.0)
        self._window, self._window_steps = now, 0

    def seconds_left(self, steps: int) -> float:
        """Estimate the time of ``steps`` more, evaluations included; NaN before the second step."""
        if self._begun is None or self._steps == 0:
            return math.nan
        return steps * (time.perf_counter() - self._begun) / self._steps
