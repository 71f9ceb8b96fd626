"""The recipe: a tree of frozen dataclasses that says everything about a run."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, Set
from ..messages import listed, plural
from ..methods.base import Masking, Objective, TokenSelector
from ..methods.cross_entropy import CrossEntropy
from ..option import check_options
from .settings import DataConfig, OptimConfig, StudentConfig, TeacherConfig, TrainConfig

RESERVED_NAMES = frozenset({"loss", "loss_scale", "grad_norm", "lr", "kind", "step", "epoch"})
"""Columns of the run's log beside its objectives."""

MOST_WARMUP = 0.2


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a run.

    Args:
        name: of the run's folder.
        description: what it reproduces, one line.
        objectives: losses by name; the names are those of the logged curves.
        selector: which patches the teachers see; None: all.
        masking: which patches student and teachers see; None: all.

    Raises:
        ConfigError: a value is out of its bounds, or two cannot take effect together.
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

    def __post_init__(self) -> None:
        check_folder_name(self.name)
        check_names("objectives", self.objectives, RESERVED_NAMES)
        check_names("teachers", self.teachers, {"student"})
        parts = {"data": self.data, "optim": self.optim, "train": self.train, **self.networks}
        for path, part in parts.items():
            check_options(part, path)
        for path, network in self.networks.items():
            _check_network(path, network)
        _check_schedule(self.optim, self.train.epochs)
        if self.data.unlabelled is None and self.data.labelled_share != DataConfig.labelled_share:
            what = "labelled_share has no effect without unlabelled images"
            fixes = Set("data.unlabelled"), Set("data.labelled_share", DataConfig.labelled_share)
            raise ConfigError(what, fixes, field="data.labelled_share")
        repeats = self.data.augment.repeated_aug
        if self.data.views is not None and repeats > 1:
            what = f"views cannot be set with repeated augmentation ({repeats} views an epoch)"
            raise ConfigError(what, Set("data.augment.repeated_aug", 1), field="data.views")

    @property
    def networks(self) -> dict[str, StudentConfig | TeacherConfig]:
        """The networks by the field that describes them: ``student``, ``teachers.NAME``."""
        return {"student": self.student, **{f"teachers.{n}": t for n, t in self.teachers.items()}}

    @property
    def learns_without_labels(self) -> bool:
        """Whether an objective learns from images without labels."""
        return not all(objective.reads_labels for objective in self.objectives.values())

    @property
    def num_views(self) -> int:
        """How many different views of an image a run shows."""
        return self.data.views or self.train.epochs

    @property
    def data_seed(self) -> int:
        """The seed of the images' order and views."""
        return self.train.seed if self.data.seed is None else self.data.seed


def check_folder_name(name: str, field: str = "name") -> None:
    """Raise `ConfigError` unless a folder can be called ``name`` on any system."""
    if not name.strip() or name in (".", "..") or set(name) & set("/\\\0"):
        raise ConfigError(f"{field} is {name!r}", "give the plain name of a folder", field=field)


def check_names(field: str, names: Collection[str], reserved: Collection[str] = ()) -> None:
    """Raise `ConfigError` unless the keys of a mapping can stand in dotted paths and in logs."""
    for name in names:
        if not name.isidentifier() or name in reserved:
            what = f"{field} has the name {name!r}"
            taken = f", but not {listed(sorted(reserved))}" if reserved else ""
            fix = f"give one of letters, digits and underscores{taken}"
            raise ConfigError(what, fix, field=field)


_NOT_ARGS = {
    "checkpoint": "a setting of its own",
    "pretrained": "a setting of its own",
    "image_size": "a setting of its own",
    "drop_path": "timm's drop_path_rate",
    "num_classes": "known from the images of a student, and from the weights of a teacher",
    "name": "what the model already says",
}
"""Arguments that are no ``model_args``, and why."""


def _check_network(path: str, config: StudentConfig | TeacherConfig) -> None:
    """Raise `ConfigError` for a timm argument that is set elsewhere, and for a teacher that could
    not answer where its labels have no record.
    """
    for name in sorted(config.model_args.keys() & _NOT_ARGS):
        field, other = f"{path}.model_args.{name}", f"{path}.{name}"
        fix = Set(other) if hasattr(config, name) else f"leave {name} out"
        raise ConfigError(f"{field} is {_NOT_ARGS[name]}", fix, field=field)
    if isinstance(config, TeacherConfig) and config.missing == "online":
        for part in ("labels", "model"):
            if not getattr(config, part):
                what = f"{path}.missing is 'online', which needs {path}.{part}"
                raise ConfigError(what, (Set(f"{path}.{part}"), Set(f"{path}.missing", "error")))


def fit_warmup(recipe: Recipe, values: Mapping[str, Any]) -> float | None:
    """Return a warm-up for the epochs in ``values``: a fifth of them, or the recipe's share if that
    is more. None unless that is shorter than the recipe's own and nobody gave one.
    """
    epochs, warmup = values.get("train.epochs"), recipe.optim.warmup_epochs
    if "optim.warmup_epochs" in values or type(epochs) is not int or epochs < 1:
        return None
    fitting = round(epochs * max(warmup / recipe.train.epochs, MOST_WARMUP), 6)
    return fitting if fitting < warmup else None


def _check_schedule(optim: OptimConfig, epochs: int) -> None:
    warmup, field = optim.warmup_epochs, "optim.warmup_epochs"
    if optim.sched != "none" and optim.min_lr > optim.lr:
        what = f"optim.min_lr {optim.min_lr:g} is above optim.lr {optim.lr:g}"
        raise ConfigError(what, Set("optim.min_lr", 0.0))
    if optim.sched == "none" and warmup > 0:
        fixes = (Set(field, 0), Set("optim.sched", "cosine"))
        raise ConfigError(f"without a schedule {field} cannot take effect", fixes, field=field)
    if optim.sched != "none" and warmup >= epochs:
        what = f"the warm-up takes the whole run: {warmup:g} of {plural(epochs, 'epoch')}"
        raise ConfigError(what, Set(field, 0))
