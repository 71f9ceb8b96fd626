"""Doing a study: one run after the other, each an ordinary run in a folder of its own.

Several processes may do the same study at once: each does what no other one has begun.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from rich.console import Console

from ..distill.plan import make_plan
from ..errors import ConfigError, Give, Say
from ..explain.ahead import Forecast, Known, forecast
from ..explain.measure import time_step
from ..labels.store import LabelStore
from ..messages import format_count, format_duration, format_table
from ..recipes.config import Recipe
from ..recipes.convert import from_dict, to_dict
from ..recipes.fingerprint import differences
from ..recipes.stages import Stages
from ..recipes.yaml import dump_yaml
from ..runs.folder import SUMMED_UP, check_folder, contents, saved_recipe
from ..runs.identity import SUMMARY, read_record
from ..runs.label import foresee_layout, label
from ..runs.stages import resolved, train_stages
from ..runs.stored import with_views_of_labels
from ..runs.train import train
from ..storage.atomic import disk_errors, write_atomic
from ..storage.lock import LOCK, InUse, try_lock
from ..storage.manifest import MANIFEST
from ..world import join_world
from .plan import (
    STUDY,
    Job,
    Study,
    in_row,
    jobs_of,
    label_sources,
    resolve,
    together,
    writer,
)

WAIT = 5.0  # seconds between two looks at what other processes do


@dataclass(frozen=True)
class Work:
    """A study in its folder: what it will do, and how far it is."""

    study: Study
    output: Path

    @cached_property
    def jobs(self) -> list[Job]:
        return jobs_of(self.study)

    @cached_property
    def ahead(self) -> dict[str, list[tuple[Forecast, int]]]:
        """Return forecasts of each row's runs, and their FLOPs, whether or not those before them
        have run.
        """
        found: dict[str, list[tuple[Forecast, int]]] = {}
        known = Known()
        for job in self.jobs:
            if job.row not in found:
                with in_row(job.row):
                    ahead = forecast(together(self.jobs, job), known)
                    runs = [*ahead.values()][-len(job.parts) :]
                    if "/" not in job.folder:
                        known.stages[job.row] = runs[-1]
                    flops = map(partial(_flops, job), job.parts.values(), runs)
                    found[job.row] = [*zip(runs, flops, strict=True)]
        return found

    def flops(self, job: Job) -> int:
        return sum(flops for _, flops in self.ahead[job.row])

    def recipe(self, job: Job) -> Recipe | Stages:
        return resolve(self.jobs, job, self.output)

    def runs(self, job: Job) -> dict[Path, Recipe]:
        """Return the folders of a job's runs, and what is run in each; {} for stored labels."""
        folder, recipe = self.output / job.folder, self.recipe(job)
        if isinstance(recipe, Stages):
            stages = recipe.stages.items()
            return {folder / s.name: resolved(recipe, key, folder) for key, s in stages}
        return {folder: recipe} if job.label is None else {}

    def seconds(self, job: Job) -> float | None:
        """Return how long a finished run took; None: it is not finished."""
        found = [read_record(folder / SUMMARY, SUMMED_UP) for folder in self.runs(job)]
        return sum(float(s["seconds"]) for s in found if s) if all(found) and found else None

    def done(self, job: Job) -> bool:
        """Whether a run is finished, or every label is written."""
        if job.label is None:
            return self.seconds(job) is not None
        stores = self.stores(job)
        states = [store.status() for store in stores.values()]
        wanted = job.recipe.teachers
        return stores.keys() == wanted.keys() and all(s.sealed == s.parts for s in states)

    def stores(self, job: Job) -> dict[str, LabelStore]:
        """Open the stored labels of a job that are there, by the teacher's name."""
        files = sorted((self.output / job.folder).glob(f"*/{MANIFEST}"))
        return {file.parent.name: LabelStore.open(file.parent) for file in files}

    def pending(self) -> list[Job]:
        """Return what is left to do, in order: the runs, and whatever is shared just before the
        first that needs it.
        """
        shared = {job.row: job for job in self.jobs if "/" not in job.folder}
        found: list[Job] = []

        def add(job: Job) -> None:
            if job not in found and not self.done(job):
                for name in (name for name in shared if name in job.needs):
                    add(shared[name])
                found.append(job)

        for job in self.jobs:
            if job.row not in shared:
                add(job)
        return found

    def seconds_left(self, jobs: Sequence[Job]) -> float | None:
        """Estimate these runs from finished ones: of their row, else by FLOPs; None: unknown."""
        taken = [(job, s) for job in self.jobs if (s := self.seconds(job)) is not None]
        flops = sum(self.flops(job) for job, _ in taken)
        if not taken or not flops:
            return None
        pace, left = sum(s for _, s in taken) / flops, 0.0
        for job in jobs:
            alike = [s for other, s in taken if other.row == job.row]
            left += sum(alike) / len(alike) if alike else pace * self.flops(job)
        return left


def _flops(job: Job, recipe: Recipe, ahead: Forecast) -> int:
    """Return the FLOPs of a run, or of its labels; in the forecast all its teachers run."""
    teachers, images = ahead.cost.teachers, ahead.num_images
    if job.label is not None:
        return sum(teachers.values()) * images * recipe.num_views
    stored = {path.split(".")[1] for path in label_sources(recipe)}
    step = ahead.cost.step - sum(teachers.get(name, 0) for name in stored)
    return step * images * recipe.train.epochs


