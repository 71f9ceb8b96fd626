"""The recipe that the words of a command mean: a named one, or a file, and what flags change."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.models import is_model
from timm.optim import get_optimizer_info, list_optimizers

from ..errors import Add, Drop, Set, UserError
from ..messages import suggest
from ..methods import method_class
from ..methods.base import Masking, TeacherObjective, TokenSelector
from ..recipes import RECIPES
from ..recipes.config import Recipe, StudentConfig, TeacherConfig
from ..recipes.convert import flatten, replace_fields
from ..recipes.named import find_recipe, named_recipe
from ..recipes.stages import Stages, in_stage, refuse_sources
from ..recipes.yaml import parse_yaml
from ..storage.manifest import MANIFEST
from .arguments import ExplainArguments, NoArguments, RecipeArguments, recipe_flags, scopes
from .flags import Flag


@dataclass(frozen=True)
class Changes:
    """What the command line changes in the recipe of one run.

    Args:
        settings: values of flags, by field.
        assignments: what ``--set`` gives, as ``FIELD=VALUE``.
    """

    settings: Mapping[str, Any]
    assignments: Sequence[str] = ()
    labels: str | None = None
    alpha: float | None = None


def resolve_recipe(args: RecipeArguments) -> Recipe | Stages:
    """Return the recipe a command is to run.

    What is left out of it because the command line names another network is printed, except before
    a recipe that is itself printed.

    Raises:
        UserError: an unknown recipe, method or field, a wrong value, or a flag that cannot take
            effect in this recipe.
    """
    found, notes = find_recipe(args.recipe), list[str]()
    if isinstance(found, Stages):
        stages = _compose_stages(found.stages, args)
        recipe: Recipe | Stages = replace(found, stages=_change_stages(stages, args, notes))
    else:
        composed = _compose(found, args.with_, args.without)
        changes = Changes(args.settings, args.set, args.labels, args.distillation_alpha)
        recipe = _change(composed, changes, notes)
        refuse_sources(recipe)
    prints_recipe = isinstance(args, ExplainArguments) and args.recipe_yaml
    if os.environ.get("RANK", "0") == "0" and not prints_recipe:
        for note in notes:
            print(note)
    return recipe


def _change(recipe: Recipe, changes: Changes, notes: list[str], stage: str = "") -> Recipe:
    """Return the recipe with what the flags replace; ``notes`` gets a line on what is left out."""
    recipe = _without_args_of_others(recipe, changes, notes, stage)
    values = _values_of_settings(recipe, changes.settings)
    values |= _values_of_alpha(recipe, changes)
    values |= _values_of_labels(recipe, changes.labels)
    for item in changes.assignments:
        path, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--set {item!r} has no '='", "write FIELD=VALUE, e.g. optim.lr=0.001")
        twice = next((p for p in values if p == path or p.startswith(f"{path}.")), None)
        if twice is not None:
            raise UserError(f"{twice} is set twice on the command line", "give it once")
        values[path] = parse_yaml(text, f"the value of --set {path}")
    recipe = replace_fields(recipe, values)
    _refuse_idle(recipe, changes.settings)
    return recipe


def _values_of_settings(recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    known = flatten(recipe)
    values: dict[str, Any] = {}
    for path, value in settings.items():
        if path == "student.image_size" and "img_size" in recipe.student.model_args:
            path = "student.model_args.img_size"  # the same setting, where the recipe has it
        if path not in known:
            raise _no_effect(recipe_flags()[path].name, recipe, path)
        values[path] = value
    if "selector.keep_rate" in values:
        if "selector.num_keep" in values:
            raise UserError("--keep-rate and --num-keep say the same", "give one of them")
        values["selector.num_keep"] = None
    # A file given by hand takes the place of the weights the recipe would have fetched.
    for network in ("student", "teachers.teacher"):
        if f"{network}.checkpoint" in values:
            values.setdefault(f"{network}.pretrained", False)
    return values


def _no_effect(flag: str, recipe: Recipe, path: str) -> UserError:
    part, name, *rest = path.split(".")
    what = f"{flag} cannot take effect"
    if part == "selector":
        return UserError(f"{what}: this recipe has no patch selector", Add("maskedkd"))
    if part == "teachers" and recipe.teachers:
        fixes = tuple(Set(f"teachers.{teacher}.{rest[0]}") for teacher in recipe.teachers)
        return UserError(f"{what}: it is for a teacher called 'teacher'", fixes)
    if part == "teachers":
        return UserError(f"{what}: this recipe has no teacher", Add("kd"))
    if name in recipe.objectives:
        kind = type(recipe.objectives[name]).__name__
        return UserError(f"{what}: the objective {name!r} is {kind}, which has no {rest[0]}")
    known = ", ".join(recipe.objectives)
    return UserError(f"{what}: this recipe has no objective {name!r}, only {known}")


def _values_of_alpha(recipe: Recipe, changes: Changes) -> dict[str, Any]:
    alpha, flag = changes.alpha, "--distillation-alpha"
    weights = ("objectives.kd.weight", "objectives.ce.weight")
    if alpha is None:
        return {}
    if not {"ce", "kd"} <= recipe.objectives.keys():
        raise UserError(f"{flag} weighs the objectives ce and kd, and this recipe lacks one")
    if changes.settings.keys() & set(weights):
        raise UserError(f"{flag} sets both weights", "leave --kd-weight and --ce-weight out")
    if not 0 < alpha < 1:
        fixes = ("give a number between 0 and 1", Drop("ce"), Drop("kd"))
        raise UserError(f"{flag} is {alpha:g}", fixes)
    return {weights[0]: alpha, weights[1]: 1 - alpha}


def _values_of_labels(recipe: Recipe, folder: str | None) -> dict[str, Any]:
    """Return which teachers' labels are in ``folder``: it may be that of the only teacher."""
    if folder is None:
        return {}
    if not recipe.teachers:
        raise UserError("--labels cannot take effect: this recipe has no teacher", Add("kd"))
    stored = {
        f"teachers.{name}.labels": str(Path(folder) / name)
        for name in recipe.teachers
        if (Path(folder) / name / MANIFEST).is_file()
    }
    if len(recipe.teachers) == 1:
        return stored or {f"teachers.{next(iter(recipe.teachers))}.labels": folder}
    for name in recipe.teachers:
        if f"teachers.{name}.labels" not in stored:
            fixes = (
                "label it too",
                "give those that are stored, --set teachers.NAME.labels=FOLDER",
            )
            raise UserError(f"--labels {folder} has no labels of {name}", fixes)
    return stored


