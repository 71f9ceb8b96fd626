"""The recipe: a tree of frozen dataclasses that says everything about a run, read from and written
to YAML strictly.
"""

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ..data.augment import Augment
from ..errors import ConfigError
from ..methods import method_class, method_name
from ..methods.base import Masking, Objective, TokenSelector
from ..methods.cross_entropy import CrossEntropy


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The network to train.

    Args:
        model: timm name, ``hf-hub:org/name``, ``local-dir:PATH`` or a folder with config.json.
        checkpoint: weights to start from, .safetensors or .pth; None: random.
        pretrained: start from timm's pretrained weights.
        image_size: side of its square input, pixels; None: the model's own.
        drop_path: stochastic depth rate of its last block, 0 to below 1.
        init: ``mae``: the initialisation of masked autoencoders, with a sine-cosine position table
            that is not trained; with weights to start from, only the table stays as it is.
            ``model``: the model's own.
        model_args: further arguments of the model, as timm takes them (``embed_dim``, ``depth``,
            ...).
    """

    model: str = "deit_tiny_patch16_224"
    checkpoint: str | None = None
    pretrained: bool = False
    image_size: int | None = None
    drop_path: float = 0.0
    init: Literal["model", "mae"] = "model"
    model_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A network to learn from.

    Args:
        model: as for the student.
        checkpoint: its weights, .safetensors or .pth.
        pretrained: take timm's pretrained weights (needs the network once, or timm's cache).
        image_size: side of the square input it is given, pixels; None: the model's own.
        precision: of its arithmetic. ``same``: that of the run; ``bfloat16`` is faster and not
            exact; ``float32``.
        reorder_classes: accept the data set's classes in another order, matched by name.
        model_args: further arguments of the model.
        labels: folder of its stored labels, which are read in its place; None: it runs. A model
            beside them is only compared with the one that made them.
        missing: what to do where labels have no record: ``error``, or ``online``: it runs on those
            images.
    """

    model: str = ""
    checkpoint: str | None = None
    pretrained: bool = False
    image_size: int | None = None
    precision: Literal["same", "float32", "bfloat16"] = "same"
    reorder_classes: bool = False
    model_args: dict[str, Any] = field(default_factory=dict)
    labels: str | None = None
    missing: Literal["error", "online"] = "error"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images.

    Args:
        dir: a folder or tar with ``train`` and ``val``, ``hfds/NAME``, a folder of parquet files,
            or ``torchvision/NAME?root=DIR``.
        workers: loader processes for images that are decoded one by one; no influence on the
            result.
        in_memory: keep the decoded training images in memory; None: when they fit 2 GiB.
        augment: the training views.
        views: how many different views of each image there are, shown in turn; None: a new one
            every epoch, or with stored labels as many as they have.
        seed: of the order of images and their views; None: ``train.seed``, or with stored labels
            theirs, so that one set of labels serves students of any seed.
    """

    dir: str = ""
    workers: int = 2
    in_memory: bool | None = None
    augment: Augment = field(default_factory=Augment)
    views: int | None = None
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule, in timm's names.

    Args:
        opt: a timm optimizer.
        lr: peak learning rate for the recipe's batch size.
        weight_decay: not applied to biases, norms and what the model exempts.
        momentum: for optimizers that have it.
        opt_args: further arguments of the optimizer (``betas``, ``eps``).
        layer_decay: learning-rate factor from one block to the one below it, above 0 to 1; None:
            none.
        clip_grad: largest gradient norm; None: no clipping.
        sched: a timm schedule, stepped every update.
        warmup_epochs: linear warm-up, epochs; warmup_lr: where it starts; min_lr: where the
            schedule ends.
        warmup_prefix: the schedule begins at its peak after the warm-up (as MAE's); otherwise it
            has been running meanwhile (as DeiT's).
    """

    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    opt_args: dict[str, Any] = field(default_factory=dict)
    layer_decay: float | None = None
    clip_grad: float | None = None
    sched: Literal["cosine", "tanh", "poly", "none"] = "cosine"
    warmup_epochs: float = 5.0
    warmup_prefix: bool = False
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        epochs: passes over the training images.
        batch_size: images an optimizer step, over all processes and accumulated micro-batches.
        accumulate: micro-batches a step is split into, to save memory; no influence on the losses.
        amp_dtype: autocast precision; ``auto``: bfloat16 on a GPU that has it, float32 on a CPU.
        compile: torch.compile the networks.
        ema_decay: decay of an exponential moving average of the weights, which is then what is
            evaluated and exported; None: none.
        seed: of everything random; of the images' order and views where ``data.seed`` is not given.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        save_every: steps between checkpoints; None: once an epoch.
        log_every: steps between log lines.
        keep_checkpoints: checkpoints to keep, at least 1.
        accept_changed_images: go on with images that are not those the run began with.
        eval_batch_size: images a step of evaluation and process.
    """

    epochs: int = 300
    batch_size: int = 1024
    accumulate: int = 1
    amp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = False
    ema_decay: float | None = None
    seed: int = 0
    eval_every: int = 1
    save_every: int | None = None
    log_every: int = 50
    keep_checkpoints: int = 2
    accept_changed_images: bool = False
    eval_batch_size: int = 256


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a run.

    Args:
        name: of the run's folder.
        description: what it reproduces, one line.
        objectives: losses by name; the names are those of the logged curves.
        selector: which patches the teachers see; None: all.
        masking: which patches student and teachers see; None: all.
    """

    name: str = "run"
    description: str = ""
    student: StudentConfig = field(default_factory=StudentConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    objectives: dict[str, Objective] = field(default_factory=lambda: {"ce": CrossEntropy()})
    selector: TokenSelector | None = None
    masking: Masking | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def data_seed(self) -> int:
        """The seed of the images' order and views."""
        return self.train.seed if self.data.seed is None else self.data.seed

    def __post_init__(self) -> None:
        train, optim, student = self.train, self.optim, self.student
        _require(is_folder_name(self.name), "name", self.name, "the plain name of a folder")
        for name in (*self.objectives, *self.teachers):
            _require(
                name.isidentifier(),
                "the name of an objective or a teacher",
                name,
                "of letters, digits and underscores",
            )
        for name in self.objectives.keys() & RESERVED_NAMES:
            _require(
                False,
                "the name of an objective",
                name,
                "another word: the logged curves use this one",
            )
        for name in self.teachers.keys() & {"student"}:
            _require(
                False,
                "the name of a teacher",
                name,
                "another word: messages call the network to train so",
            )
        _require(train.epochs >= 1, "train.epochs", train.epochs, "at least 1")
        _require(train.batch_size >= 1, "train.batch_size", train.batch_size, "at least 1")
        _require(train.accumulate >= 1, "train.accumulate", train.accumulate, "at least 1")
        _require(train.eval_every >= 1, "train.eval_every", train.eval_every, "at least 1")
        _require(train.log_every >= 1, "train.log_every", train.log_every, "at least 1")
        _require(
            train.keep_checkpoints >= 1,
            "train.keep_checkpoints",
            train.keep_checkpoints,
            "at least 1",
        )
        _require(
            train.eval_batch_size >= 1, "train.eval_batch_size", train.eval_batch_size, "at least 1"
        )
        _require(
            train.save_every is None or train.save_every >= 1,
            "train.save_every",
            train.save_every,
            "at least 1, or null",
        )
        _require(
            train.ema_decay is None or 0 < train.ema_decay < 1,
            "train.ema_decay",
            train.ema_decay,
            "between 0 and 1, or null",
        )
        _require(optim.lr > 0, "optim.lr", optim.lr, "above 0")
        _require(optim.weight_decay >= 0, "optim.weight_decay", optim.weight_decay, "at least 0")
        _require(
            optim.clip_grad is None or optim.clip_grad > 0,
            "optim.clip_grad",
            optim.clip_grad,
            "above 0, or null",
        )
        decay = optim.layer_decay
        _require(
            decay is None or 0 < decay <= 1,
            "optim.layer_decay",
            decay,
            "above 0 and at most 1, or null",
        )
        _require(optim.warmup_epochs >= 0, "optim.warmup_epochs", optim.warmup_epochs, "at least 0")
        _require(optim.warmup_lr >= 0, "optim.warmup_lr", optim.warmup_lr, "at least 0")
        _require(optim.min_lr >= 0, "optim.min_lr", optim.min_lr, "at least 0")
        _require(0 <= optim.momentum < 1, "optim.momentum", optim.momentum, "from 0 to below 1")
        _require(
            0 <= student.drop_path < 1, "student.drop_path", student.drop_path, "from 0 to below 1"
        )
        _require(self.data.workers >= 0, "data.workers", self.data.workers, "at least 0")
        for name, seed in (("train.seed", train.seed), ("data.seed", self.data.seed)):
            _require(
                seed is None or -(2**63) <= seed < 2**64,
                name,
                seed,
                "from -2**63 to 2**64 - 1, as torch takes it",
            )
        _require(
            self.data.views is None or self.data.views >= 1,
            "data.views",
            self.data.views,
            "at least 1, or null",
        )
        if self.data.views is not None and self.data.augment.repeated_aug > 1:
            raise ConfigError(
                "data.views counts the views of an image, and repeated_aug shows"
                f" {self.data.augment.repeated_aug} an epoch, of a part of the images: set"
                " --repeated-aug 1"
            )
        for name, teacher in self.teachers.items():
            if teacher.missing == "online" and teacher.labels is None:
                raise ConfigError(
                    f"teachers.{name}.missing cannot take effect: the {name} has no labels"
                    f" (teachers.{name}.labels)"
                )
            if teacher.missing == "online" and not teacher.model:
                raise ConfigError(
                    f"teachers.{name}.missing is online, and no model is named to run"
                    f" (teachers.{name}.model)"
                )
        if optim.sched == "none" and (optim.warmup_epochs > 0):
            raise ConfigError(
                "optim.sched is none, so optim.warmup_epochs cannot take effect: set it to 0 or"
                " choose a schedule"
            )
        if optim.warmup_prefix and optim.warmup_epochs == 0:
            raise ConfigError(
                "optim.warmup_prefix cannot take effect: there is no warm-up (optim.warmup_epochs"
                " is 0)"
            )
        if optim.sched != "none" and optim.warmup_epochs >= train.epochs:
            raise ConfigError(
                f"optim.warmup_epochs is {optim.warmup_epochs:g}, and train.epochs {train.epochs}:"
                " warm up for fewer than the run has (--warmup-epochs)"
            )


RESERVED_NAMES = frozenset({"loss", "loss_scale", "grad_norm", "lr", "kind", "step", "epoch"})
"""Columns of the run's log beside its objectives."""


def is_folder_name(name: str) -> bool:
    """Whether a folder can be called so, anywhere."""
    return bool(name.strip()) and name not in (".", "..") and not set(name) & set("/\\\0")


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}: it has to be {wanted}")


