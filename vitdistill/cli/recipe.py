"""The recipe that the words of a command mean: a named one, or a file, and what flags change."""

import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.models import is_model
from timm.optim import get_optimizer_info, list_optimizers

from ..errors import Add, Set, UserError
from ..messages import plural, suggest
from ..methods.base import Masking, TeacherObjective, TokenSelector
from ..recipes.config import Recipe, TeacherConfig, fit_warmup
from ..recipes.convert import find_places, flatten, replace_fields
from ..recipes.named import find_recipe, method_of_recipes
from ..recipes.settings import EVERY_STAGE, FIRST_STAGE, UNLABELLED
from ..recipes.stages import Stages, in_stage, refuse_sources
from ..recipes.yaml import parse_yaml
from ..storage.manifest import MANIFEST
from .arguments import RecipeArguments, recipe_flags
from .flags import wrap

Values = dict[str, Any]
"""New values of a recipe's fields, by dotted path."""


def resolve_recipe(args: RecipeArguments) -> Recipe | Stages:
    """Return the recipe a command is to run.

    Print what is left out because the command line names another network.

    Raises:
        UserError: an unknown recipe, method or field, a wrong value, or a flag that cannot take
            effect in this recipe.
    """
    found = find_recipe(args.recipe)
    words = _by_stage(found.stages if isinstance(found, Stages) else {"": found}, args)
    recipes = _compose(found, words)
    values = _values_of_flags(recipes, args)
    for key, recipe in recipes.items():
        with in_stage(key):
            for item in words["--set"][key]:
                put(values[key], *read_setting(item))
            recipe, notes = _without_args_of_others(recipe, values[key], key)
            # Some recipes give the size of the input among the model's arguments.
            if "img_size" in recipe.student.model_args and "student.image_size" in values[key]:
                values[key]["student.model_args.img_size"] = values[key].pop("student.image_size")
            where = f"in the stage {key!r}, " if key else ""
            notes = [*notes, *(where + note for note in _shorten_warmup(recipe, values[key]))]
            recipes[key] = replace_fields(recipe, values[key])
            _refuse_idle(recipes[key], values[key])
        if os.environ.get("RANK", "0") == "0":
            for note in notes:
                print(wrap(note) if sys.stderr.isatty() else note, file=sys.stderr)
    if isinstance(found, Stages):
        return replace(found, stages=recipes)
    refuse_sources(recipes[""])
    return recipes[""]


def _shorten_warmup(recipe: Recipe, values: Values) -> list[str]:
    """Shorten a warm-up that nobody gave to fit fewer epochs; return what to say of it."""
    fitting = fit_warmup(recipe, values)
    if fitting is None:
        return []
    values["optim.warmup_epochs"] = fitting
    return [
        f"the warm-up is {fitting:.2g} of {plural(values['train.epochs'], 'epoch')}, in the recipe"
        f" {recipe.optim.warmup_epochs:g} of {recipe.train.epochs:,}; --warmup-epochs N changes it"
    ]


def read_setting(item: str) -> tuple[str, Any]:
    """Return the field and the value of one word of ``--set``."""
    path, equals, text = item.partition("=")
    if not equals:
        raise UserError(f"--set {item!r} has no '='", "write FIELD=VALUE, e.g. optim.lr=0.001")
    return path, parse_yaml(text, f"the value of --set {path}")


def put(values: Values, path: str, value: Any) -> None:
    """Add a value that may not be given twice, in whole or in part."""
    if any(path == other or path.startswith(f"{other}.") for other in values):
        raise UserError(f"{path} is set twice on the command line", "give it once")
    values[path] = value


