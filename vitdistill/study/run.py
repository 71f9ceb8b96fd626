"""Doing a study: one run after the other, each an ordinary run in a folder of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ConfigError, Give
from ..explain.ahead import Forecast, forecast
from ..explain.measure import time_step
from ..messages import format_count, format_duration, format_table, printable
from ..recipes.convert import to_dict
from ..recipes.yaml import dump_yaml
from ..runs.folder import SUMMED_UP, check_folder, contents
from ..runs.identity import SUMMARY, read_record
from ..runs.train import train
from ..storage.atomic import disk_errors, write_atomic
from ..world import join_world
from .plan import STUDY, Job, Study, in_row, jobs_of, together

Say = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """A study in its folder, as it will be and as far as it is."""

    study: Study
    output: Path

    @cached_property
    def jobs(self) -> list[Job]:
        return jobs_of(self.study)

    @cached_property
    def ahead(self) -> dict[str, Forecast]:
        """Return a run of each row as it will be, whether or not those before it have run."""
        found: dict[str, Forecast] = {}
        for job in self.jobs:
            if job.row not in found:
                with in_row(job.row):
                    found[job.row] = [*forecast(together(self.jobs, job)).values()][-1]
        return found

    def folder(self, job: Job) -> Path:
        return self.output / job.folder

    def seconds(self, job: Job) -> float | None:
        """Return how long a finished run took; None: it is not finished."""
        summary = read_record(self.folder(job) / SUMMARY, SUMMED_UP)
        return None if summary is None else float(summary["seconds"])

    def seconds_left(self, jobs: Sequence[Job]) -> float | None:
        """Estimate these runs by finished ones: of their row, or else by FLOPs; None: no idea."""
        taken = [(job, s) for job in self.jobs if (s := self.seconds(job)) is not None]
        flops = sum(self.ahead[job.row].flops for job, _ in taken)
        if not taken or not flops:
            return None
        pace, left = sum(s for _, s in taken) / flops, 0.0
        for job in jobs:
            alike = [s for other, s in taken if other.row == job.row]
            left += sum(alike) / len(alike) if alike else pace * self.ahead[job.row].flops
        return left


def describe(work: Work, device: str | None = None) -> list[str]:
    """Return a table of what every row will cost; ``device``: also how long, by measured steps."""
    head = ["row", "runs", "FLOPs a run", "all its runs"]
    rows, total, taken = [], 0, 0.0
    for name, ahead in work.ahead.items():
        count = sum(job.row == name for job in work.jobs)
        total += count * ahead.flops
        row = [name, str(count), format_count(ahead.flops), format_count(count * ahead.flops)]
        if device is not None:
            images = ahead.num_images * ahead.recipe.train.epochs
            seconds = time_step(ahead.recipe, ahead.num_classes, device).per_image * images
            taken += count * seconds
            row.append(format_duration(count * seconds))
        rows.append(tuple(row))
    last = ["together", str(len(work.jobs)), "", format_count(total)]
    if device is not None:
        head.append("time")
        last.append(format_duration(taken))
    lines = format_table([tuple(head), *rows, tuple(last)])
    note = "Times are of measured steps: loading, evaluation and start-up are not in them."
    return [*lines, *([note] if device is not None else [])]


def run_study(study: Study, output: Path, say: Say, *, device: str, console: Console) -> None:
    """Do what of a study is not done yet.

    Raises:
        UserError: before anything runs for what can be known to be wrong with any run; as `train`.
        Preempted: it was asked to stop, and goes on from there.
    """
    work = Work(study, output)
    with join_world(device) as world:
        tell = say if world.is_main else lambda text: None
        with world.together():
            _check(work)
        tell("\n".join([*describe(work), ""]))
        if world.is_main:
            _save(work)
        for number, job in enumerate(work.jobs):
            if work.seconds(job) is not None:
                continue
            left = work.seconds_left([j for j in work.jobs[number:] if work.seconds(j) is None])
            about = "" if left is None else f"; about {format_duration(left)} left for all"
            tell(f"[{number + 1}/{len(work.jobs)}] {job.title}{about}")
            with in_row(job.row):
                folder, recipe = work.folder(job), job.resolved(output)
                summary = train(recipe, folder, device=device, console=console)
            tell(f"  {_came_to(summary)}{format_duration(summary['seconds'])}, {folder}")


def _came_to(summary: dict[str, Any]) -> str:
    top1 = (summary["scores"] or {}).get("top1")
    return "" if top1 is None else f"top-1 {top1:.2%}, "


def _check(work: Work) -> None:
    """Raise what is known to be wrong with any run; write nothing."""
    output = work.output
    with disk_errors(output):
        found = contents(output) if output.is_dir() else []
    if found and STUDY not in found:
        what = f"the output {printable(output)} is not empty ({printable(found[0])} is in it) and"
        raise ConfigError(f"{what} holds no study", Give("output"), field="output")
    assert work.ahead  # every row can be built
    for job in work.jobs:
        with in_row(job.row):
            check_folder(work.folder(job), job.resolved(output), "change the study back")


def _save(work: Work) -> None:
    text, path = dump_yaml(to_dict(work.study)).encode(), work.output / STUDY
    if not path.is_file() or path.read_bytes() != text:
        write_atomic(path, text)