def _without_args_of_others(
    recipe: Recipe, changes: Changes, notes: list[str], stage: str
) -> Recipe:
    """Return the recipe without the ``model_args`` that shape a timm network in whose place the
    command line names another.
    """
    named = {path: text for path, _, text in (item.partition("=") for item in changes.assignments)}
    named |= {path: value for path, value in changes.settings.items() if path.endswith(".model")}
    networks: dict[str, StudentConfig | TeacherConfig] = {"student": recipe.student}
    networks |= {f"teachers.{name}": config for name, config in recipe.teachers.items()}
    dropped: dict[str, Any] = {}
    for path, config in networks.items():
        model = named.get(f"{path}.model", config.model)
        old = config.model.partition(".")[0]
        same = model.partition(".")[0] == old
        if same or not config.model_args or not is_model(old) or f"{path}.model_args" in named:
            continue
        dropped[f"{path}.model_args"] = {}
        args = ", ".join(f"{key}={value}" for key, value in config.model_args.items())
        place = f"{stage}.{path}.model_args" if stage else f"{path}.model_args"
        notes.append(
            f"{place} of the recipe ({args}) belong to {config.model} and are left out for {model}:"
            f" give it its own with --set {place}.NAME=VALUE"
        )
    return replace_fields(recipe, dropped) if dropped else recipe