# --- to and from plain data ----------------------------------------------------------------------


def to_dict(value: Any) -> Any:
    """A recipe, or any part of it, as plain data: dicts, lists, strings, numbers, booleans,
    None.
    """
    if isinstance(value, Objective | TokenSelector | Masking):
        return {"method": method_name(value), **_fields(value)}
    if dataclasses.is_dataclass(value):
        return _fields(value)
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return value


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}


def from_dict(data: Any, source: str = "the recipe") -> Recipe:
    """A recipe from plain data; raises `ConfigError` for an unknown key (with a suggestion) or a
    value of the wrong type.
    """
    recipe = _convert(data, Recipe, "", source)
    assert isinstance(recipe, Recipe)
    return recipe


def convert(value: Any, kind: Any, name: str) -> Any:
    """``value`` as a ``kind`` (a type, a union with None, a Literal); raises `ConfigError` naming
    ``name``.
    """
    return _convert(value, kind, name, "")


def _convert(value: Any, kind: Any, path: str, source: str) -> Any:
    where = " in ".join(part for part in (path, source) if part)
    if isinstance(kind, type) and issubclass(kind, Objective | TokenSelector | Masking):
        return _convert_method(value, kind, path, source)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        return _convert_dataclass(value, typing.cast(type, kind), path, source, where)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(kind), path, source, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise ConfigError(
                f"{where} is {value!r}: choose from"
                f" {', '.join(map(repr, get_args(kind)))}{_close(value, get_args(kind))}"
            )
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {_short(value)}: a mapping is needed")
        return {
            str(key): _convert(item, get_args(kind)[1], f"{path}.{key}", source)
            for key, item in value.items()
        }
    if origin is tuple:
        args = get_args(kind)
        if args[-1] is Ellipsis:
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{where} is {_short(value)}: a list is needed, e.g. [0, 1]")
            return tuple(
                _convert(item, args[0], f"{path}[{i}]", source) for i, item in enumerate(value)
            )
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise ConfigError(
                f"{where} is {_short(value)}: a list of {len(args)} numbers is needed"
            )
        return tuple(
            _convert(item, arg, f"{path}[{i}]", source)
            for i, (item, arg) in enumerate(zip(value, args, strict=True))
        )
    return _convert_scalar(value, kind, where)


