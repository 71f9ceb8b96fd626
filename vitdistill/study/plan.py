"""What a study is, and the runs it comes to."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UserError
from ..methods.base import TeacherObjective
from ..methods.cross_entropy import CrossEntropy
from ..option import option
from ..recipes.config import Recipe, check_folder_name, check_names, fit_warmup
from ..recipes.convert import convert, in_file, replace_fields
from ..recipes.named import find_recipe
from ..recipes.settings import LabelOptions
from ..recipes.stages import PREFIX, Stages, sources
from ..recipes.yaml import read_mapping

STUDY = "study.yaml"
ALONE = "alone"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe, by name or file, and changes to it.

    Args:
        recipe: the one whose student is trained.
        label: the one whose teachers' answers are stored instead; only under ``shared``.
        options: of these stored labels.
        set: values by field; in a recipe with stages for all of them, or for the one whose name
            comes first (``finetune.optim.lr``).
    """

    recipe: str = ""
    label: str = ""
    options: LabelOptions = field(default_factory=LabelOptions)
    set: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.recipe) == bool(self.label):
            raise ConfigError("a row has either a recipe or a label", "give one", field="recipe")
        if self.options != LabelOptions() and not self.label:
            raise ConfigError("options are of a label", "leave them out", field="options")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Rows by seeds, and what they share.

    Args:
        shared: runs and stored labels that are made once, in order. Rows and later entries name
            them as ``stage:NAME``: a run as a model, labels as a teacher's ``labels``. A teacher
            with neither is ``stage:teacher``, if that is shared. With shared labels all rows see
            images in the labels' order and views, so that seeds pair.
        rows: each is run with every seed.
        grid: values by field; every combination makes a row of each row.
        set: what is changed in all of them.
        seeds: of everything random, ``train.seed``.
        alone: add the student of each taught row without a teacher, trained as in that row.

    Raises:
        ConfigError: a name is taken or cannot be a folder's, or there is nothing to do.
    """

    name: str = "study"
    shared: dict[str, Row] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    set: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    alone: bool = option(True, "add the students without a teacher")

    def __post_init__(self) -> None:
        check_folder_name(self.name)
        check_names("shared", self.shared, {ALONE})
        check_names("rows", self.rows, {*self.shared, ALONE})
        for name in (name for name, row in self.rows.items() if row.label):
            raise ConfigError(f"{name!r} is a label", "put it under shared", field="rows")
        counts = {"rows": self.rows, "seeds": self.seeds}
        counts |= {f"grid.{path}": values for path, values in self.grid.items()}
        for where, values in counts.items():
            if not values:
                raise ConfigError(f"{where} is empty", "name at least one", field=where)
        if len({*self.seeds}) < len(self.seeds):
            raise ConfigError("a seed is given twice", "give each once", field="seeds")


Parts = dict[str, Recipe]
"""A row's recipes by stage, in order; a single run's is under ""."""


@dataclass(frozen=True)
class Job:
    """One run of a study, of one stage or several, or one set of stored labels.

    Args:
        row: what it is a seed of.
        parts: recipes; they name what is shared, and earlier parts, as stages.
        folder: inside the study's.
        label: how answers are stored; None: it is a run.
    """

    row: str
    parts: Parts
    folder: str
    label: LabelOptions | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe of its only stage, or its last."""
        return [*self.parts.values()][-1]

    @property
    def title(self) -> str:
        return f"{self.row}, seed {self.recipe.train.seed}" if "/" in self.folder else self.row

    @property
    def needs(self) -> set[str]:
        """The names of the shared runs and labels it needs."""
        named = [{**sources(r), **label_sources(r)}.values() for r in self.parts.values()]
        return {name for names in named for name in names} - {*self.parts}


def label_sources(recipe: Recipe) -> dict[str, str]:
    """Return the shared labels that a recipe reads, by the field that names them."""
    named = {f"teachers.{name}.labels": t.labels or "" for name, t in recipe.teachers.items()}
    return {f: s.removeprefix(PREFIX) for f, s in named.items() if s.startswith(PREFIX)}


