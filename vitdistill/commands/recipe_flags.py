"""Flags that change a recipe: timm's spellings, DeiT's as aliases, and every other field by ``--set``."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from tyro.conf import arg

from ..errors import ConfigError
from ..method import Objective
from ..methods import method_class
from ..recipe import Recipe, flatten, replace_fields
from ..recipes import RECIPES, find_recipe, named_recipe


def _at(path: str) -> Any:
    """A flag whose default is the recipe's value at ``path``; None where the recipe has no such field."""
    return field(default=None, metadata={"path": path})


@dataclass
class RecipeFlags:
    """Flags shared by ``train`` and ``explain``."""

    data_dir: Annotated[str | None, arg(help="images: a folder or tar with train/ and val/, parquet files, hfds/NAME, torchvision/NAME?root=DIR")] = _at("data.dir")
    model: Annotated[str | None, arg(help="student: timm name, hf-hub:ORG/NAME, or a folder with config.json")] = _at("student.model")
    model_path: Annotated[str | None, arg(help="weights the student starts from (.safetensors, .pth)")] = _at("student.checkpoint")
    pretrained: Annotated[bool | None, arg(help="start the student from timm's pretrained weights")] = _at("student.pretrained")
    img_size: Annotated[int | None, arg(help="side of the student's square input, pixels; None: the model's own")] = _at("student.image_size")
    drop_path: Annotated[float | None, arg(help="stochastic depth rate of the student's last block")] = _at("student.drop_path")
    teacher_model: Annotated[str | None, arg(aliases=["--kd-model-name"], help="teacher: timm name, hf-hub:ORG/NAME, or a run's or export's folder")] = _at("teachers.teacher.model")
    teacher_path: Annotated[str | None, arg(help="the teacher's weights (.safetensors, .pth)")] = _at("teachers.teacher.checkpoint")
    teacher_pretrained: Annotated[bool | None, arg(help="take timm's pretrained weights for the teacher")] = _at("teachers.teacher.pretrained")
    teacher_img_size: Annotated[int | None, arg(help="side of the teacher's square input, pixels; None: the model's own")] = _at("teachers.teacher.image_size")
    teacher_precision: Annotated[Literal["same", "float32", "bfloat16"] | None, arg(help="the teacher's arithmetic; bfloat16 is faster, not exact")] = _at("teachers.teacher.precision")
    reorder_classes: Annotated[bool | None, arg(help="accept a teacher with the classes in another order, matched by name")] = _at("teachers.teacher.reorder_classes")
    keep_rate: Annotated[float | None, arg(help="fraction of its patches the teacher sees, above 0 to 1")] = _at("selector.keep_rate")
    num_keep: Annotated[int | None, arg(aliases=["--len-num-keep"], help="number of patches the teacher sees, instead of --keep-rate")] = _at("selector.num_keep")
    temperature: Annotated[float | None, arg(aliases=["--distillation-tau", "--kd-temperature"], help="T of the soft distillation loss, which carries T^2")] = _at("objectives.kd.temperature")
    kd_weight: Annotated[float | None, arg(aliases=["--distill-loss-weight"], help="weight of the distillation loss")] = _at("objectives.kd.weight")
    ce_weight: Annotated[float | None, arg(aliases=["--task-loss-weight"], help="weight of the cross-entropy with the labels")] = _at("objectives.ce.weight")
    distillation_alpha: Annotated[float | None, arg(help="DeiT's alpha: sets the distillation weight to alpha and the cross-entropy's to 1 - alpha")] = None
    smoothing: Annotated[float | None, arg(help="label smoothing, 0 to below 1")] = _at("objectives.ce.smoothing")
    epochs: Annotated[int | None, arg(help="passes over the training images")] = _at("train.epochs")
    batch_size: Annotated[int | None, arg(aliases=["-b"], help="images a step, over ALL processes")] = _at("train.batch_size")
    accumulate: Annotated[int | None, arg(aliases=["--grad-accum-steps"], help="micro-batches a step is split into, to save memory")] = _at("train.accumulate")
    opt: Annotated[str | None, arg(help="a timm optimizer")] = _at("optim.opt")
    lr: Annotated[float | None, arg(help="peak learning rate, not scaled by the batch size")] = _at("optim.lr")
    weight_decay: Annotated[float | None, arg(help="not applied to biases and norms")] = _at("optim.weight_decay")
    momentum: Annotated[float | None, arg(help="for optimizers that have it")] = _at("optim.momentum")
    layer_decay: Annotated[float | None, arg(help="learning-rate factor from one block to the one below")] = _at("optim.layer_decay")
    clip_grad: Annotated[float | None, arg(help="largest gradient norm; None: no clipping")] = _at("optim.clip_grad")
    sched: Annotated[Literal["cosine", "tanh", "poly", "none"] | None, arg(help="learning-rate schedule, moved every step")] = _at("optim.sched")
    warmup_epochs: Annotated[float | None, arg(help="epochs of linear warm-up")] = _at("optim.warmup_epochs")
    warmup_lr: Annotated[float | None, arg(help="learning rate the warm-up starts from")] = _at("optim.warmup_lr")
    min_lr: Annotated[float | None, arg(help="learning rate the schedule ends at")] = _at("optim.min_lr")
    crop: Annotated[Literal["rrc", "pad", "center"] | None, arg(help="rrc: RandomResizedCrop; pad: padded crop for small images; center: none")] = _at("data.augment.crop")
    aa: Annotated[str | None, arg(help="timm's auto-augment string, e.g. rand-m9-mstd0.5-inc1; None: none")] = _at("data.augment.aa")
    color_jitter: Annotated[float | None, arg(help="strength of colour jitter")] = _at("data.augment.color_jitter")
    hflip: Annotated[float | None, arg(help="probability of a horizontal flip")] = _at("data.augment.hflip")
    reprob: Annotated[float | None, arg(help="probability of random erasing")] = _at("data.augment.reprob")
    mixup: Annotated[float | None, arg(help="alpha of Mixup; 0: none")] = _at("data.augment.mixup")
    cutmix: Annotated[float | None, arg(help="alpha of CutMix; 0: none")] = _at("data.augment.cutmix")
    repeated_aug: Annotated[int | None, arg(help="views of an image an epoch; DeiT: 3")] = _at("data.augment.repeated_aug")
    workers: Annotated[int | None, arg(aliases=["-j"], help="loader processes; no influence on the result")] = _at("data.workers")
    in_memory: Annotated[bool | None, arg(help="keep decoded images in memory; None: if they fit 2 GiB")] = _at("data.in_memory")
    amp_dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"] | None, arg(help="precision; auto: bfloat16 on a GPU, float32 on a CPU")] = _at("train.amp_dtype")
    torchcompile: Annotated[bool | None, arg(help="torch.compile the networks")] = _at("train.compile")
    model_ema_decay: Annotated[float | None, arg(help="decay of a moving average of the weights, which is then evaluated and exported")] = _at("train.ema_decay")
    seed: Annotated[int | None, arg(help="of everything random")] = _at("train.seed")
    eval_every: Annotated[int | None, arg(help="epochs between evaluations")] = _at("train.eval_every")
    save_every: Annotated[int | None, arg(help="steps between checkpoints; None: once an epoch")] = _at("train.save_every")
    log_every: Annotated[int | None, arg(help="steps between log lines")] = _at("train.log_every")
    with_: Annotated[tuple[str, ...], arg(name="with", metavar="METHOD ...", help="methods to add, e.g. --with hard_kd; a selector replaces the recipe's")] = ()
    without: Annotated[tuple[str, ...], arg(metavar="NAME ...", help="objectives to drop, or 'selector'")] = ()
    set: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE ...", help="any other field of the recipe, e.g. --set optim.opt_args.eps=1e-8 student.model_args.depth=6")] = ()