def _refuse_idle(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Raise `UserError` for a given flag that another setting keeps from having any effect."""
    optim, opt = recipe.optim, recipe.optim.opt.lower()
    known = opt in list_optimizers()
    if "optim.momentum" in settings and known and not get_optimizer_info(opt).has_momentum:
        raise UserError(f"--momentum cannot take effect: the optimizer {optim.opt} has none")
    if "optim.min_lr" in settings and optim.sched == "none":
        raise UserError("--min-lr cannot take effect: --sched none keeps the learning rate")
    if "optim.warmup_lr" in settings and optim.warmup_epochs == 0:
        raise UserError("--warmup-lr cannot take effect: there is no warm-up")


# --- methods added and parts dropped -------------------------------------------------------------


def _compose(recipe: Recipe, added: Sequence[str], dropped: Sequence[str]) -> Recipe:
    for name in dropped:
        recipe = _drop(recipe, name)
    for word in added:
        recipe = _add(recipe, word)
    return recipe


def _drop(recipe: Recipe, name: str) -> Recipe:
    parts = [part for part in ("selector", "masking") if getattr(recipe, part) is not None]
    if name in parts:
        return replace(recipe, **{name: None})  # type: ignore[arg-type]
    for part in ("objectives", "teachers"):
        items = getattr(recipe, part)
        if name in items:
            rest: dict[str, Any] = {part: {key: items[key] for key in items if key != name}}
            return replace(recipe, **rest)
    known = [*recipe.objectives, *recipe.teachers, *parts]
    raise UserError(f"--without {name}: the recipe has no such part", suggest(name, known))


def _add(recipe: Recipe, word: str) -> Recipe:
    """Return the recipe with the method ``METHOD`` or ``METHOD:TEACHER``."""
    name, _, teacher = word.partition(":")
    method = method_class(name)
    if issubclass(method, Masking):
        if teacher:
            what = f"--with {word}: {name} hides the same patches from the student and all teachers"
            raise UserError(what, f"leave :{teacher} out")
        return replace(recipe, masking=method())
    if issubclass(method, TokenSelector):
        return replace(recipe, selector=method(teachers=(teacher,)) if teacher else method())
    if teacher and not issubclass(method, TeacherObjective):
        raise UserError(f"--with {word}: {name} reads no teacher")
    key = f"{name}_{teacher}" if teacher else name
    if key in recipe.objectives:
        raise UserError(f"--with {word}: the recipe has an objective of that name already")
    objective = method(teacher=teacher) if teacher else method()  # type: ignore[call-arg]
    teachers = dict(recipe.teachers)
    if isinstance(objective, TeacherObjective):
        teachers.setdefault(objective.teacher, TeacherConfig())
    return replace(recipe, objectives={**recipe.objectives, key: objective}, teachers=teachers)


# --- stages --------------------------------------------------------------------------------------


def _compose_stages(stages: Mapping[str, Recipe], args: RecipeArguments) -> dict[str, Recipe]:
    added = _by_stage(stages, args.with_, "--with")
    dropped = _by_stage(stages, args.without, "--without")
    composed = {}
    for key, recipe in stages.items():
        with in_stage(key):
            composed[key] = _compose(recipe, added[key], dropped[key])
    return composed


def _change_stages(
    stages: Mapping[str, Recipe], args: RecipeArguments, notes: list[str]
) -> dict[str, Recipe]:
    if args.distillation_alpha is not None:
        raise UserError(
            "--distillation-alpha is for a recipe of one run",
            "give the weights themselves, --set STAGE.objectives.NAME.weight=VALUE",
        )
    own = _by_stage(stages, args.set, "--set")
    settings: dict[str, dict[str, Any]] = {key: {} for key in stages}
    for path, value in args.settings.items():
        for key in _stages_of(stages, recipe_flags()[path], value):
            settings[key][path] = value
    taught = [key for key, recipe in stages.items() if recipe.teachers]
    if args.labels is not None and len(taught) != 1:
        fix = "give --set STAGE.teachers.NAME.labels=FOLDER"
        raise UserError("--labels is for the one stage with a teacher", fix)
    changed = {}
    for key, recipe in stages.items():
        labels = args.labels if key in taught else None
        with in_stage(key):
            changes = Changes(settings[key], own[key], labels)
            changed[key] = _change(recipe, changes, notes, key)
    return changed


def _stages_of(stages: Mapping[str, Recipe], flag: Flag, value: Any) -> list[str]:
    """Return the stages a flag is for; raises `UserError` with what to write where that is not
    plain.
    """
    path, keys = flag.dest, [*stages]
    if flag.option.stages in ("every", "first"):
        return keys if flag.option.stages == "every" else keys[:1]
    having = [key for key in keys if path in flatten(stages[key])]
    if flag.option.stages == "taught" and len(having) == 1:
        return having
    word = "null" if value is None else value
    if having:
        fixes = tuple(Set(f"{key}.{path}", word) for key in having)
        raise UserError(f"{flag.name} is a setting of one stage", fixes)
    part, _, name = path.rpartition(".")
    others = [f"{key}.teachers.{teacher}" for key in keys for teacher in stages[key].teachers]
    if part == "teachers.teacher" and others:
        what = f"{flag.name} is for a teacher called 'teacher', and no stage has one"
        raise UserError(what, tuple(Set(f"{other}.{name}", word) for other in others))
    what = {"selector": "a patch selector", "teachers.teacher": "a teacher"}.get(part, part)
    method = "STAGE.maskedkd" if part == "selector" else "STAGE.kd"
    raise UserError(f"{flag.name} cannot take effect: no stage has {what}", Add(method))


def _by_stage(
    stages: Mapping[str, Recipe], words: Sequence[str], flag: str
) -> dict[str, list[str]]:
    """Return words like ``finetune.kd`` under the stage they begin with, without it."""
    found: dict[str, list[str]] = {key: [] for key in stages}
    for word in words:
        key, _, rest = word.partition(".")
        if not rest or key not in found:
            known = " or ".join(f"{flag} {stage}.{word}" for stage in found)
            fix = suggest(key, found, f"write {known}")
            raise UserError(f"{flag} {word} does not say which stage it is for", fix)
        found[key].append(rest)
    return found


# --- help ----------------------------------------------------------------------------------------


def describe(args: RecipeArguments) -> tuple[str, dict[str, Any]]:
    """Return a paragraph on the recipe for the help, and its values by field."""
    found = find_recipe(args.recipe)
    if isinstance(found, Stages):
        flat = [flatten(recipe) for recipe in _compose_stages(found.stages, args).values()]
        paths = {path for values in flat for path in values}
        given = {path: [values[path] for values in flat if path in values] for path in paths}
        common = {p: v[0] for p, v in given.items() if all(value == v[0] for value in v)}
        flags = {scope: ", ".join(names) for scope, names in scopes().items()}
        text = (
            f"The recipe {args.recipe!r} has the stages {', '.join(found.stages)}. Every stage is"
            f" meant by {flags['every']}; the first by {flags['first']}; the one with a teacher by"
            f" {flags['taught']}. The others are settings of one stage: --set STAGE.FIELD=VALUE."
            " Defaults below are those in which the stages agree."
        )
        return text, common
    values = flatten(_compose(found, args.with_, args.without))
    idle = [flag.name for path, flag in recipe_flags().items() if path not in values]
    text = f"Defaults below are those of the recipe {args.recipe!r}"
    return (
        f"{text}, in which these have no effect: {', '.join(idle)}." if idle else f"{text}.",
        values,
    )


def show_recipes(args: NoArguments) -> int:
    """Print every named recipe with its description."""
    width = max(map(len, RECIPES)) + 2
    for name, family in RECIPES.items():
        print(f"{name:<{width}}{named_recipe(name).description}")
        for variant in family.variants:
            print(f"{f'{name}:{variant}':<{width}}")
    return 0