def writer(jobs: Sequence[Job], recipe: Recipe, path: str) -> tuple[Recipe, str]:
    """Return the recipe that writes the labels a field names, and its teacher's name: the same as
    in the recipe that reads them, or the only one.
    """
    name, source = path.split(".")[1], label_sources(recipe)[path]
    found = next(job.recipe for job in jobs if job.row == source)
    names = [*found.teachers]
    return found, name if name in names or len(names) != 1 else names[0]


def resolve(jobs: Sequence[Job], job: Job, output: Path) -> Recipe | Stages:
    """Return a job's recipe with the folders of what is shared in place of its names."""
    parts = {}
    for key, recipe in job.parts.items():
        paths = {f: str(output / s) for f, s in sources(recipe).items() if s in job.needs}
        for path, source in label_sources(recipe).items():
            paths[path] = str(output / source / writer(jobs, recipe, path)[1])
        parts[key] = replace_fields(recipe, paths)
    return _as_recipe(parts)


def _as_recipe(parts: Parts) -> Recipe | Stages:
    return parts[""] if [*parts] == [""] else Stages(name="study", stages=parts)


def load_study(path: str | Path) -> Study:
    """Read a study's file; raises `ConfigError` naming the line or the field that is wrong."""
    with in_file(str(path)):
        study: Study = convert(read_mapping(path), Study)
        return study


def jobs_of(study: Study) -> list[Job]:
    """Return the jobs of a study in order; what others need comes first.

    Raises:
        ConfigError: a row's recipe is wrong, or names something that is not shared.
    """
    shared: list[Job] = []
    for name, row in study.shared.items():
        with in_row(name):
            parts = _parts(study, row, name, shared, {})
        shared.append(Job(name, parts, name, row.options if row.label else None))
    rows: dict[str, Parts] = {}
    for name, row in study.rows.items():
        for values in _combinations(study.grid):
            key = _name(name, values)
            if key in rows:
                what = f"two combinations of the grid make a row called {key!r}"
                raise ConfigError(
                    what, "give values that differ in letters or digits", field="grid"
                )
            with in_row(key):
                rows[key] = _parts(study, row, key, shared, values)
    if study.alone:
        alone = _alone([parts[""] for parts in rows.values() if "" in parts])
        for name in (name for name in alone if name in rows or name in study.shared):
            what = f"{name!r} is the name of a student without a teacher"
            raise ConfigError(what, "choose another", field="rows")
        rows = {**alone, **rows}
    stored = [job.recipe.data_seed for job in shared if job.label]

    def seeded(recipe: Recipe, seed: int) -> Recipe:
        views = recipe.data.seed if recipe.data.seed is not None or not stored else stored[0]
        return replace_fields(recipe, {"train.seed": seed, "data.seed": views})

    runs = [
        Job(name, {k: seeded(r, seed) for k, r in parts.items()}, f"{name}/seed-{seed}")
        for seed in study.seeds
        for name, parts in rows.items()
    ]
    return [*shared, *runs]


@contextmanager
def in_row(row: str) -> Iterator[None]:
    """Name the row in user errors raised inside."""
    try:
        yield
    except UserError as error:
        error.stage, error.what = "", f"in the row {row!r}, {error.what}"
        raise