Flags = TypeVar("Flags", bound=RecipeFlags)

_MISSING_PLACE = {
    "selector": "this recipe has no patch selector: use a maskedkd recipe, or --with maskedkd",
    "teachers": "this recipe has no teacher: use a kd or maskedkd recipe",
    "objectives": "this recipe has no such objective",
}


def parse(command: str, flags: type[Flags], words: Sequence[str], description: str) -> tuple[Flags, Recipe]:
    """Read ``[RECIPE] [flags]``: the flags' defaults are the recipe's own values, and what was given replaces them.

    Raises:
        ConfigError: an unknown recipe, method or field, or a flag that cannot take effect in this recipe.
    """
    words = list(words)
    name = words.pop(0) if words and not words[0].startswith("-") else "maskedkd"
    recipe = find_recipe(name)
    recipe = _compose(recipe, _values(words, "--with"), _values(words, "--without"))
    values = flatten(recipe)
    defaults = {f.name: values.get(f.metadata["path"]) for f in fields(flags) if "path" in f.metadata}
    rest = {f.name: f.default for f in fields(flags) if f.name not in defaults and f.default is not MISSING}
    defaulted = flags(**{**rest, **defaults})
    given = tyro.cli(
        flags,
        args=_switches(words, flags),
        default=defaulted,
        prog=f"vitdistill {command} [RECIPE]",
        description=f"{description}\n\nDefaults below are those of the recipe {name!r}. Recipes:\n{_recipe_list()}\n  or the path of a YAML file, or of a run folder",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    changes: dict[str, Any] = {}
    for f in fields(flags):
        path = f.metadata.get("path")
        value = getattr(given, f.name)
        if path is None or value == defaults[f.name]:
            continue
        if path not in values:
            raise ConfigError(f"--{f.name.replace('_', '-')} cannot take effect: {_MISSING_PLACE[path.split('.')[0]]}")
        changes[path] = value
    changes |= _alpha(recipe, given.distillation_alpha)
    for item in given.set:
        path, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r} has no '=': write FIELD=VALUE, e.g. optim.lr=0.001")
        changes[path] = yaml.safe_load(text)
    recipe = replace_fields(recipe, changes)
    if recipe.selector is not None and given.num_keep is not None and given.keep_rate != defaults["keep_rate"]:
        raise ConfigError("--keep-rate and --num-keep both say how many patches the teacher sees: give one of them")
    return given, recipe