def describe(work: Work, device: str | None = None) -> list[str]:
    """Return a table of what every row will cost; ``device``: also how long, by measured steps."""
    head = ["row", "runs", "FLOPs a run", "all its runs"]
    rows, total, taken = [], 0, 0.0
    for name, runs in work.ahead.items():
        count = sum(job.row == name for job in work.jobs)
        flops = sum(flops for _, flops in runs)
        total += count * flops
        row = [name, str(count), format_count(flops), format_count(count * flops)]
        if device is not None:
            seconds = 0.0
            for ahead, own in runs:
                measured = time_step(ahead, device).per_image
                seconds += measured * own / ahead.cost.step
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
    """Do what in a study is neither done nor being done by another process.

    Raises:
        UserError: as `train`; before anything runs for what is known to be wrong with any run.
        Preempted: it was asked to stop, and goes on from there.
    """
    work = Work(study, output)
    with join_world(device) as world:
        tell = say if world.is_main else lambda text: None
        with world.together():
            check(work)
        tell("\n".join([*describe(work), ""]))
        if world.is_main:
            _save(work)
        waited = False
        while jobs := world.from_main(work.pending):
            waiting = {job.row for job in jobs}
            for job in jobs:
                if not job.needs & waiting and not world.from_main(partial(_is_busy, work, job)):
                    do(work, job, jobs, tell, device, console)
                    world.gather(None)  # labels are written without meeting
                    break
            else:
                if not waited:
                    tell(f"other processes do the last {len(jobs)} of {len(work.jobs)}")
                waited = True
                time.sleep(WAIT)


def _is_busy(work: Work, job: Job) -> bool:
    """Whether another process does this; labels are written by any number of them together."""
    for lock in (folder / LOCK for folder in work.runs(job)):
        if lock.exists():
            held = try_lock(lock)
            if held is None:
                return True
            held.release()
    return False


def do(
    work: Work, job: Job, pending: Sequence[Job], tell: Say, device: str, console: Console
) -> None:
    """Do one run, or its labels, and say what came of it; ``pending``: all that is left."""
    folder, recipe = work.output / job.folder, work.recipe(job)
    left = work.seconds_left(pending)
    about = "" if left is None else f"; about {format_duration(left)} left for all"
    tell(f"[{work.jobs.index(job) + 1}/{len(work.jobs)}] {job.title}{about}")
    with in_row(job.row), suppress(InUse):  # another process may have been quicker
        if isinstance(recipe, Stages):
            train_stages(recipe, folder, device=device, console=console)
        elif job.label is not None:
            label(recipe, folder, job.label, device=device)
        else:
            train(recipe, folder, device=device, console=console)
        if job.label is None:
            (*_, last) = work.runs(job)
            scores = (read_record(last / SUMMARY) or {}).get("scores") or {}
            top1 = f"top-1 {scores['top1']:.2%}, " if "top1" in scores else ""
            tell(f"  {top1}{format_duration(work.seconds(job) or 0)}, {last}")


def check(work: Work) -> None:
    """Raise what is known to be wrong with any run; write nothing."""
    output = work.output
    with disk_errors(output):
        found = contents(output) if output.is_dir() else []
    if found and STUDY not in found:
        what = f"the output {output} is not empty ({found[0]} is in it) and"
        raise ConfigError(f"{what} holds no study", Give("output"), field="output")
    assert work.ahead  # every row can be built
    for job in work.jobs:
        with in_row(job.row):
            for folder, recipe in work.runs(job).items():
                saved = saved_recipe(folder)
                if saved is not None:
                    recipe = with_views_of_labels(recipe, saved)
                check_folder(folder, recipe, "change the study back")
            if job.label is not None:
                ((ahead, _),) = work.ahead[job.row]
                for name in job.recipe.teachers:
                    foresee_layout(job.recipe, ahead.plan, name, job.label)
                for store in work.stores(job).values():
                    _check_labels(work, job, store)
            _check_reading(work, job)


def _check_reading(work: Work, job: Job) -> None:
    """Refuse a job that reads what shared labels, written or not, do not hold."""
    shared = {other.row: other for other in work.jobs}
    for recipe, (ahead, _) in zip(job.parts.values(), work.ahead[job.row], strict=True):
        labels = {}
        for path, source in label_sources(recipe).items():
            written, name = writer(work.jobs, recipe, path)
            ((wrote, _),), options = work.ahead[source], shared[source].label
            assert options is not None
            labels[path.split(".")[1]] = foresee_layout(written, wrote.plan, name, options)
        if labels:
            plan = ahead.plan
            make_plan(
                *(plan.student, plan.teachers, plan.objectives, plan.selector, plan.masking),
                labels,
            )


def _check_labels(work: Work, job: Job, store: LabelStore) -> None:
    recipe = work.recipe(job)
    assert isinstance(recipe, Recipe)
    written = from_dict(store.manifest.about["recipe"])
    changed = differences(recipe, written)
    if changed:
        what = f"the labels {store.path} are of another recipe ({changed[0]})"
        raise ConfigError(what, (Give("output"), "change the study back"), field="output")


def _save(work: Work) -> None:
    text, path = dump_yaml(to_dict(work.study)).encode(), work.output / STUDY
    if not path.is_file() or path.read_bytes() != text:
        write_atomic(path, text)
