"""Flags that change a recipe: timm's spellings, DeiT's as aliases, and every other field by
``--set``.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from timm.models import is_model
from tyro.conf import Positional

from ..errors import UserError
from ..methods import method_class, method_names
from ..methods.base import Masking, TeacherObjective, TokenSelector
from ..recipes import RECIPES
from ..recipes.config import Recipe, StudentConfig, TeacherConfig
from ..recipes.convert import flatten, replace_fields
from ..recipes.named import find_recipe, named_recipe
from ..recipes.stages import Stages, in_stage, refuse_sources
from ..recipes.yaml import parse_yaml
from ..storage.manifest import MANIFEST
from .flags import (
    COUNT,
    NUMBER,
    SWITCH,
    TEXT,
    about,
    asks_help,
    fill,
    flags_of,
    normalise,
    one_of,
    wrap,
)

DEFAULT_RECIPE = "maskedkd"


def _at(path: str, *aliases: str) -> Any:
    """A flag whose default is the recipe's value at ``path``."""
    return field(default=None, metadata={"path": path, "aliases": aliases})


@dataclass
class Data:
    """Where the images are, and how they are read."""

    data_dir: Annotated[
        str | None,
        TEXT,
        about(
            "a folder or tar with train/ and val/, parquet files, hfds/NAME,"
            " torchvision/NAME?root=DIR"
        ),
    ] = _at("data.dir")
    workers: Annotated[int | None, COUNT, about("loader processes; no influence on the result")] = (
        _at("data.workers", "-j")
    )
    in_memory: Annotated[
        bool | None, SWITCH, about("keep decoded images in memory; none: if they fit 2 GiB")
    ] = _at("data.in_memory")


@dataclass
class Student:
    """The network to train."""

    model: Annotated[
        str | None, TEXT, about("timm name, hf-hub:ORG/NAME, or a folder with config.json")
    ] = _at("student.model")
    model_path: Annotated[
        str | None, TEXT, about("weights it starts from (.safetensors, .pth)")
    ] = _at("student.checkpoint")
    pretrained: Annotated[bool | None, SWITCH, about("start from timm's pretrained weights")] = _at(
        "student.pretrained"
    )
    img_size: Annotated[
        int | None,
        COUNT,
        about(
            "side of its square input, pixels; none: its own; not square: --set"
            " student.model_args.img_size=[H,W]"
        ),
    ] = _at("student.image_size")
    drop_path: Annotated[float | None, NUMBER, about("stochastic depth rate of its last block")] = (
        _at("student.drop_path")
    )


@dataclass
class Teacher:
    """The network to learn from, and how much of each image it sees."""

    teacher_model: Annotated[
        str | None, TEXT, about("timm name, hf-hub:ORG/NAME, or a run's or export's folder")
    ] = _at("teachers.teacher.model", "--kd-model-name")
    teacher_path: Annotated[str | None, TEXT, about("its weights (.safetensors, .pth)")] = _at(
        "teachers.teacher.checkpoint"
    )
    teacher_pretrained: Annotated[bool | None, SWITCH, about("take timm's pretrained weights")] = (
        _at("teachers.teacher.pretrained")
    )
    teacher_img_size: Annotated[
        int | None, COUNT, about("side of its square input, pixels; none: its own")
    ] = _at("teachers.teacher.image_size")
    teacher_precision: Annotated[
        str | None,
        one_of("same", "float32", "bfloat16"),
        about("its arithmetic; bfloat16 is faster, not exact"),
    ] = _at("teachers.teacher.precision")
    reorder_classes: Annotated[
        bool | None, SWITCH, about("accept its classes in another order, matched by name")
    ] = _at("teachers.teacher.reorder_classes")
    labels: Annotated[
        str | None,
        TEXT,
        about(
            "stored labels to read in place of running it, as 'vitdistill label' wrote them; for"
            " all teachers at once"
        ),
    ] = None
    keep_rate: Annotated[
        float | None, NUMBER, about("fraction of its patches it sees, above 0 to 1")
    ] = _at("selector.keep_rate")
    num_keep: Annotated[
        int | None, COUNT, about("number of patches it sees, instead of --keep-rate")
    ] = _at("selector.num_keep", "--len-num-keep")