def _switches(words: Sequence[str], flags: type[RecipeFlags]) -> list[str]:
    """``--torchcompile`` alone means ``--torchcompile True``: these flags can also be taken back, so tyro wants a value."""
    names = {f"--{f.name.replace('_', '-')}" for f in fields(flags) if "bool | None" in str(f.type)}
    out: list[str] = []
    for i, word in enumerate(words):
        out.append(word)
        if word.replace("_", "-") in names:
            following = words[i + 1].lower() if i + 1 < len(words) else ""
            if following not in ("true", "false", "none"):
                out.append("True")
        elif out[-2:-1] and out[-2].replace("_", "-") in names:
            out[-1] = word.capitalize()
    return out


def _values(words: list[str], flag: str) -> list[str]:
    """The words after ``flag``, which is read before the others because it decides which flags have an effect."""
    if flag not in words:
        return []
    start = words.index(flag) + 1
    end = next((i for i in range(start, len(words)) if words[i].startswith("-")), len(words))
    return words[start:end]


def _compose(recipe: Recipe, added: Sequence[str], dropped: Sequence[str]) -> Recipe:
    for name in dropped:
        if name == "selector" and recipe.selector is not None:
            recipe = replace(recipe, selector=None)
        elif name in recipe.objectives:
            recipe = replace(recipe, objectives={key: item for key, item in recipe.objectives.items() if key != name})
        else:
            known = ", ".join([*recipe.objectives, *(["selector"] if recipe.selector is not None else [])])
            raise ConfigError(f"--without {name}: the recipe has no such part, only {known}")
    for name in added:
        method = method_class(name)
        if issubclass(method, Objective):
            recipe = replace(recipe, objectives={**recipe.objectives, name: method()})
        else:
            recipe = replace(recipe, selector=method())
    return recipe


def _alpha(recipe: Recipe, alpha: float | None) -> dict[str, Any]:
    if alpha is None:
        return {}
    if not {"ce", "kd"} <= recipe.objectives.keys():
        raise ConfigError("--distillation-alpha weighs the objectives ce and kd, and this recipe does not have both")
    if not 0 < alpha < 1:
        raise ConfigError(f"--distillation-alpha is {alpha:g}: give a number between 0 and 1, or leave one of ce and kd out (--without)")
    return {"objectives.kd.weight": alpha, "objectives.ce.weight": 1 - alpha}


def _recipe_list() -> str:
    width = max(map(len, RECIPES)) + 2
    return "\n".join(f"  {name:<{width}}{named_recipe(name).description}" for name in RECIPES)
