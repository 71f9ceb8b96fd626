"""A job: everything a run needs, built and checked before a single file is written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import weights
from ..build import Built, build_student, build_teacher, plan_of, prefer_explicit_attention, resolve_run
from ..data.loader import Batch, EvalLoader, TrainLoader
from ..data.source import ImageSource, open_source
from ..data.views import InputSpec
from ..distill import Distillation
from ..errors import ConfigError
from ..plan import Plan
from ..recipe import Recipe
from ..teacher import Teacher
from .distributed import World
from .preflight import NUM_IMAGES, prove_teacher


@dataclass
class Job:
    """A built run on one process.

    Attributes:
        train_loader: batches of training views; val_loader: None for unlabelled images.
        classes: of the data set, in the order of the logits; empty if unlabelled.
        architecture: timm name and arguments that rebuild the student.
        amp_dtype: autocast precision; None: none.
        unused: parameters no gradient reaches.
    """

    recipe: Recipe
    world: World
    plan: Plan
    distillation: Distillation
    teachers: dict[str, Teacher]
    student_spec: InputSpec
    train_loader: TrainLoader
    val_loader: EvalLoader | None
    classes: tuple[str, ...]
    architecture: tuple[str, dict[str, Any]]
    amp_dtype: torch.dtype | None
    identity: dict[str, str]
    unused: tuple[str, ...]

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.distillation.student


def amp_dtype_of(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast precision of a run; raises `ConfigError` for float16 where torch has no loss scaling for it."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    if name == "float16" and device.type != "cuda":
        raise ConfigError(f"amp_dtype float16 needs a GPU, and this run is on {device.type}: choose bfloat16 or float32")
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def open_data(recipe: Recipe) -> tuple[ImageSource, ImageSource | None]:
    """Training and validation images; unlabelled training images have no validation set."""
    if not recipe.data.dir:
        raise ConfigError("no images are named: give --data-dir, a folder with train/ and val/ in it")
    train = open_source(recipe.data.dir, "train")
    if not train.classes:
        return train, None
    return train, open_source(recipe.data.dir, "val", classes=train.classes)


def prepare(recipe: Recipe, world: World, say: Callable[[str], None]) -> Job:
    """Open the data, build the networks, resolve the plan and prove the teachers; nothing is written."""
    train_source, val_source = open_data(recipe)
    classes = train_source.classes
    labels_needed = [name for name, objective in recipe.objectives.items() if objective.reads_labels]
    if not classes and labels_needed:
        raise ConfigError(
            f"the images in {recipe.data.dir} have no labels (no class folders), and the objective {labels_needed[0]!r} needs them: "
            "leave it out (--without ce) to learn from the teacher alone"
        )
    torch.manual_seed(recipe.train.seed)
    amp_dtype = amp_dtype_of(recipe.train.amp_dtype, world.device)
    spec_source = build_student(recipe.student, max(len(classes), 1)) if not classes else None
    student_spec = spec_source.spec if spec_source is not None else None
    student: Built | None = None
    if classes:
        student = build_student(recipe.student, len(classes))
        student_spec = student.spec
    assert student_spec is not None
    teachers: dict[str, Teacher] = {}
    for name, config in recipe.teachers.items():
        teacher, match = build_teacher(config, name, classes, student_spec, world.device)
        teachers[name] = teacher
        say(f"{name}: {teacher.network.architecture}, {match.remark}")
    if student is None:
        counts = {teacher.network.num_classes for teacher in teachers.values()}
        if len(counts) != 1:
            raise ConfigError("unlabelled images need exactly one set of classes, the teacher's: give teachers with equal classes")
        torch.manual_seed(recipe.train.seed)
        student = build_student(recipe.student, counts.pop())
    plan = plan_of(recipe, student.network, {name: teacher.network for name, teacher in teachers.items()})
    distillation = Distillation(student.model, plan, recipe.train.seed).to(world.device)
    if world.device.type == "cpu" and amp_dtype is torch.bfloat16:
        prefer_explicit_attention(distillation)
    for teacher in teachers.values():
        if world.device.type == "cpu" and (teacher.dtype or amp_dtype) is torch.bfloat16:
            prefer_explicit_attention(teacher.model)
    loader_args: dict[str, Any] = {
        "workers": recipe.data.workers,
        "device": world.device,
        "rank": world.rank,
        "world_size": world.size,
    }
    train_loader = TrainLoader(
        train_source,
        recipe.data.augment,
        student_spec,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        accumulate=recipe.train.accumulate,
        in_memory=recipe.data.in_memory,
        **loader_args,
    )
    val_loader = None
    if val_source is not None:
        val_loader = EvalLoader(val_source, student_spec, batch_size=recipe.train.eval_batch_size, **loader_args)
        probe = EvalLoader(
            val_source, student_spec, batch_size=recipe.train.eval_batch_size, limit=NUM_IMAGES, **loader_args
        )
        for name, teacher in teachers.items():
            with torch.autocast(world.device.type, amp_dtype, enabled=amp_dtype is not None):
                scores = prove_teacher(teacher, probe, len(classes), world.device, _merge)
            say(f"{name}: right on {scores['top1']:.1%} of {scores['num_samples']:.0f} validation images (chance {1 / len(classes):.1%})")
    unused = unused_parameters(distillation, teachers, student_spec, world.device)
    if unused:
        shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        say(f"no gradient reaches {len(unused)} parameters of the student ({shown}): no objective reads them")
    if recipe.train.compile:
        distillation.run = torch.compile(distillation.run)
        for teacher in teachers.values():
            teacher.run = torch.compile(teacher.run)
    identity = {
        "train_images": train_source.fingerprint(),
        "val_images": val_source.fingerprint() if val_source is not None else "",
        "pipeline": train_loader.pipeline,
    }
    architecture = weights.describe(resolve_run(recipe.student.model), _model_args(recipe))
    return Job(
        recipe=recipe,
        world=world,
        plan=plan,
        distillation=distillation,
        teachers=teachers,
        student_spec=student_spec,
        train_loader=train_loader,
        val_loader=val_loader,
        classes=classes,
        architecture=architecture,
        amp_dtype=amp_dtype,
        identity=identity,
        unused=unused,
    )


def _model_args(recipe: Recipe) -> dict[str, Any]:
    args = dict(recipe.student.model_args)
    if recipe.student.image_size is not None:
        args["img_size"] = recipe.student.image_size
    return args


def _merge(tensor: torch.Tensor) -> None:
    if dist.is_initialized():
        dist.all_reduce(tensor)


def unused_parameters(
    distillation: Distillation, teachers: dict[str, Teacher], spec: InputSpec, device: torch.device
) -> tuple[str, ...]:
    """Names of trainable parameters no loss reaches, found by one backward pass over two blank images in evaluation mode."""
    training = distillation.training
    distillation.eval()
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    batch = Batch(
        images=torch.zeros(2, 3, *spec.image_size, device=device), labels=labels, ids=labels, views=labels, view=0
    )
    named = [(name, parameter) for name, parameter in distillation.named_parameters() if parameter.requires_grad]
    loss = distillation(batch, teachers)["loss"]
    grads = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    distillation.train(training)
    return tuple(name.removeprefix("student.") for (name, _), grad in zip(named, grads, strict=True) if grad is None)