@dataclass
class Loss:
    """What is minimised."""

    ce_weight: Annotated[
        float | None, NUMBER, about("weight of the cross-entropy with the labels")
    ] = _at("objectives.ce.weight", "--task-loss-weight")
    smoothing: Annotated[float | None, NUMBER, about("label smoothing, 0 to below 1")] = _at(
        "objectives.ce.smoothing"
    )
    kd_weight: Annotated[float | None, NUMBER, about("weight of the distillation loss")] = _at(
        "objectives.kd.weight", "--distill-loss-weight"
    )
    temperature: Annotated[
        float | None, NUMBER, about("T of soft distillation, whose loss carries T^2")
    ] = _at("objectives.kd.temperature", "--distillation-tau", "--kd-temperature")
    distillation_alpha: Annotated[
        float | None, NUMBER, about("DeiT's alpha: --kd-weight alpha and --ce-weight 1 - alpha")
    ] = None
    with_: Annotated[
        tuple[str, ...],
        about(
            f"methods to add: {', '.join(method_names())}; a selector or a masking replaces the"
            " recipe's; METHOD:NAME reads, or chooses for, the teacher of that name; in stages:"
            " STAGE.METHOD",
            name="with",
            metavar="METHOD[:TEACHER] ...",
        ),
    ] = ()
    without: Annotated[
        tuple[str, ...],
        about(
            "objectives or teachers to drop, or 'selector', or 'masking'; in stages: STAGE.NAME",
            metavar="NAME ...",
        ),
    ] = ()


@dataclass
class Optimizer:
    """The update rule, and its learning rate over time."""

    opt: Annotated[str | None, TEXT, about("a timm optimizer")] = _at("optim.opt")
    lr: Annotated[
        float | None, NUMBER, about("peak learning rate, not scaled by the batch size")
    ] = _at("optim.lr")
    weight_decay: Annotated[float | None, NUMBER, about("not applied to biases and norms")] = _at(
        "optim.weight_decay"
    )
    momentum: Annotated[float | None, NUMBER, about("for optimizers that have it")] = _at(
        "optim.momentum"
    )
    layer_decay: Annotated[
        float | None, NUMBER, about("learning-rate factor from one block to the one below")
    ] = _at("optim.layer_decay")
    clip_grad: Annotated[
        float | None, NUMBER, about("largest gradient norm; none: no clipping")
    ] = _at("optim.clip_grad")
    sched: Annotated[
        str | None,
        one_of("cosine", "tanh", "poly", "none"),
        about("learning-rate schedule, moved every step"),
    ] = _at("optim.sched")
    warmup_epochs: Annotated[float | None, NUMBER, about("epochs of linear warm-up")] = _at(
        "optim.warmup_epochs"
    )
    warmup_lr: Annotated[float | None, NUMBER, about("learning rate the warm-up starts from")] = (
        _at("optim.warmup_lr")
    )
    min_lr: Annotated[float | None, NUMBER, about("learning rate the schedule ends at")] = _at(
        "optim.min_lr"
    )


@dataclass
class Augmentation:
    """How training views are made of the images."""

    crop: Annotated[
        str | None,
        one_of("rrc", "pad", "center"),
        about("rrc: RandomResizedCrop; pad: padded crop for small images; center: none"),
    ] = _at("data.augment.crop")
    hflip: Annotated[float | None, NUMBER, about("probability of a mirrored image")] = _at(
        "data.augment.hflip"
    )
    aa: Annotated[str | None, TEXT, about("timm's auto-augment string; none: none")] = _at(
        "data.augment.aa"
    )
    color_jitter: Annotated[
        float | None, NUMBER, about("strength of colour jitter; not together with --aa")
    ] = _at("data.augment.color_jitter")
    reprob: Annotated[float | None, NUMBER, about("probability of random erasing")] = _at(
        "data.augment.reprob"
    )
    mixup: Annotated[float | None, NUMBER, about("alpha of Mixup; 0: none")] = _at(
        "data.augment.mixup"
    )
    cutmix: Annotated[float | None, NUMBER, about("alpha of CutMix; 0: none")] = _at(
        "data.augment.cutmix"
    )
    repeated_aug: Annotated[int | None, COUNT, about("views an epoch has of an image; DeiT: 3")] = (
        _at("data.augment.repeated_aug")
    )
    views: Annotated[
        int | None,
        COUNT,
        about("different views there are of an image, in turn; none: one an epoch, or as labelled"),
    ] = _at("data.views")


