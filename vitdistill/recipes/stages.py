"""Staged recipes: runs that follow one another, where a later one starts from, or learns from, what
an earlier one trained.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError, Set, UserError
from ..messages import suggest
from .config import Recipe, StudentConfig, TeacherConfig, check_folder_name
from .convert import convert, from_dict, to_dict
from .yaml import dump_yaml, in_file, read_mapping

STAGES = "stages.yaml"
"""The staged recipe, in the folder that holds the stages' own."""
PREFIX = "stage:"

Config = TypeVar("Config", StudentConfig, TeacherConfig)


@dataclass(frozen=True, kw_only=True)
class Stages:
    """A recipe of several runs, in order.

    A stage names an earlier one as ``stage:NAME`` in ``student.model`` (it starts from its weights)
    or in a teacher's model (it learns from it).

    Args:
        name: of the folder that holds the stages' own.
        description: what it reproduces, one line.
        stages: the recipe of each stage, at least two. A recipe's name is that of the stage's
            folder; a recipe without one takes the stage's.

    Raises:
        ConfigError: a stage names one that does not exist or comes later, or nothing follows from
            what a stage trains.
    """

    name: str = "run"
    description: str = ""
    stages: dict[str, Recipe] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_folder_name(self.name)
        if len(self.stages) < 2:
            raise ConfigError(
                f"{self.name!r} has fewer than two stages",
                fix="write a plain recipe",
                field="stages",
            )
        unnamed = Recipe.__dataclass_fields__["name"].default
        named = {
            key: replace(recipe, name=key) if recipe.name == unnamed else recipe
            for key, recipe in self.stages.items()
        }
        object.__setattr__(self, "stages", named)
        taken = {STAGES}
        for key, recipe in named.items():
            with in_stage(key):
                if not key.isidentifier():
                    raise ConfigError(
                        "a stage's name is of letters, digits and underscores", field="stages"
                    )
                if recipe.name in taken:
                    raise ConfigError(
                        f"the folder {recipe.name!r} is taken", fix=Set("name"), field="name"
                    )
                taken.add(recipe.name)
        self._check_sources()

    def _check_sources(self) -> None:
        earlier: list[str] = []
        used: set[str] = set()
        for key, recipe in self.stages.items():
            with in_stage(key):
                for path, source in sources(recipe).items():
                    if source not in earlier:
                        raise ConfigError(
                            f"{path} is '{PREFIX}{source}', and no earlier stage has that name",
                            fix=suggest(source, earlier, "name an earlier one"),
                            field=path,
                        )
                    used.add(source)
            earlier.append(key)
        for key in earlier[:-1]:
            if key not in used:
                raise ConfigError(
                    f"no later stage uses what the stage {key!r} trains",
                    fix=f"name '{PREFIX}{key}' in a later student.model or teacher, or drop it",
                    field="stages",
                )

    @property
    def last(self) -> Recipe:
        """The recipe whose student is the result of all stages."""
        return [*self.stages.values()][-1]


@contextmanager
def in_stage(key: str) -> Iterator[None]:
    """Mark the user errors raised inside as being about the recipe of this stage."""
    try:
        yield
    except UserError as error:
        error.stage = error.stage or key
        raise


def sources(recipe: Recipe) -> dict[str, str]:
    """Return the stages a recipe builds on, by the field that names them.

    Raises:
        ConfigError: a network is to take a stage's weights and others too.
    """
    found = {}
    configs: dict[str, StudentConfig | TeacherConfig] = {"student": recipe.student}
    configs |= {f"teachers.{name}": config for name, config in recipe.teachers.items()}
    for path, config in configs.items():
        if not config.model.startswith(PREFIX):
            continue
        for name in ("checkpoint", "pretrained"):
            if getattr(config, name):
                raise ConfigError(
                    f"{path}.{name} would take the place of the weights of {config.model!r}",
                    fix="give one of them",
                    field=f"{path}.{name}",
                )
        found[f"{path}.model"] = config.model.removeprefix(PREFIX)
    return found


