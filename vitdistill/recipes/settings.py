"""The settings of a run that are the same for every method: networks, images, optimizer, loop.

Each is described where it is declared, and flags, help and checks follow from that. This module
imports neither torch nor timm, so that a mistyped flag is answered at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from ..data.augment import Augment
from ..option import Option, option, options_of

SEEDS: dict[str, Any] = {"at_least": -(2**63), "below": 2**64}
"""What torch takes as a seed."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The network to train."""

    model: str = option(
        "deit_tiny_patch16_224",
        "timm name, hf-hub:ORG/NAME, or a folder with config.json",
        "--model",
        stages="first",
    )
    checkpoint: str | None = option(
        None,
        "weights it starts from (.safetensors, .pth); none: random",
        "--model-path",
        stages="first",
        metavar="FILE",
    )
    pretrained: bool = option(
        False, "start from timm's pretrained weights", "--pretrained", stages="first"
    )
    image_size: int | None = option(
        None,
        "side of its square input, pixels; none: its own; not square:"
        " student.model_args.img_size=[H,W]",
        "--img-size",
        stages="first",
        metavar="PIXELS",
    )
    drop_path: float = option(
        0.0, "stochastic depth rate of its last block", "--drop-path", at_least=0, below=1
    )
    init: Literal["model", "mae"] = option(
        "model",
        "mae: MAE's initialization, with a fixed sine-cosine position table (the table alone where"
        " weights are given); model: the model's own",
    )
    model_args: dict[str, Any] = option(
        dict, "further arguments of the model, as timm takes them (embed_dim, depth, ...)"
    )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A network to learn from.

    With ``labels`` it does not run: its stored answers are read, and a ``model`` beside them is
    only compared with the one that made them.
    """

    model: str = option(
        "",
        "timm name, hf-hub:ORG/NAME, or a run's or export's folder",
        "--teacher-model",
        aliases=("--kd-model-name",),
        stages="taught",
    )
    checkpoint: str | None = option(
        None,
        "its weights (.safetensors, .pth)",
        "--teacher-path",
        stages="taught",
        metavar="FILE",
    )
    pretrained: bool = option(
        False, "take timm's pretrained weights", "--teacher-pretrained", stages="taught"
    )
    image_size: int | None = option(
        None,
        "side of its square input, pixels; none: its own",
        "--teacher-img-size",
        stages="taught",
        metavar="PIXELS",
    )
    precision: Literal["same", "float32", "bfloat16"] = option(
        "same",
        "its arithmetic; same: the run's; bfloat16 is faster, not exact",
        "--teacher-precision",
        stages="taught",
    )
    reorder_classes: bool = option(
        False,
        "accept its classes in another order, matched by name",
        "--reorder-classes",
        stages="taught",
    )
    model_args: dict[str, Any] = option(dict, "further arguments of the model")
    labels: str | None = option(None, "folder of its stored labels; none: it runs")
    missing: Literal["error", "online"] = option(
        "error", "where labels have no record: stop, or run it on those images"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images."""

    dir: str = option(
        "",
        "a folder or tar with train/ and val/, parquet files, hfds/NAME, torchvision/NAME?root=DIR",
        "--data-dir",
        stages="every",
        metavar="FOLDER",
    )
    workers: int = option(
        2,
        "loader processes; no influence on the result",
        "--workers",
        aliases=("-j",),
        stages="every",
        at_least=0,
    )
    in_memory: bool | None = option(
        None,
        "keep decoded images in memory; none: if they fit 2 GiB",
        "--in-memory",
        stages="every",
    )
    augment: Augment = option(Augment, "the training views")
    views: int | None = option(
        None,
        "different views there are of an image, in turn; none: one an epoch, or as labelled",
        "--views",
        at_least=1,
    )
    seed: int | None = option(
        None, "of the images' order and views; none: train.seed, or that of the labels", **SEEDS
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule, in timm's names."""

    opt: str = option("adamw", "a timm optimizer", "--opt")
    lr: float = option(1e-3, "peak learning rate, not scaled by the batch size", "--lr", above=0)
    weight_decay: float = option(
        0.05, "not applied to biases and norms", "--weight-decay", at_least=0
    )
    momentum: float = option(0.9, "for optimizers that have it", "--momentum", at_least=0, below=1)
    opt_args: dict[str, Any] = option(dict, "further arguments of the optimizer (betas, eps)")
    layer_decay: float | None = option(
        None,
        "learning-rate factor from one block to the one below",
        "--layer-decay",
        above=0,
        at_most=1,
    )
    clip_grad: float | None = option(
        None, "largest gradient norm; none: no clipping", "--clip-grad", above=0
    )
    sched: Literal["cosine", "tanh", "poly", "none"] = option(
        "cosine", "learning-rate schedule, moved every step", "--sched"
    )
    warmup_epochs: float = option(5.0, "epochs of linear warm-up", "--warmup-epochs", at_least=0)
    warmup_prefix: bool = option(
        False,
        "the schedule begins at its peak after the warm-up (as MAE's), not before it (as DeiT's)",
    )
    warmup_lr: float = option(
        1e-6, "learning rate the warm-up starts from", "--warmup-lr", at_least=0
    )
    min_lr: float = option(1e-5, "learning rate the schedule ends at", "--min-lr", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: int = option(300, "passes over the training images", "--epochs", at_least=1)
    batch_size: int = option(
        1024, "images a step, over ALL processes", "--batch-size", aliases=("-b",), at_least=1
    )
    accumulate: int = option(
        1,
        "micro-batches a step is split into, to save memory",
        "--accumulate",
        aliases=("--grad-accum-steps",),
        at_least=1,
    )
    amp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "precision; auto: bfloat16 on a GPU, float32 on a CPU",
        "--amp-dtype",
        stages="every",
    )
    compile: bool = option(False, "torch.compile the networks", "--torchcompile", stages="every")
    ema_decay: float | None = option(
        None,
        "of a moving average of the weights, evaluated and exported instead",
        "--model-ema-decay",
        above=0,
        below=1,
    )
    seed: int = option(0, "of everything random", "--seed", stages="every", **SEEDS)
    eval_every: int = option(
        1, "epochs between evaluations; the last is always evaluated", "--eval-every", at_least=1
    )
    save_every: int | None = option(
        None,
        "steps between checkpoints; none: once an epoch",
        "--save-every",
        stages="every",
        at_least=1,
    )
    log_every: int = option(
        50, "steps between log lines", "--log-every", stages="every", at_least=1
    )
    keep_checkpoints: int = option(2, "checkpoints to keep", at_least=1)
    accept_changed_images: bool = option(
        False, "go on with images that are not those the run began with"
    )
    eval_batch_size: int = option(256, "images a step of evaluation and process", at_least=1)


@dataclass(frozen=True)
class Setting:
    """A field of the recipe that has a flag: its dotted path, its type and its description."""

    path: str
    kind: Any
    option: Option


PARTS: dict[str, type] = {
    "data": DataConfig,
    "student": StudentConfig,
    "teachers.teacher": TeacherConfig,
    "optim": OptimConfig,
    "data.augment": Augment,
    "train": TrainConfig,
}
"""Where settings stand in a recipe; flags of a teacher are for the one called ``teacher``."""

METHOD_SETTINGS = (
    Setting(
        "selector.keep_rate",
        float,
        Option(
            help="fraction of its patches it sees, above 0 to 1",
            flag="--keep-rate",
            stages="taught",
        ),
    ),
    Setting(
        "selector.num_keep",
        int | None,
        Option(
            help="number of patches it sees, instead of a fraction",
            flag="--num-keep",
            aliases=("--len-num-keep",),
            stages="taught",
        ),
    ),
    Setting(
        "objectives.ce.weight",
        float,
        Option(
            help="weight of the cross-entropy with the labels",
            flag="--ce-weight",
            aliases=("--task-loss-weight",),
        ),
    ),
    Setting(
        "objectives.ce.smoothing",
        float,
        Option(help="label smoothing, 0 to below 1", flag="--smoothing"),
    ),
    Setting(
        "objectives.kd.weight",
        float,
        Option(
            help="weight of the distillation loss",
            flag="--kd-weight",
            aliases=("--distill-loss-weight",),
        ),
    ),
    Setting(
        "objectives.kd.temperature",
        float,
        Option(
            help="T of soft distillation, whose loss carries T^2",
            flag="--temperature",
            aliases=("--distillation-tau", "--kd-temperature"),
        ),
    ),
)
"""The fields of methods that have a flag: those of a selector, and of objectives of these names."""


def settings_with_flags() -> Iterator[Setting]:
    """Yield every field of a recipe that has a flag."""
    for place, part in PARTS.items():
        hints = get_type_hints(part)
        for name, described in options_of(part).items():
            if described.flag:
                yield Setting(f"{place}.{name}", hints[name], described)
    yield from METHOD_SETTINGS