@dataclass
class Loop:
    """How long, how much at once, how precise, and what is due when."""

    epochs: Annotated[int | None, COUNT, about("passes over the training images")] = _at(
        "train.epochs"
    )
    batch_size: Annotated[int | None, COUNT, about("images a step, over ALL processes")] = _at(
        "train.batch_size", "-b"
    )
    accumulate: Annotated[
        int | None, COUNT, about("micro-batches a step is split into, to save memory")
    ] = _at("train.accumulate", "--grad-accum-steps")
    amp_dtype: Annotated[
        str | None,
        one_of("auto", "float32", "bfloat16", "float16"),
        about("precision; auto: bfloat16 on a GPU, float32 on a CPU"),
    ] = _at("train.amp_dtype")
    torchcompile: Annotated[bool | None, SWITCH, about("torch.compile the networks")] = _at(
        "train.compile"
    )
    model_ema_decay: Annotated[
        float | None,
        NUMBER,
        about("of a moving average of the weights, evaluated and exported instead"),
    ] = _at("train.ema_decay")
    seed: Annotated[int | None, COUNT, about("of everything random")] = _at("train.seed")
    eval_every: Annotated[int | None, COUNT, about("epochs between evaluations")] = _at(
        "train.eval_every"
    )
    save_every: Annotated[
        int | None, COUNT, about("steps between checkpoints; none: once an epoch")
    ] = _at("train.save_every")
    log_every: Annotated[int | None, COUNT, about("steps between log lines")] = _at(
        "train.log_every"
    )


@dataclass
class RecipeFlags:
    """Flags shared by ``train`` and ``explain``, in the groups the help shows."""

    recipe: Positional[
        Annotated[
            str, TEXT, about("a recipe above, a YAML file, or a run's folder", metavar="RECIPE")
        ]
    ] = field(default=DEFAULT_RECIPE, metadata={"positional": "RECIPE"})
    data: Data = field(default_factory=Data)
    student: Student = field(default_factory=Student)
    teacher: Teacher = field(default_factory=Teacher)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    augmentation: Augmentation = field(default_factory=Augmentation)
    loop: Loop = field(default_factory=Loop)
    set: Annotated[
        tuple[str, ...],
        about(
            "any field of the recipe ('explain --recipe-yaml' shows all), e.g."
            " student.model_args.depth=6; in stages: STAGE.FIELD=VALUE",
            metavar="FIELD=VALUE ...",
        ),
    ] = ()


EVERY, FIRST, TAUGHT = "every stage", "the first stage", "the one stage with a teacher"
STAGED: dict[str, str] = {
    "data_dir": EVERY,
    "workers": EVERY,
    "in_memory": EVERY,
    "amp_dtype": EVERY,
    "torchcompile": EVERY,
    "seed": EVERY,
    "save_every": EVERY,
    "log_every": EVERY,
    "model": FIRST,
    "model_path": FIRST,
    "pretrained": FIRST,
    "img_size": FIRST,
    **{item.name: TAUGHT for item in fields(Teacher)},
}
"""Which stages of a staged recipe a flag is for. Any other is a setting of one stage, and given by
``--set STAGE.FIELD=VALUE``.

A later stage that starts from the first has its architecture and its image size, unless it says
otherwise.
"""


Flags = TypeVar("Flags", bound=RecipeFlags)


def parse(
    command: str, flags: type[Flags], words: Sequence[str], description: str
) -> tuple[Flags, Recipe | Stages]:
    """Read ``[RECIPE] [flags]``: the flags' defaults are the recipe's own values, and what is given
    replaces them.

    Of a staged recipe, `STAGED` says which stages a flag is for. What is left out of the recipe
    because the command line names another network is printed, except before a recipe that is itself
    printed.

    Raises:
        UserError: an unknown recipe, method, flag or field, a wrong value, or a flag that cannot
            take effect in this recipe.
    """
    prog = f"vitdistill {command}"
    given = _known_words(flags, words, prog) if asks_help(words) else normalise(flags, words, prog)
    (name,) = given.get("recipe", [DEFAULT_RECIPE])
    found = find_recipe(name)
    asked = asks_help(words)
    if isinstance(found, Stages):
        recipes = _compose_stages(found.stages, given)
        values, about_it = _common(recipes), partial(_about_stages, name, flags, recipes)
    else:
        recipes = {"": _compose(found, given.get("with_", []), given.get("without", []))}
        values = flatten(recipes[""])
        about_it = partial(_about_defaults, name, flags, values)
    text = f"{description}\n\nRecipes:\n{_recipe_list()}\n\n{about_it()}" if asked else ""
    filled = fill(flags, None if asked else given, prog, text, _defaults(flags, values))
    notes: list[str] = []
    if isinstance(found, Stages):
        recipe: Recipe | Stages = replace(
            found, stages=_changed_stages(recipes, filled, given, notes)
        )
    else:
        recipe = _changed(recipes[""], filled, given, notes)
        refuse_sources(recipe)
    if os.environ.get("RANK", "0") == "0" and not getattr(filled, "recipe_yaml", False):
        for note in notes:
            print(note)
    return filled, recipe


