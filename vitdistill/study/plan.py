"""What a study is, and the runs it comes to."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UserError
from ..messages import printable
from ..methods.base import TeacherObjective
from ..methods.cross_entropy import CrossEntropy
from ..option import option
from ..recipes.config import Recipe, check_folder_name, check_names
from ..recipes.convert import convert, in_file, replace_fields
from ..recipes.named import find_recipe
from ..recipes.stages import PREFIX, Stages, sources
from ..recipes.yaml import read_mapping

STUDY = "study.yaml"
ALONE = "alone"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe, by name or file, and what is changed of it."""

    recipe: str = ""
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Rows by seeds, and what they share.

    Args:
        shared: runs that are done once, in order. Rows, and later ones of these, name them as
            ``stage:NAME``; a teacher without a model is ``stage:teacher``, if that is among them.
        rows: each is run with every seed.
        grid: values of fields, of which every combination makes a row of each row.
        set: what is changed in all of them.
        seeds: of everything random, ``train.seed``.
        alone: add the student of each row with a teacher without one, as it is trained there.

    Raises:
        ConfigError: a name is no name of a folder or is taken, or nothing is to be done.
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
        check_names("shared", self.shared)
        check_names("rows", self.rows, {*self.shared, ALONE})
        counts = {"rows": self.rows, "seeds": self.seeds}
        counts |= {f"grid.{path}": values for path, values in self.grid.items()}
        for where, values in counts.items():
            if not values:
                raise ConfigError(f"{where} is empty", "name at least one", field=where)
        if len({*self.seeds}) < len(self.seeds):
            raise ConfigError("seeds has one twice", "give each once", field="seeds")


@dataclass(frozen=True)
class Job:
    """One run of a study: ``recipe`` names shared runs as stages, ``folder`` is inside the study's.

    ``row`` is what it is a seed of.
    """

    row: str
    recipe: Recipe
    folder: str

    @property
    def title(self) -> str:
        return f"{self.row}, seed {self.recipe.train.seed}" if "/" in self.folder else self.row

    def resolved(self, output: Path) -> Recipe:
        """Return the recipe with the folders of shared runs in place of their names."""
        named = sources(self.recipe).items()
        return replace_fields(self.recipe, {path: str(output / name) for path, name in named})


def load_study(path: str | Path) -> Study:
    """Read a study's file; raises `ConfigError` naming the line or the field that is wrong."""
    with in_file(str(path)):
        study: Study = convert(read_mapping(path), Study)
        return study


def jobs_of(study: Study) -> list[Job]:
    """Return the runs of a study in their order; those that others need come first.

    Raises:
        ConfigError: of a row's recipe; or it has stages, or names a run that is not shared.
    """
    shared: dict[str, Job] = {}
    for name, row in study.shared.items():
        with in_row(name):
            recipe = _recipe(study, row, name, shared, {})
        shared[name] = Job(name, recipe, name)
    rows: dict[str, Recipe] = {}
    for name, row in study.rows.items():
        for values in _combinations(study.grid):
            key = _name(name, values)
            with in_row(key):
                rows[key] = _recipe(study, row, key, shared, values)
    if study.alone:
        rows = {**_alone(rows.values()), **rows}
    seeded = [
        Job(name, replace_fields(recipe, {"train.seed": seed}), f"{name}/seed-{seed}")
        for seed in study.seeds
        for name, recipe in rows.items()
    ]
    return [*shared.values(), *seeded]


@contextmanager
def in_row(row: str) -> Iterator[None]:
    """Say of a user error which row it is about."""
    try:
        yield
    except UserError as error:
        error.stage, error.what = "", f"in the row {printable(row)!r}, {error.what}"
        raise


def together(jobs: Sequence[Job], job: Job) -> Stages | Recipe:
    """Return a run after the shared ones it needs, as they would be one recipe."""
    shared = {other.row: other.recipe for other in jobs if "/" not in other.folder}
    needed: dict[str, Recipe] = {}

    def add(recipe: Recipe) -> None:
        for name in sources(recipe).values():
            add(shared[name])
            needed.setdefault(name, shared[name])

    add(job.recipe)
    if not needed:
        return job.recipe
    key = re.sub(r"\W", "_", job.row)
    return Stages(name="study", stages={**needed, key: job.recipe})


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _name(row: str, values: Mapping[str, Any]) -> str:
    """Return ``kd-temperature=2-lr=0.001``, fit for a folder."""
    parts = [f"{path.rpartition('.')[2]}={value}" for path, value in values.items()]
    return re.sub(r"[^\w.=+-]+", "_", "-".join([row, *parts]))


def _recipe(
    study: Study, row: Row, name: str, shared: Mapping[str, Job], values: Mapping[str, Any]
) -> Recipe:
    found = find_recipe(row.recipe)
    if isinstance(found, Stages):
        what = f"the recipe {row.recipe!r} of {name!r} has stages"
        raise ConfigError(what, "give the earlier ones under shared, each by a file", field="rows")
    recipe = replace_fields(found, {**study.set, **row.set, **values})
    if "teacher" in shared:
        missing = {n: t for n, t in recipe.teachers.items() if not (t.model or t.labels)}
        paths = {f"teachers.{n}.model": f"{PREFIX}teacher" for n in missing}
        recipe = replace_fields(recipe, paths)
    for path, source in sources(recipe).items():
        if source not in shared:
            what = f"{path} of {name!r} is '{PREFIX}{source}', and no run of that name is shared"
            raise ConfigError(what, "put it under shared, before what needs it", field=path)
    return replace(recipe, name=name)


def _alone(rows: Iterable[Recipe]) -> dict[str, Recipe]:
    """Return each taught student once without a teacher, where no row trains it so."""
    rows, found = [*rows], dict[str, Recipe]()
    known = [recipe.student for recipe in rows if not recipe.teachers]
    for recipe in rows:
        if recipe.teachers and recipe.student not in known:
            known.append(recipe.student)
            name = ALONE if not found else f"{ALONE}_{len(found) + 1}"
            found[name] = without_teachers(recipe, name)
    return found


def without_teachers(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe with what reads labels alone; cross-entropy trains every head, wholly."""
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