def together(jobs: Sequence[Job], job: Job) -> Stages | Recipe:
    """Return a job after the shared runs it needs, as one recipe whose teachers run even if their
    labels are stored.
    """
    shared = {other.row: other for other in jobs if "/" not in other.folder}
    needed: Parts = {}

    def live(recipe: Recipe) -> Recipe:
        teachers = dict(recipe.teachers)
        for path in label_sources(recipe):
            written, name = writer(jobs, recipe, path)
            teachers[path.split(".")[1]] = written.teachers[name]
        recipe = replace(recipe, teachers=teachers)
        for name in {*sources(recipe).values()} & {*shared}:
            needed[name] = live(shared[name].recipe)
        return recipe

    own = {key: live(recipe) for key, recipe in job.parts.items()}
    if needed and "" in own:
        key = re.sub(r"\W", "_", job.row)
        own = {f"{key}_" if key in needed else key: own[""]}
    return _as_recipe({name: needed[name] for name in shared if name in needed} | own)


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _name(row: str, values: Mapping[str, Any]) -> str:
    """Return ``kd-temperature=2-lr=0.001``, fit for a folder."""
    parts = [f"{path.rpartition('.')[2]}={value}" for path, value in values.items()]
    return re.sub(r"[^\w.=+-]+", "_", "-".join([row, *parts]))


def _parts(
    study: Study, row: Row, name: str, shared: Sequence[Job], values: Mapping[str, Any]
) -> Parts:
    found = find_recipe(row.recipe or row.label)
    parts = found.stages if isinstance(found, Stages) else {"": found}
    if isinstance(found, Stages) and name in study.shared:
        what = f"the recipe {found.name!r} has stages"
        raise ConfigError(what, "share them one by one, each by a file", field="shared")
    if taken := {*parts} & {job.row for job in shared}:
        what = f"{min(taken)!r} names both a stage of the recipe and something shared"
        raise ConfigError(what, "rename what is shared", field="shared")
    given: dict[str, dict[str, Any]] = {key: {} for key in parts}
    for path, value in {**study.set, **row.set, **values}.items():
        first, _, rest = path.partition(".")
        for key in [first] if first in parts else parts:
            given[key][rest if first in parts else path] = value
    runs = {*parts, *(job.row for job in shared if job.label is None)}
    labels = {job.row for job in shared if job.label is not None}
    changed = {}
    for key, part in parts.items():
        warmup = fit_warmup(part, given[key])
        if warmup is not None:
            given[key]["optim.warmup_epochs"] = warmup
        recipe = replace_fields(part, given[key])
        if "teacher" in runs:
            missing = [n for n, t in recipe.teachers.items() if not (t.model or t.labels)]
            paths = {f"teachers.{n}.model": f"{PREFIX}teacher" for n in missing}
            recipe = replace_fields(recipe, paths)
        wrong = {f: s for f, s in sources(recipe).items() if s not in runs}
        wrong |= {f: s for f, s in label_sources(recipe).items() if s not in labels}
        for path, source in wrong.items():
            what = f"{path} is '{PREFIX}{source}', and nothing of that name and kind is shared"
            raise ConfigError(what, "put it under shared, before what needs it", field=path)
        about = recipe.description or found.description
        changed[key] = replace(recipe, name=f"{name}-{key}" if key else name, description=about)
    return changed


def _alone(rows: Sequence[Recipe]) -> dict[str, Parts]:
    """Return each taught student once, without a teacher, unless a row already trains it so."""
    found: dict[str, Parts] = {}
    known = [recipe.student for recipe in rows if not recipe.teachers]
    for recipe in rows:
        if recipe.teachers and recipe.student not in known:
            known.append(recipe.student)
            name = ALONE if not found else f"{ALONE}_{len(found) + 1}"
            found[name] = {"": without_teachers(recipe, name)}
    return found


def without_teachers(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe without teachers; cross-entropy has weight 1 and trains every head."""
    own = {k: o for k, o in recipe.objectives.items() if not isinstance(o, TeacherObjective)}
    own = {
        k: replace(o, weight=1.0, head="all") if isinstance(o, CrossEntropy) else o
        for k, o in own.items()
    }
    return replace(
        recipe,
        name=name,
        description="the student without a teacher",
        objectives=own or {"ce": CrossEntropy()},
        teachers={},
        selector=None,
        masking=recipe.masking if any(o.needs_masking for o in own.values()) else None,
    )