def _changed(
    recipe: Recipe,
    filled: RecipeFlags,
    given: Mapping[str, list[str]],
    notes: list[str],
    stage: str = "",
) -> Recipe:
    """The recipe with what the flags replace; ``notes`` is given a sentence on each thing that is
    left out for it.
    """
    recipe = _without_args_of_others(recipe, filled, given, notes, stage)
    recipe = replace_fields(recipe, _changes(recipe, flatten(recipe), filled, given))
    _refuse_idle(recipe, given)
    return recipe


def _without_args_of_others(
    recipe: Recipe,
    filled: RecipeFlags,
    given: Mapping[str, list[str]],
    notes: list[str],
    stage: str,
) -> Recipe:
    """The recipe without the ``model_args`` that shape a timm network in whose place the command
    line names another.
    """
    named = {path: text for path, _, text in (item.partition("=") for item in filled.set)}
    for flag, network in (("model", "student"), ("teacher_model", "teachers.teacher")):
        if flag in given:
            named[f"{network}.model"] = given[flag][0]
    networks: dict[str, StudentConfig | TeacherConfig] = {"student": recipe.student}
    networks |= {f"teachers.{name}": config for name, config in recipe.teachers.items()}
    dropped: dict[str, Any] = {}
    for path, config in networks.items():
        new, now = (
            name.partition(".")[0]
            for name in (named.get(f"{path}.model", config.model), config.model)
        )
        if (
            new == now
            or not config.model_args
            or not is_model(now)
            or f"{path}.model_args" in named
        ):
            continue
        dropped[f"{path}.model_args"] = {}
        args = ", ".join(f"{key}={value}" for key, value in config.model_args.items())
        place = f"{stage}.{path}.model_args" if stage else f"{path}.model_args"
        notes.append(
            f"{place} of the recipe ({args}) belong to {config.model} and are left out for"
            f" {named[f'{path}.model']}: give it its own with --set {place}.NAME=VALUE"
        )
    return replace_fields(recipe, dropped) if dropped else recipe


def _known_words(flags: type, words: Sequence[str], prog: str) -> dict[str, list[str]]:
    """What the words beside ``--help`` say, as far as it can be understood: the help is about that
    recipe.
    """
    try:
        return normalise(flags, [word for word in words if word not in ("--help", "-h")], prog)
    except UserError:
        return {}


def _defaults(flags: type[Flags], values: Mapping[str, Any]) -> Flags:
    def of(group: type) -> Any:
        filled = {}
        for item in fields(group):
            if dataclasses.is_dataclass(item.type):
                filled[item.name] = of(item.type)  # type: ignore[arg-type]
            elif "path" in item.metadata:
                filled[item.name] = values.get(item.metadata["path"])
        return group(**filled)

    filled: Flags = of(flags)
    return filled


