"""Reading runs from their folders, without training or writing anything."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, UserError
from ..recipes.config import Recipe
from ..recipes.convert import flatten
from ..recipes.fingerprint import is_volatile
from ..recipes.stages import STAGES, Stages, load
from ..recipes.yaml import load_recipe
from ..runs.folder import ENVIRONMENT, METRICS, SUMMED_UP, TIMING
from ..runs.identity import (
    RECIPE,
    SUMMARY,
    WEIGHTS,
    read_identity,
    read_record,
    stages_in,
    weights_identity,
)
from ..runs.preflight import NUM_IMAGES
from ..runs.stored import open_labels, proof_of, with_teachers
from ..storage.atomic import sha256_file
from .answers import Answers, read_answers
from .verdict import Seed

SEEDS = ("train.seed", "data.seed")


@dataclass(frozen=True)
class Run:
    """What a run's folder says; whatever is missing in it is None or empty."""

    path: Path
    recipe: Recipe  # its stored labels' teachers too, where the labels are still there
    whole: Recipe | Stages  # what was trained: this recipe, or one of which it is a stage
    summary: dict[str, Any]  # {}: it is not finished
    metrics: Sequence[dict[str, Any]]
    images_per_second: float | None  # of training, median of its log lines
    environment: dict[str, Any]
    identity: dict[str, Any]
    answers: Answers | None

    @property
    def seed(self) -> Seed:
        return self.recipe.train.seed, self.recipe.data_seed

    @property
    def names(self) -> tuple[str, str]:
        """The name of its recipe, and of the stage that it is; "": there are no stages."""
        name = self.recipe.name
        if not isinstance(self.whole, Stages):
            return name, ""
        as_in_study = [key for key in self.whole.stages if name.endswith(f"-{key}")]
        return next(((name.removesuffix(f"-{k}"), k) for k in as_in_study), (self.whole.name, name))

    @property
    def settings(self) -> dict[str, Any]:
        """What of its recipe can change its result, but for the seeds."""
        flat = flatten(self.recipe)
        found = {k: v for k, v in flat.items() if not is_volatile(k) and k not in SEEDS}
        stored = [name for name, config in self.recipe.teachers.items() if config.labels]
        return found | {f"teachers.{name}.labels": "stored" for name in stored}

    @cached_property
    def needed(self) -> dict[str, str]:
        """Digests of what it began with, and of the teachers that wrote its labels, by field."""
        stored = any(config.labels for config in self.recipe.teachers.values())
        return (weights_identity(self.recipe) if stored else {}) | self.identity

    @property
    def scores(self) -> dict[str, float]:
        """The scores of its last weights, as they were evaluated or, else, asked for later."""
        kept = self.answers.scores if self.answers else {}
        return numbers(kept) | numbers(self.summary.get("scores") or {})

    @property
    def val_images(self) -> str:
        """What tells its validation images from others."""
        return str(self.identity.get("validation images", self.recipe.data.dir))

    @property
    def num_trained(self) -> int:
        """Training images it saw, repeats included; 0: it is not finished."""
        return int(numbers(self.summary).get("steps", 0)) * self.recipe.train.batch_size

    def top1_of(self, teacher: str) -> tuple[float | None, int]:
        """Return a teacher's top-1, and on how many validation images; None: unknown."""
        if self.answers is not None and teacher in self.answers.teachers:
            right = self.answers.teachers[teacher] == self.answers.labels
            return float(right.mean()), len(right)
        if teacher in self.summary.get("teachers", {}):
            count = int(self.scores.get("num_samples", NUM_IMAGES))
            return self.summary["teachers"][teacher], min(count, NUM_IMAGES)
        with suppress(UserError, KeyError):  # its labels may be gone, or it has none
            return proof_of(open_labels(self.recipe)[teacher]) or (None, 0)
        return None, 0

    @cached_property
    def weights(self) -> frozenset[str]:
        """Digests of the weights it has made, by which other runs name it."""
        files = (self.path / kind / WEIGHTS for kind in ("last", "best"))
        return frozenset(sha256_file(file) for file in files if file.is_file())

    def curve(self, kind: str, name: str) -> list[tuple[float, float]]:
        """Return the logged values of ``name`` by epoch; ``kind``: train or eval."""
        lines = [numbers(line) for line in self.metrics if line.get("kind") == kind]
        return [(line["epoch"], line[name]) for line in lines if {"epoch", name} <= line.keys()]


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record."""
    return {k: v for k, v in record.items() if type(v) in (int, float) and math.isfinite(v)}


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Return the folders of runs among ``paths`` and below them, each once, in order.

    Raises:
        ConfigError: there is none in one of the paths.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        inside = []
        for folder, names, files in os.walk(path):
            names[:] = sorted(name for name in names if not name.startswith("."))
            if STAGES in files:
                order = [run.name for run in stages_in(Path(folder))]
                names.sort(key=lambda name: order.index(name) if name in order else -1)
            if RECIPE in files:
                inside.append(Path(folder))
                names.clear()
        if not inside:
            what = f"there is no run in {path}"
            raise ConfigError(what, "give the folder of a run, or one above it", field="paths")
        found |= {run.resolve(): run for run in inside if run.resolve() not in found}
    return [*found.values()]


def read_run(path: Path) -> Run:
    """Read what there is of a run; `UserError` for a file that is damaged or of another version."""
    timing = [numbers(line) for line in _read_log(path / TIMING)]
    pace = [line["images_per_second"] for line in timing if "images_per_second" in line]
    recipe, staged = load_recipe(path / RECIPE), path.absolute().parent / STAGES
    with suppress(UserError):
        recipe = with_teachers(recipe)
    known = read_record(path / ENVIRONMENT) or {}
    steps = [step for step in known if step.isdecimal() and isinstance(known[step], dict)]
    return Run(
        path,
        recipe,
        load(staged) if staged.is_file() else recipe,
        read_record(path / SUMMARY, SUMMED_UP) or {},
        _read_log(path / METRICS),
        statistics.median(pace) if pace else None,
        known[max(steps, key=int)] if steps else {},
        read_identity(path),
        read_answers(path),
    )


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log; its last line may be one that is being written."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        elif number < len(lines):
            raise DataError(f"line {number} of {path} is damaged", "delete the line")
    return found
