"""The settings of a run that are the same for every method: networks, images, optimizer, loop.

Each is described where it is declared, and flags, help and checks follow from that. This module
imports neither torch nor timm, so that a mistyped flag is answered at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from ..data.augment import Augment
from ..option import Option, check_options, option, options_of

SEEDS: dict[str, Any] = {"at_least": -(2**63), "below": 2**64}
"""What torch takes as a seed."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The network to train."""

    model: str = option(
        "deit_tiny_patch16_224",
        "timm name, torchvision/NAME, hf-hub:ORG/NAME, a folder, or module:factory",
        "--model",
    )
    checkpoint: str | None = option(
        None,
        "weights to start from (.safetensors, .pth)",
        "--model-path --initial-checkpoint --finetune FILE",
    )
    pretrained: bool = option(False, "start from timm's pretrained weights", "--pretrained")
    image_size: int | None = option(
        None, "side of its square input; none: its own", "--img-size --input-size PIXELS"
    )
    drop_path: float = option(
        0.0, "stochastic depth rate of its last block", "--drop-path", at_least=0, below=1
    )
    init: Literal["model", "mae"] = option(
        "model",
        "mae: MAE's initialization and sine-cosine position table (the table alone, where weights"
        " are given); model: its own",
    )
    model_args: dict[str, Any] = option(
        dict, "further arguments, as timm takes them (depth, img_size=[H,W], ...)"
    )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A network to learn from.

    With ``labels`` it does not run: its stored answers are read, and a ``model`` beside them is
    only compared with the one that made them.
    """

    model: str = option(
        "",
        "timm name, torchvision/NAME, hf-hub:ORG/NAME, run or folder, module:factory, .onnx file",
        "--teacher-model --kd-model-name",
    )
    checkpoint: str | None = option(None, "its weights (.safetensors, .pth)", "--teacher-path FILE")
    pretrained: bool = option(False, "take timm's pretrained weights", "--teacher-pretrained")
    image_size: int | None = option(
        None, "side of its square input; none: its own", "--teacher-img-size PIXELS"
    )
    precision: Literal["same", "float32", "bfloat16"] = option(
        "same", "its arithmetic; same: the run's; bfloat16: not exact", "--teacher-precision"
    )
    reorder_classes: bool = option(
        False, "accept its classes in another order, matched by name", "--reorder-classes"
    )
    class_order: tuple[int, ...] | Literal["same", "natural"] = option(
        "same",
        "order of its classes if they have no names: the data set's, people's (2 before 10), or the"
        " place of each class among its own",
    )
    accept_unproven: bool = option(
        False, "run it even if it answers no better than an untrained network, to try the rest"
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
        "--data-dir --data-path FOLDER",
    )
    workers: int = option(2, "loader processes", "--workers -j --num-workers", at_least=0)
    in_memory: bool | None = option(
        None, "keep decoded images in memory; none: if they fit 2 GiB", "--in-memory"
    )
    val_split: float | None = option(
        None,
        "fraction of each class's training images to validate on, where there are no others",
        "--val-split",
        above=0,
        below=1,
    )
    unlabelled: str | None = option(
        None,
        "further training images without labels, as data.dir; what reads labels does not see them",
        "--unlabelled-dir FOLDER",
    )
    labelled_share: float = option(
        0.25,
        "fraction of a batch that is labelled, beside unlabelled images",
        "--labelled-share",
        above=0,
        below=1,
    )
    skip_damaged: bool = option(
        False, "leave out images that cannot be read, and say which", "--skip-damaged"
    )
    augment: Augment = option(Augment, "the training views")
    views: int | None = option(
        None, "different views of an image, in turn; none: one an epoch", "--views", at_least=1
    )
    seed: int | None = option(
        None, "of the images' order and views; none: train.seed, or that of the labels", **SEEDS
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule, in timm's names."""

    opt: str = option("adamw", "a timm optimizer", "--opt")
    lr: float = option(1e-3, "peak learning rate, not scaled by the batch size", "--lr", above=0)
    weight_decay: float = option(0.05, "not of biases and norms", "--weight-decay", at_least=0)
    momentum: float = option(0.9, "for optimizers that have it", "--momentum", at_least=0, below=1)
    opt_args: dict[str, Any] = option(dict, "further arguments of the optimizer (betas, eps)")
    layer_decay: float | None = option(
        None,
        "factor of the learning rate a block further down",
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
        False, "the schedule begins at its peak after the warm-up (MAE), not before it (DeiT)"
    )
    warmup_lr: float = option(1e-6, "where the warm-up starts", "--warmup-lr", at_least=0)
    min_lr: float = option(1e-5, "learning rate the schedule ends at", "--min-lr", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: int = option(300, "passes over the training images", "--epochs", at_least=1)
    batch_size: int = option(1024, "images a step, in ALL processes", "--batch-size -b", at_least=1)
    accumulate: int = option(
        1, "micro-batches of a step", "--accumulate --grad-accum-steps --accum-iter", at_least=1
    )
    amp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "precision; auto: bfloat16 on a GPU that has it, else float32", "--amp-dtype"
    )
    compile: bool = option(False, "torch.compile the networks", "--torchcompile")
    ema_decay: float | None = option(
        None,
        "average the weights, for evaluation and export",
        "--model-ema-decay",
        above=0,
        below=1,
    )
    seed: int = option(0, "seed of everything random", "--seed", **SEEDS)
    eval_every: int = option(
        1, "epochs between evaluations; the last is always evaluated", "--eval-every", at_least=1
    )
    save_every: int | None = option(
        None, "steps between checkpoints; none: once an epoch", "--save-every", at_least=1
    )
    log_every: int = option(50, "steps between log lines", "--log-every", at_least=1)
    log_to: tuple[str, ...] = option(
        ("auto",),
        "tensorboard, wandb, trackio, mlflow; auto: tensorboard, if installed",
        "--log-to NAME",
    )
    keep_checkpoints: int = option(2, "checkpoints to keep", at_least=1)
    accept_changed_images: bool = option(False, "go on with other images than the run began with")
    eval_batch_size: int = option(256, "images a step of evaluation and process", at_least=1)

    def micro_batch(self, num_processes: int = 1) -> int:
        """Return how many images a process computes at once."""
        return self.batch_size // (self.accumulate * num_processes)


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How answers are stored, which is no part of a recipe."""

    encoding: Literal["auto", "float32", "float16", "topk"] = option(
        "auto", "of the logits; auto: float16, or topk for more than 256 classes", "--encoding"
    )
    k: int | None = option(None, "classes an image that topk keeps; none: 10", "--k")
    temperatures: tuple[float, ...] = option(
        (), "at which topk is valid; none: those of the recipe's objectives", "--temperatures T"
    )
    hidden_dtype: Literal["float16", "float32"] | None = option(
        None, "of hidden states the recipe reads; none: float16", "--hidden-dtype"
    )
    part_size: int = option(
        16384, "images a part, which a crash can cost", "--part-size", at_least=1
    )

    def __post_init__(self) -> None:
        check_options(self, "")


PARTS: dict[str, type] = {
    "data": DataConfig,
    "student": StudentConfig,
    "teachers.teacher": TeacherConfig,
    "optim": OptimConfig,
    "data.augment": Augment,
    "train": TrainConfig,
}
"""Where settings stand in a recipe; flags of a teacher are for the one called ``teacher``."""
EVERY_STAGE = (
    *("data.dir", "data.workers", "data.in_memory", "data.val_split", "data.skip_damaged"),
    *("train.seed", "train.amp_dtype", "train.compile", "train.save_every"),
    *("train.log_every", "train.log_to"),
)
FIRST_STAGE = ("student.model", "student.checkpoint", "student.pretrained", "student.image_size")
"""What flags set in every stage of a staged recipe, and in the first. Another flag sets the only
stage with such a field.
"""
UNLABELLED = ("data.unlabelled", "data.labelled_share")
"""What flags set in the stages that learn from images without labels."""

# Methods are not imported here (they need torch), so those of their fields that have a flag are
# described here: a selector's, and those of objectives of these names.
METHOD_FLAGS = {
    "selector.keep_rate": Option(
        "fraction of its patches the teacher sees, above 0 to 1", "--keep-rate"
    ),
    "selector.num_keep": Option(
        "patches the teacher sees, not a fraction", "--num-keep --len-num-keep"
    ),
    "objectives.ce.weight": Option("weight of cross-entropy", "--ce-weight --task-loss-weight"),
    "objectives.ce.smoothing": Option("label smoothing, 0 to below 1", "--smoothing"),
    "objectives.kd.weight": Option("weight of distillation", "--kd-weight --distill-loss-weight"),
    "objectives.kd.temperature": Option(
        "T of the soft loss, which carries T^2",
        "--temperature --distillation-tau --kd-temperature",
    ),
}


def settings_with_flags() -> Iterator[tuple[str, Any, Option]]:
    """Yield every field of a recipe that has a flag: its path, its type and its description."""
    for place, part in PARTS.items():
        hints = get_type_hints(part)
        for name, described in options_of(part).items():
            if described.flag:
                yield f"{place}.{name}", hints[name], described
    for path, described in METHOD_FLAGS.items():
        yield path, int | None if path == "selector.num_keep" else float, described