def _changes(
    recipe: Recipe, values: Mapping[str, Any], filled: RecipeFlags, given: Mapping[str, list[str]]
) -> dict[str, Any]:
    """The recipe's fields that the given flags replace, by dotted path."""
    changes: dict[str, Any] = {}
    for flag in flags_of(type(filled)):
        path = flag.field.metadata.get("path")
        if path is None or flag.field.name not in given:
            continue
        if path == "student.image_size" and "student.model_args.img_size" in values:
            path = "student.model_args.img_size"  # the same setting, where the recipe has it
        if path not in values:
            raise UserError(f"{flag.name} cannot take effect: {_why_absent(recipe, path)}")
        changes[path] = _value(filled, flag.field.name)
    if "keep_rate" in given:
        if "num_keep" in given:
            raise UserError(
                "--keep-rate and --num-keep both say how many patches the teacher sees: give one of"
                " them"
            )
        changes["selector.num_keep"] = None
    # A file given by hand takes the place of the weights the recipe would have fetched.
    for file, fetched, network in (
        ("model_path", "pretrained", "student"),
        ("teacher_path", "teacher_pretrained", "teachers.teacher"),
    ):
        if file in given and fetched not in given:
            changes.setdefault(f"{network}.pretrained", False)
    changes |= _alpha(recipe, filled.loss.distillation_alpha, given)
    changes |= _labels(recipe, filled.teacher.labels)
    for item in filled.set:
        path, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--set {item!r} has no '=': write FIELD=VALUE, e.g. optim.lr=0.001")
        lost = next(
            (earlier for earlier in changes if earlier == path or earlier.startswith(f"{path}.")),
            None,
        )
        if lost is not None:
            raise UserError(f"{lost} is set twice on the command line: give it once")
        changes[path] = parse_yaml(text, f"the value of --set {path}")
    return changes


def _value(filled: Any, name: str) -> Any:
    for item in fields(filled):
        value = getattr(filled, item.name)
        if item.name == name:
            return value
        if dataclasses.is_dataclass(value) and any(inner.name == name for inner in fields(value)):
            return getattr(value, name)
    raise AssertionError(f"there is no flag {name}")


def _why_absent(recipe: Recipe, path: str) -> str:
    part, name, *rest = path.split(".")
    if part == "selector":
        return "this recipe has no patch selector (take a maskedkd recipe, or --with maskedkd)"
    if part == "teachers" and recipe.teachers:
        own = " and ".join(recipe.teachers)
        are = "are" if len(recipe.teachers) > 1 else "is"
        return (
            f"it is for a teacher called 'teacher', and this recipe's {are} {own}: write --set"
            f" teachers.NAME.{rest[0]}=VALUE"
        )
    if part == "teachers":
        return "this recipe has no teacher (take a kd or maskedkd recipe, or --with kd)"
    if name in recipe.objectives:
        return (
            f"{type(recipe.objectives[name]).__name__}, this recipe's objective {name!r}, has no"
            f" {rest[0]}"
        )
    return f"this recipe has no objective {name!r}, only {', '.join(recipe.objectives)}"


def _compose(recipe: Recipe, added: Sequence[str], dropped: Sequence[str]) -> Recipe:
    objectives, teachers, selector, masking = (
        dict(recipe.objectives),
        dict(recipe.teachers),
        recipe.selector,
        recipe.masking,
    )
    for name in dropped:
        if name == "selector" and selector is not None:
            selector = None
        elif name == "masking" and masking is not None:
            masking = None
        elif name in objectives:
            del objectives[name]
        elif name in teachers:
            del teachers[name]
        else:
            parts = [
                word
                for word, part in (("selector", selector), ("masking", masking))
                if part is not None
            ]
            known = ", ".join([*objectives, *teachers, *parts])
            raise UserError(f"--without {name}: the recipe has no such part, only {known}")
    for word in added:
        method_word, _, teacher = word.partition(":")
        method = method_class(method_word)
        if issubclass(method, Masking):
            if teacher:
                raise UserError(
                    f"--with {word}: {method_word} hides the same patches from the student and all"
                    f" teachers: leave :{teacher} out"
                )
            masking = method()
            continue
        if issubclass(method, TokenSelector):
            selector = method(teachers=(teacher,)) if teacher else method()
            continue
        if teacher and not issubclass(method, TeacherObjective):
            raise UserError(f"--with {word}: {method_word} reads no teacher")
        name = f"{method_word}_{teacher}" if teacher else method_word
        if name in objectives:
            raise UserError(f"--with {word}: the recipe has an objective of that name already")
        objectives[name] = objective = method()
        if teacher:
            objectives[name] = objective = replace(objective, teacher=teacher)  # type: ignore[call-arg]
        if isinstance(objective, TeacherObjective):
            teachers.setdefault(objective.teacher, TeacherConfig())
    return replace(
        recipe, objectives=objectives, teachers=teachers, selector=selector, masking=masking
    )