def _by_stage(
    recipes: Mapping[str, Recipe], args: RecipeArguments
) -> dict[str, dict[str, list[str]]]:
    """Return the words of ``--set``, ``--with`` and ``--without`` by flag and stage, such as ``kd``
    of ``finetune.kd`` under ``finetune``.
    """
    given = {"--set": args.set, "--with": args.with_, "--without": args.without}
    if [*recipes] == [""]:
        return {flag: {"": [*words]} for flag, words in given.items()}
    found: dict[str, dict[str, list[str]]] = {flag: {key: [] for key in recipes} for flag in given}
    lost = []
    for flag, word in ((flag, word) for flag, words in given.items() for word in words):
        key, _, rest = word.partition(".")
        if rest and key in recipes:
            found[flag][key].append(rest)
        else:
            lost.append((flag, word))
    if lost:
        paths = [word.partition("=")[0] for flag, word in lost if flag == "--set"]
        having = [key for key in recipes if all(find_places(recipes[key], p) for p in paths)]
        ways = (
            " ".join(f"{flag} {key}.{_whole(recipes[key], flag, word)}" for flag, word in lost)
            for key in having or recipes
        )
        raise _of_which_stage((f"{flag} {word}" for flag, word in lost), ways)
    return found


def _whole(recipe: Recipe, flag: str, word: str) -> str:
    """Return a word with the whole path of the field that it sets."""
    path, equals, value = word.partition("=")
    places = find_places(recipe, path) if flag == "--set" else []
    return f"{places[0]}{equals}{value}" if places else word


def _of_which_stage(words: Iterable[str], ways: Iterable[str]) -> UserError:
    """Return the error for words that do not say which stage they mean, with ways to say it."""
    fixes = *(f"give {way}" for way in ways if way), "give several of these"
    return UserError(f"no stage is named for {', '.join(words)}", fixes)


# --- flags ---------------------------------------------------------------------------------------


def _values_of_flags(recipes: Mapping[str, Recipe], args: RecipeArguments) -> dict[str, Values]:
    """Return what the flags replace in the recipe of each stage."""
    settings, values = dict(args.settings), {key: Values() for key in recipes}
    several: dict[str, list[str]] = {}  # the stages that a setting for one of them may mean
    for path, value in settings.items():
        keys = _stages_of(recipes, path)
        if len(keys) > 1 and path not in (*EVERY_STAGE, *UNLABELLED):
            several[path] = keys
            continue
        for key in keys:
            with in_stage(key):
                _require_field(recipes[key], path)
                put(values[key], path, value)
    if several:
        given = {p: "null" if settings[p] is None else str(settings[p]) for p in several}
        ways = (
            " ".join(
                f"--set {key}.{path}={shlex.quote(given[path])}"
                for path, keys in several.items()
                if key in keys
            )
            for key in recipes
        )
        raise _of_which_stage((recipe_flags()[path].name for path in several), ways)
    for found in values.values():
        if "selector.keep_rate" in found:
            put(found, "selector.num_keep", None)
        # A file given by hand takes the place of the weights the recipe would have fetched.
        for path in [path for path in found if path.endswith(".checkpoint")]:
            found.setdefault(path.replace("checkpoint", "pretrained"), False)
    if args.labels is not None:
        taught = [key for key, recipe in recipes.items() if recipe.teachers]
        if len(taught) != 1:
            fix = Add("kd") if not taught else "give --set STAGE.teachers.NAME.labels=FOLDER"
            raise UserError("--labels is for the one run or stage with teachers", fix)
        values[taught[0]] |= _labels_in(args.labels, [*recipes[taught[0]].teachers])
    return values


def _stages_of(recipes: Mapping[str, Recipe], path: str) -> list[str]:
    """Return the stages that a flag may be for."""
    keys = [*recipes]
    if path in EVERY_STAGE:
        return keys
    if path in FIRST_STAGE:
        return keys[:1]
    if path in UNLABELLED:
        return [key for key in keys if recipes[key].learns_without_labels] or keys
    return [key for key in keys if path in flatten(recipes[key])] or keys[-1:]


def _require_field(recipe: Recipe, path: str) -> None:
    """Raise `UserError` for a flag of a part that the recipe does not have."""
    part, *_, name = path.split(".")
    if path in flatten(recipe):
        return
    others = tuple(Set(f"teachers.{teacher}.{name}") for teacher in recipe.teachers)
    fixes: dict[str, Any] = {"selector": Add("maskedkd"), "teachers": others or Add("kd")}
    what = f"{recipe_flags()[path].name} cannot take effect: the recipe has no {path}"
    raise UserError(what, fixes.get(part, ()))