def _convert_scalar(value: Any, kind: Any, where: str) -> Any:
    if kind is Any:
        _require_plain(value, where)
        return value
    number = _number(value) if kind in (int, float) else None
    if kind is float and number is not None:
        return float(number)
    if kind is int and number is not None and number == int(number):
        return int(number)
    if isinstance(value, kind) and kind not in (int, float):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{where} is {_short(value)}: {names.get(kind, kind.__name__)} is needed")


def _number(value: Any) -> int | float | None:
    """A finite number, from text too (the command line has nothing else); None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    for read in (int, float):
        try:
            number = read(value) if isinstance(value, str) else value
            return number if math.isfinite(number) else None
        except (ValueError, OverflowError):
            continue
    return None


def _require_plain(value: Any, where: str) -> None:
    """Raise `ConfigError` unless YAML and JSON can hold ``value``."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            _require_plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _require_plain(item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {value!r}: a finite number is needed")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ConfigError(
            f"{where} is {_short(value)}: text, a number, true, false, null, or lists and mappings"
            " of these are needed"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _convert_union(value: Any, options: tuple[Any, ...], path: str, source: str, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _convert(value, options[0], path, source)
    for option in options:
        try:
            return _convert(value, option, path, source)
        except ConfigError:
            continue
    raise ConfigError(
        f"{where} is {_short(value)}:"
        f" {' or '.join(getattr(o, '__name__', str(o)) for o in options)} is needed"
    )


def _convert_dataclass(value: Any, kind: type, path: str, source: str, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {_short(value)}: a mapping is needed")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in names:
            full = f"{path}.{key}" if path else str(key)
            raise ConfigError(
                f"{source} has an unknown field"
                f" {full!r}{_close(key, names) or ': known are ' + ', '.join(names)}"
            )
    for f in dataclasses.fields(kind):
        if (
            f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
            and f.name not in value
        ):
            raise ConfigError(f"{where} lacks the field {f.name!r}, which has no default")
    return kind(
        **{
            key: _convert(item, hints[key], f"{path}.{key}" if path else key, source)
            for key, item in value.items()
        }
    )


def _convert_method(value: Any, kind: type, path: str, source: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping) or "method" not in value:
        wanted = "a mapping with the key 'method' is needed, e.g. {method: kd, weight: 0.5}"
        raise ConfigError(f"{path} in {source} is {_short(value)}: {wanted}")
    cls = method_class(str(value["method"]))
    if not issubclass(cls, kind):
        wanted = {
            "Objective": "an objective",
            "TokenSelector": "a patch selector",
            "Masking": "a masking",
        }[kind.__name__]
        raise ConfigError(
            f"{path} in {source} names the method {value['method']!r}, which is not {wanted}"
        )
    rest = {key: item for key, item in value.items() if key != "method"}
    return _convert_dataclass(rest, cls, path, source, f"{path} in {source}")


def _close(value: Any, names: Any) -> str:
    close = get_close_matches(str(value), [str(name) for name in names], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def replace_fields(
    recipe: Recipe, values: Mapping[str, Any], source: str = "the command line"
) -> Recipe:
    """The recipe with the fields at dotted paths (``optim.lr``) replaced, all at once.

    Raises:
        ConfigError: a path or value is wrong, or the whole no longer makes sense.
    """
    data = to_dict(recipe)
    for path, value in values.items():
        node, parts = data, path.split(".")
        for i, part in enumerate(parts[:-1]):
            if not isinstance(node, dict) or part not in node:
                known = node if isinstance(node, dict) else {}
                raise ConfigError(
                    f"the recipe has no field {'.'.join(parts[: i + 1])!r}{_close(part, known)}"
                )
            if node[part] is None:
                raise ConfigError(_of_null(".".join(parts[: i + 1]), parts[i + 1]))
            node = node[part]
        open_ended = len(parts) > 1 and parts[-2] in ("model_args", "opt_args")
        if not isinstance(node, dict) or (parts[-1] not in node and not open_ended):
            known = node if isinstance(node, dict) else {}
            raise ConfigError(f"the recipe has no field {path!r}{_close(parts[-1], known)}")
        node[parts[-1]] = value
    return from_dict(data, source)


def _of_null(path: str, name: str) -> str:
    """Why the field ``name`` of something that is null cannot be replaced, and what to do."""
    if path == "selector":
        return "the recipe has no patch selector: add one first (--with maskedkd)"
    if path == "masking":
        return "the recipe has no masking: add one first (--with random_masking)"
    if path.endswith(".schedule"):
        return (
            f"{path} is null, so it has no {name!r}: give the whole of it, --set {path}='{{to: 0}}'"
        )
    return f"{path} is null, so it has no {name!r}: set it itself, --set {path}=VALUE"


# --- YAML ----------------------------------------------------------------------------------------


_PLAIN_WORDS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
"""What words without quotes mean: YAML 1.2's core schema. PyYAML's own 1.1 reads 1e-3 as text, no
as false, 010 as 8, 1:30 as 90.
"""


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and aliases and tags, which no recipe needs."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own name for a table of the class)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        mark, tag = event.start_mark, getattr(event, "tag", None)
        if isinstance(event, yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)
        if tag is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the tag {tag!r} is not allowed", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: Any) -> int:
        """Whole numbers are decimal, a leading 0 or not."""
        return int(self.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the words that `_StrictLoader` would not read as text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own name for a table of the class)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_decimal)
for _kind, _pattern in _PLAIN_WORDS.items():
    for _class in (_StrictLoader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), None
        )


def _read_yaml(text: str, source: str) -> Any:
    """Raises `ConfigError` naming ``source`` and the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{source}{line} is not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None


def parse_value(text: str, name: str) -> Any:
    """One value as a recipe file would write it; raises `ConfigError` naming ``name``."""
    return _read_yaml(text, f"the value of {name}")


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping a recipe file holds, not looked at yet; raises `ConfigError` naming the line that
    is wrong.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"the recipe {path} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error.strerror}") from None
    data = _read_yaml(text, f"the recipe {path}")
    if not isinstance(data, dict):
        raise ConfigError(f"the recipe {path} is not a mapping of fields")
    return data


def load_recipe(path: str | Path) -> Recipe:
    """Read the recipe file of one run; raises `ConfigError` naming the line, or the field, that is
    wrong.

    `vitdistill.recipes.stages.load` also reads those of several stages.
    """
    data = read_mapping(path)
    if "stages" in data:
        raise ConfigError(
            f"the recipe {path} has stages, and that of one run is needed: name the recipe.yaml in"
            " a stage's folder"
        )
    try:
        return from_dict(data, str(path))
    except ConfigError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return dump_yaml(to_dict(recipe))


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that is read back to equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


VOLATILE = (
    "data.workers",
    "train.log_every",
    "train.keep_checkpoints",
    "train.accept_changed_images",
    "name",
    "description",
    "data.dir",
)
"""Fields that do not change the result, so that a run may be resumed with others. Images are
compared by fingerprint, not by path; and so are stored labels (``teachers.NAME.labels``)."""


def _is_volatile(path: str) -> bool:
    return path in VOLATILE or bool(re.fullmatch(r"teachers\.\w+\.labels", path))


def weights_files(recipe: Recipe) -> dict[str, str]:
    """The weights files the recipe names, by the field that does."""
    configs: dict[str, StudentConfig | TeacherConfig] = {"student": recipe.student}
    configs |= {f"teachers.{name}": teacher for name, teacher in recipe.teachers.items()}
    return {
        f"{key}.checkpoint": config.checkpoint
        for key, config in configs.items()
        if config.checkpoint
    }


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Every leaf of the recipe by its dotted path."""

    def walk(node: Any, path: str) -> dict[str, Any]:
        if isinstance(node, dict) and node:
            return {
                k: v
                for key, item in node.items()
                for k, v in walk(item, f"{path}.{key}" if path else key).items()
            }
        return {path: node}

    return walk(to_dict(recipe), "")


def fingerprint(recipe: Recipe) -> str:
    """sha256 of everything in the recipe that can change the result, but for where weights files
    are: they are known by their content.
    """
    recipe = from_dict(
        to_dict(recipe)
    )  # a recipe made in Python may hold 5 where the one read from its YAML holds 5.0
    files = weights_files(recipe)
    fixed = {
        key: value
        for key, value in flatten(recipe).items()
        if not _is_volatile(key) and key not in files
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """The fields that differ and can change the result, as ``field: ours, theirs`` lines."""
    a, b = flatten(ours), flatten(theirs)
    lines = []
    for key in sorted(a.keys() | b.keys()):
        if not _is_volatile(key) and a.get(key) != b.get(key):
            lines.append(f"{key} is {a.get(key)!r} here and {b.get(key)!r} there")
    return lines