def teaching(recipe: Recipe) -> dict[str, str]:
    """Return the stages whose students teach this one, by the teacher's name."""
    named = sources(recipe)
    return {
        name: named[f"teachers.{name}.model"]
        for name in recipe.teachers
        if f"teachers.{name}.model" in named
    }


def refuse_sources(recipe: Recipe) -> None:
    """Raise `ConfigError` when a recipe of one run names a stage."""
    for path, source in sources(recipe).items():
        raise ConfigError(
            f"{path} is '{PREFIX}{source}', but this recipe has no stages",
            fix="name a model, or the folder of a run",
            field=path,
        )


def with_models(recipe: Recipe, models: Mapping[str, str]) -> Recipe:
    """Return the recipe with other models at fields that `sources` names."""
    student = replace(recipe.student, model=models.get("student.model", recipe.student.model))
    teachers = {
        name: replace(config, model=models.get(f"teachers.{name}.model", config.model))
        for name, config in recipe.teachers.items()
    }
    return replace(recipe, student=student, teachers=teachers)


def foreseen(stages: Stages, key: str) -> Recipe:
    """Return a stage's recipe with the architectures of earlier stages in place of their names.

    Nothing else is known of its networks before the earlier stages have run.
    """
    recipe = stages.stages[key]
    student, teachers = recipe.student, dict(recipe.teachers)
    if student.model.startswith(PREFIX):
        student = _merged(student, _architecture(stages, sources(recipe)["student.model"]))
    for name, source in teaching(recipe).items():
        teachers[name] = _merged(teachers[name], _architecture(stages, source))
    return replace(recipe, student=student, teachers=teachers)


def _architecture(stages: Stages, key: str) -> StudentConfig:
    return foreseen(stages, key).student


def _merged(config: Config, base: StudentConfig) -> Config:
    """Return ``config`` as a network that begins as ``base``.

    Arguments that only training reads are not handed on; an export leaves them out too.
    """
    args = {
        key: value
        for key, value in base.model_args.items()
        if not key.endswith(("drop_rate", "drop_path_rate"))
    }
    if base.image_size is not None:
        args["img_size"] = base.image_size
    if config.image_size is not None:
        args.pop("img_size", None)
    return replace(config, model=base.model, model_args={**args, **config.model_args})


# --- YAML ----------------------------------------------------------------------------------------


def load(path: str | Path) -> Recipe | Stages:
    """Read a recipe file, of one run or of stages.

    Raises:
        ConfigError: it cannot be read; the line or the field that is wrong is named.
    """
    data = read_mapping(path)
    with in_file(path):
        read = from_data if "stages" in data else from_dict
        return read(data, str(path))


def from_data(data: Mapping[str, Any], source: str = "the recipe") -> Stages:
    """Make a staged recipe from plain data; raises as `vitdistill.recipes.convert.from_dict`."""
    known = [f.name for f in fields(Stages)]
    for key in data:
        if key not in known:
            inner = f"in a staged recipe it is a field of each stage, stages.NAME.{key}"
            raise ConfigError(
                f"{source} has an unknown field {key!r}",
                fix=inner if key in Recipe.__dataclass_fields__ else suggest(key, known),
                field=str(key),
            )
    stages = data.get("stages")
    if not isinstance(stages, Mapping):
        raise ConfigError(f"stages in {source} is not a mapping of recipes", field="stages")
    recipes = {}
    for key, item in stages.items():
        with in_stage(str(key)):
            recipes[str(key)] = from_dict({} if item is None else item, source)
    words = {key: convert(data[key], str, key) for key in ("name", "description") if key in data}
    return Stages(**words, stages=recipes)


def dump(recipe: Recipe | Stages) -> str:
    """Return the recipe as YAML that `load` reads back to an equal one."""
    return dump_yaml(to_dict(recipe))