# --- stages --------------------------------------------------------------------------------------


def _compose_stages(
    stages: Mapping[str, Recipe], given: Mapping[str, list[str]]
) -> dict[str, Recipe]:
    added = _by_stage(stages, given.get("with_", []), "--with")
    dropped = _by_stage(stages, given.get("without", []), "--without")
    composed = {}
    for key, recipe in stages.items():
        with in_stage(key):
            composed[key] = _compose(recipe, added[key], dropped[key])
    return composed


def _changed_stages(
    stages: Mapping[str, Recipe],
    filled: RecipeFlags,
    given: Mapping[str, list[str]],
    notes: list[str],
) -> dict[str, Recipe]:
    """The recipes of the stages with what the flags replace in those they are for."""
    own = _by_stage(stages, filled.set, "--set")
    mine: dict[str, dict[str, list[str]]] = {key: {} for key in stages}
    for flag in flags_of(type(filled)):
        name = flag.field.name
        if name in given and (
            "path" in flag.field.metadata or name in ("distillation_alpha", "labels")
        ):
            for key in _stages_of(stages, flag, given[name]):
                mine[key][name] = given[name]
    changed = {}
    for key, recipe in stages.items():
        with in_stage(key):
            changed[key] = _changed(
                recipe, replace(filled, set=tuple(own[key])), mine[key], notes, key
            )
    return changed


def _stages_of(stages: Mapping[str, Recipe], flag: Any, words: Sequence[str]) -> list[str]:
    """The stages a flag is for; raises `UserError` with what to write where that is not plain."""
    keys = [*stages]
    scope = STAGED.get(flag.field.name)
    if scope == EVERY:
        return keys
    if scope == FIRST:
        return keys[:1]
    path = flag.field.metadata.get("path")
    if flag.field.name == "labels":
        taught = [key for key in keys if stages[key].teachers]
        if len(taught) == 1:
            return taught
        raise UserError(
            "--labels is a setting of one stage with a teacher: --set"
            " STAGE.teachers.NAME.labels=FOLDER"
        )
    if path is None:
        raise UserError(
            f"{flag.name} is a setting of one stage: give the weights themselves, --set"
            " STAGE.objectives.NAME.weight=VALUE"
        )
    value = words[0]
    if value.lower() == "none" and flag.optional and "none" not in get_args(flag.value.kind):
        value = "null"
    keys = [key for key in keys if path in flatten(stages[key])]
    if scope == TAUGHT and len(keys) == 1:
        return keys
    if not keys:
        others = [
            f"{key}.teachers.{name}" for key, stage in stages.items() for name in stage.teachers
        ]
        if others and path.startswith("teachers."):
            own = " or ".join(f"{teacher}.{path.rpartition('.')[2]}={value}" for teacher in others)
            raise UserError(
                f"{flag.name} is for a teacher called 'teacher', and no stage has one: write --set"
                f" {own}"
            )
        what = {
            "selector": "a patch selector (--with STAGE.maskedkd)",
            "teachers": "a teacher of that name (--with STAGE.kd)",
        }
        raise UserError(
            f"{flag.name} cannot take effect: no stage has {what.get(path.partition('.')[0], path)}"
        )
    raise UserError(
        f"{flag.name} is a setting of one stage: --set "
        + " or ".join(f"{key}.{path}={value}" for key in keys)
    )


def _by_stage(
    stages: Mapping[str, Recipe], words: Iterable[str], flag: str
) -> dict[str, list[str]]:
    """Words like ``finetune.kd`` under the stage they begin with, without it."""
    found: dict[str, list[str]] = {key: [] for key in stages}
    for word in words:
        key, dot, rest = word.partition(".")
        if not dot or not rest or key not in found:
            close = get_close_matches(key, found, n=1) if dot else []
            known = " or ".join(f"{flag} {stage}.{word}" for stage in found)
            hint = (
                f"there is no stage {key!r}: did you mean {close[0]!r}?"
                if close
                else f"say which stage it is for ({known})"
            )
            raise UserError(f"{flag} {word}: {hint}")
        found[key].append(rest)
    return found


def _common(stages: Mapping[str, Recipe]) -> dict[str, Any]:
    """The values of the stages by field, None where those that have it do not agree."""
    flat = [flatten(recipe) for recipe in stages.values()]
    paths = {path for values in flat for path in values}
    found = {}
    for path in paths:
        values = [of[path] for of in flat if path in of]
        found[path] = values[0] if all(value == values[0] for value in values) else None
    return found