def _labels_in(folder: str, teachers: Sequence[str]) -> Values:
    """Return where each teacher's labels are: in a folder of its name there, or in this one."""
    inside = {name: Path(folder) / name for name in teachers}
    places = {
        name: path if (path / MANIFEST).is_file() else folder for name, path in inside.items()
    }
    return {f"teachers.{name}.labels": str(place) for name, place in places.items()}


def _without_args_of_others(
    recipe: Recipe, values: Values, stage: str
) -> tuple[Recipe, Sequence[str]]:
    """Return the recipe without the ``model_args`` of timm networks that the command line replaces,
    and a note for each that another timm network replaces.
    """
    dropped, notes = Values(), []
    for path, config in recipe.networks.items():
        model, old = str(values.get(f"{path}.model", config.model)), config.model
        same = model.partition(".")[0] == old.partition(".")[0]
        own = f"{path}.model_args"
        if same or not config.model_args or not is_model(old) or own in values:
            continue
        dropped[own] = {}
        if is_model(model.partition(".")[0]):
            args = ", ".join(f"{key}={value}" for key, value in config.model_args.items())
            place = f"{stage}.{own}" if stage else own
            notes.append(
                f"{model} keeps its own size and shape, because the recipe's ({args}) are of"
                f" {old}; --set {place}.NAME=VALUE changes them"
            )
    return replace_fields(recipe, dropped), notes


def _refuse_idle(recipe: Recipe, values: Values) -> None:
    """Raise `UserError` for a given setting that another one keeps from having any effect."""
    optim, name = recipe.optim, recipe.optim.opt.lower()
    has_momentum = name not in list_optimizers() or get_optimizer_info(name).has_momentum
    idle = {
        "optim.momentum": (not has_momentum, f"the optimizer {optim.opt} has none"),
        "optim.min_lr": (optim.sched == "none", "without a schedule the learning rate stays"),
        "optim.warmup_lr": (optim.warmup_epochs == 0, "there is no warm-up"),
    }
    for path, (is_idle, why) in idle.items():
        if is_idle and path in values:
            raise UserError(f"{recipe_flags()[path].name} cannot take effect: {why}")


# --- methods added and parts dropped -------------------------------------------------------------


def _compose(
    found: Recipe | Stages, words: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, Recipe]:
    """Return the recipe of each stage ("" for one run) with methods added and parts dropped."""
    recipes = dict(found.stages) if isinstance(found, Stages) else {"": found}
    for key in recipes:
        with in_stage(key):
            for name in words["--without"][key]:
                recipes[key] = _drop(recipes[key], name)
            for word in words["--with"][key]:
                recipes[key] = _add(recipes[key], word)
    return recipes


def _drop(recipe: Recipe, name: str) -> Recipe:
    parts = [part for part in ("selector", "masking") if getattr(recipe, part) is not None]
    if name in parts:
        return replace(recipe, **{name: None})  # type: ignore[arg-type]
    for part in ("objectives", "teachers"):
        items = getattr(recipe, part)
        if name in items:
            rest: Values = {part: {key: items[key] for key in items if key != name}}
            return replace(recipe, **rest)
    known = [*recipe.objectives, *recipe.teachers, *parts]
    raise UserError(f"--without {name}: the recipe has no such part", suggest(name, known))


def _add(recipe: Recipe, word: str) -> Recipe:
    """Return the recipe with the method ``METHOD`` or ``METHOD:TEACHER``."""
    name, _, teacher = word.partition(":")
    method = method_of_recipes(name, recipe.name)
    if isinstance(method, TeacherObjective) and teacher:
        method = replace(method, teacher=teacher)
    elif isinstance(method, TokenSelector) and teacher:
        method = replace(method, teachers=(teacher,))
    elif teacher:
        raise UserError(f"--with {word}: {name} reads no teacher", f"leave :{teacher} out")
    if isinstance(method, Masking):
        return replace(recipe, masking=method)
    if isinstance(method, TokenSelector):
        return replace(recipe, selector=method)
    key = f"{name}_{teacher}" if teacher else name
    if key in recipe.objectives:
        raise UserError(f"--with {word}: the recipe has an objective of that name already")
    teachers = dict(recipe.teachers)
    if isinstance(method, TeacherObjective):
        teachers.setdefault(method.teacher, TeacherConfig())
    return replace(recipe, objectives={**recipe.objectives, key: method}, teachers=teachers)
