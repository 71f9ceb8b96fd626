"""What a person sees of a run: a live panel on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..messages import format_duration

SHOWN = ("top1", "top5", "nll", "agreement", "knn_top1", "knn_top5")
"""The scores of an evaluation that are shown; all of them are logged."""


class Display:
    """Progress of one run.

    Args:
        console: where to; a live panel if it is a terminal.
        total_steps: of the whole run.
        steps_per_epoch: to name the epoch.
        enabled: False on processes that do not talk.
    """

    def __init__(
        self, console: Console, total_steps: int, steps_per_epoch: int, enabled: bool = True
    ) -> None:
        self.console = console
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.enabled = enabled
        self._live = (
            Live(console=console, refresh_per_second=4, transient=True)
            if enabled and console.is_terminal
            else None
        )
        self._scores: dict[str, float] = {}
        self._panel: Group | None = None

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
            self.working("training; the first losses come with the first log line")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.enabled:
            self.console.print(escape(text), highlight=False, soft_wrap=True)

    def step(self, step: int, losses: Mapping[str, float], lr: float, speed: "Speed") -> None:
        """Show the training state after ``step`` steps; ``losses`` are means since the last
        call.
        """
        if not self.enabled:
            return
        epoch = step / self.steps_per_epoch
        rate = f"{speed.images_per_second:,.0f} images/s"
        left = f"{format_duration(speed.seconds_left(self.total_steps - step))} left"
        waiting = f"{speed.wait_share:.0%} waiting for data"
        if self._live is None:
            terms = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            self.say(
                f"step {step}/{self.total_steps}  epoch {epoch:.2f}  {terms}  lr {lr:.2e}  {rate} "
                f" {waiting}  {left}"
            )
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            "step",
            f"{step} of {self.total_steps}, epoch {epoch:.2f} of"
            f" {self.total_steps / self.steps_per_epoch:.0f}",
        )
        grid.add_row(
            "losses", "   ".join(f"{name} [bold]{value:.4f}[/]" for name, value in losses.items())
        )
        grid.add_row("learning rate", f"{lr:.2e}")
        grid.add_row("speed", f"{rate}, {waiting}")
        grid.add_row("left", format_duration(speed.seconds_left(self.total_steps - step)))
        if self._scores:
            grid.add_row(
                "validation",
                "   ".join(
                    f"{name} [bold]{_score(name, value)}[/]" for name, value in self._scores.items()
                ),
            )
        bar = ProgressBar(total=self.total_steps, completed=step, width=60)
        self._panel = Group(bar, Text(), grid)
        self._live.update(self._panel)

    def evaluation(self, step: int, scores: Mapping[str, float], best: bool) -> None:
        """Show the result of an evaluation after ``step`` steps."""
        self._scores = {name: value for name, value in scores.items() if name in SHOWN}
        text = "  ".join(f"{name} {_score(name, value)}" for name, value in self._scores.items())
        self.say(
            f"epoch {step / self.steps_per_epoch:g}  validation "
            f" {text}{'  (best so far)' if best else ''}"
        )

    def working(self, text: str) -> None:
        """What is being done while no steps are taken (evaluation, saving), under the panel;
        nothing: steps are taken again.
        """
        if self._live is not None:
            shown = [self._panel] if self._panel is not None else []
            self._live.update(Group(*shown, *([Text(text, style="dim")] if text else [])))


def _score(name: str, value: float) -> str:
    return f"{value:.4f}" if name in ("nll", "kl") else f"{value:.2%}"


class Speed:
    """Throughput since the last log line, and an estimate of the time left from the whole
    session's.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._begun: float | None = None
        self._window = 0.0
        self._window_steps = 0
        self._steps = 0
        self.images_per_second = math.nan
        self.wait_share = 0.0

    def tick(self) -> None:
        """After every step; the first one, which warms caches up, is not timed."""
        now = time.perf_counter()
        if self._begun is None:
            self._begun = self._window = now
            return
        self._steps += 1
        self._window_steps += 1

    def pause(self, seconds: float) -> None:
        """Time that was not training (evaluation, saving)."""
        self._window += seconds

    def read(self, waited: float) -> None:
        """Close the window: ``waited`` seconds of it the loop stood still for data."""
        now = time.perf_counter()
        if self._window_steps:
            elapsed = max(now - self._window, 1e-9)
            self.images_per_second = self._window_steps * self.batch_size / elapsed
            self.wait_share = min(waited / elapsed, 1.0)
        self._window, self._window_steps = now, 0

    def seconds_left(self, steps: int) -> float:
        """For ``steps`` further steps at the session's mean pace, evaluations included."""
        if self._begun is None or self._steps == 0:
            return math.nan
        return steps * (time.perf_counter() - self._begun) / self._steps
