"""Staged recipes: runs that follow one another, where a later one starts from, or learns from, what
an earlier one trained.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Set, Spell, UserError
from ..messages import suggest
from . import STAGES
from .config import Recipe, check_folder_name, check_names
from .convert import convert, from_dict, in_file, replace_fields
from .yaml import read_mapping

PREFIX = "stage:"


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
        ConfigError: a stage names one that does not exist or comes later, or no later stage uses
            what one trains.
    """

    name: str = "run"
    description: str = ""
    stages: dict[str, Recipe] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_folder_name(self.name)
        check_names("stages", self.stages)
        if len(self.stages) < 2:
            what = f"{self.name!r} has fewer than two stages"
            raise ConfigError(what, "write a plain recipe", field="stages")
        named = {
            key: replace(recipe, name=key) if recipe.name == Recipe.name else recipe
            for key, recipe in self.stages.items()
        }
        object.__setattr__(self, "stages", named)
        used, folders, keys = set[str](), {STAGES}, [*named]
        for number, (key, recipe) in enumerate(named.items()):
            with in_stage(key):
                if recipe.name in folders:
                    raise ConfigError(f"the folder {recipe.name!r} is taken", Set("name"))
                refuse_sources(recipe, keys[:number])
            used |= {*sources(recipe).values()}
            folders.add(recipe.name)
        for key in keys[:-1]:
            if key not in used:
                fix = f"name '{PREFIX}{key}' in a later student.model or teacher, or drop it"
                raise ConfigError(f"no later stage uses what {key!r} trains", fix, field="stages")

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


def spell_in_stage(key: str, spell: Spell) -> Spell:
    """Return ``spell`` for errors that a run of this stage reports but does not raise."""

    def spelled(error: UserError) -> str:
        error.stage = key
        return spell(error)

    return spelled


def sources(recipe: Recipe) -> dict[str, str]:
    """Return the stages a recipe builds on, by the field that names them.

    Raises `ConfigError` where a network is to take a stage's weights and others too.
    """
    found = {}
    for path, config in recipe.networks.items():
        if not config.model.startswith(PREFIX):
            continue
        for name in ("checkpoint", "pretrained"):
            if getattr(config, name):
                what = f"{path}.{name} would take the place of the weights of {config.model!r}"
                raise ConfigError(what, "give one of them", field=f"{path}.{name}")
        found[f"{path}.model"] = config.model.removeprefix(PREFIX)
    return found


def refuse_sources(recipe: Recipe, earlier: Sequence[str] = ()) -> None:
    """Raise `ConfigError` where a recipe names a stage that is not one of the ``earlier`` ones."""
    for path, source in sources(recipe).items():
        if source not in earlier:
            what = f"{path} is '{PREFIX}{source}', and no earlier stage has that name"
            raise ConfigError(what, suggest(source, earlier), field=path)


def foreseen(stages: Stages, key: str) -> Recipe:
    """Return a stage's recipe with the architectures of earlier stages in place of their names.

    Nothing else is known of its networks before the earlier stages have run.
    """
    recipe, values = stages.stages[key], dict[str, Any]()
    for place, source in sources(recipe).items():
        path = place.removesuffix(".model")
        own, begun = recipe.networks[path], foreseen(stages, source).student
        # What only training reads is not handed on; an export leaves it out too.
        unread = ("drop_rate", "drop_path_rate")
        args = {k: v for k, v in begun.model_args.items() if not k.endswith(unread)}
        if begun.image_size is not None:
            args["img_size"] = begun.image_size
        if own.image_size is not None:
            args.pop("img_size", None)
        values |= {place: begun.model, f"{path}.model_args": args | own.model_args}
    return replace_fields(recipe, values)


# --- YAML ----------------------------------------------------------------------------------------


def load(path: str | Path) -> Recipe | Stages:
    """Read a recipe file, of one run or of stages; raises `ConfigError` naming what is wrong."""
    data = read_mapping(path)
    with in_file(str(path)):
        if "stages" not in data:
            return from_dict(data)
        recipes = {}
        for key, item in convert(data["stages"], dict[str, dict[str, Any]], "stages").items():
            with in_stage(key):
                recipes[key] = from_dict(item)
        staged: Stages = convert({**data, "stages": recipes}, Stages)
        return staged