def _about_stages(name: str, flags: type, stages: Mapping[str, Recipe]) -> str:
    def of(scope: str | None) -> str:
        known = [flag for flag in flags_of(flags) if "path" in flag.field.metadata]
        return ", ".join(flag.name for flag in known if STAGED.get(flag.field.name) == scope)

    text = (
        f"The recipe {name!r} has the stages {', '.join(stages)}. {EVERY.capitalize()} is meant by"
        f" {of(EVERY)}; {FIRST} by {of(FIRST)}; {TAUGHT} by {of(TAUGHT)}. The others are settings"
        " of one stage: --set STAGE.FIELD=VALUE. Defaults below are those in which the stages"
        " agree, none where they do not."
    )
    return wrap(text)


def _labels(recipe: Recipe, folder: str | None) -> dict[str, Any]:
    """Which teachers' labels are in ``folder``."""
    if folder is None:
        return {}
    if not recipe.teachers:
        raise UserError(
            "--labels cannot take effect: this recipe has no teacher (take a kd recipe, or"
            " --with kd)"
        )
    if len(recipe.teachers) == 1:
        (name,) = recipe.teachers
        own = Path(folder) / name
        return {f"teachers.{name}.labels": str(own if (own / MANIFEST).is_file() else folder)}
    found = {
        f"teachers.{name}.labels": str(Path(folder) / name)
        for name in recipe.teachers
        if (Path(folder) / name / MANIFEST).is_file()
    }
    lacking = [name for name in recipe.teachers if f"teachers.{name}.labels" not in found]
    if lacking:
        raise UserError(
            f"--labels {folder}: there are no labels of {' and '.join(lacking)} in it: label them"
            " too, or name those that are stored (--set teachers.NAME.labels=FOLDER) and let the"
            " others run"
        )
    return found


# --- what is refused, and the help ---------------------------------------------------------------


def _alpha(recipe: Recipe, alpha: float | None, given: Mapping[str, list[str]]) -> dict[str, Any]:
    if alpha is None:
        return {}
    if not {"ce", "kd"} <= recipe.objectives.keys():
        raise UserError(
            "--distillation-alpha weighs the objectives ce and kd, and this recipe does not have"
            " both"
        )
    if {"kd_weight", "ce_weight"} & given.keys():
        raise UserError(
            "--distillation-alpha sets both weights: leave --kd-weight and --ce-weight out"
        )
    if not 0 < alpha < 1:
        raise UserError(
            f"--distillation-alpha is {alpha:g}: give a number between 0 and 1, or drop ce or kd"
            " (--without)"
        )
    return {"objectives.kd.weight": alpha, "objectives.ce.weight": 1 - alpha}


def _refuse_idle(recipe: Recipe, given: Mapping[str, list[str]]) -> None:
    """Raise `UserError` for a given flag that another setting keeps from having any effect."""
    from timm.optim import get_optimizer_info, list_optimizers

    optim = recipe.optim
    if (
        "momentum" in given
        and optim.opt.lower() in list_optimizers()
        and not get_optimizer_info(optim.opt.lower()).has_momentum
    ):
        raise UserError(f"--momentum cannot take effect: the optimizer {optim.opt} has none")
    if "min_lr" in given and optim.sched == "none":
        raise UserError("--min-lr cannot take effect: --sched none keeps the learning rate")
    if "warmup_lr" in given and optim.warmup_epochs == 0:
        raise UserError("--warmup-lr cannot take effect: there is no warm-up (--warmup-epochs 0)")


def _about_defaults(name: str, flags: type, values: Mapping[str, Any]) -> str:
    idle = [
        flag.name
        for flag in flags_of(flags)
        if flag.field.metadata.get("path", "data.dir") not in values
    ]
    text = f"Defaults below are those of the recipe {name!r}"
    return wrap(
        f"{text}, in which these have no effect: {', '.join(idle)}." if idle else f"{text}."
    )


def _recipe_list() -> str:
    width = max(map(len, RECIPES)) + 2
    return "\n".join(
        wrap(f"  {name:<{width}}{named_recipe(name).description}", " " * (width + 2))
        for name in RECIPES
    )
