"""A job: everything a run needs, built and checked before a single file is written."""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.augment import InputSpec, evaluated_as_trained
from ..data.batch import Batch
from ..data.loader import EvalLoader, TrainLoader
from ..data.source import ImageSource, open_source
from ..distill.plan import Plan
from ..distill.step import Distillation
from ..distill.teacher import Teacher
from ..errors import ConfigError, DataError, MissingSplit
from ..evaluate.features import K, evenly
from ..labels.identity import differing, images_identity, of_views, view_identity
from ..labels.reader import LabelReader, blank_targets
from ..labels.store import LabelStore
from ..memory import memory_errors
from ..messages import plural
from ..recipes.config import Recipe, TeacherConfig, to_dict
from ..vit.network import Network
from ..weights import create as weights
from ..world import World
from .networks import (
    Built,
    build_student,
    build_teacher,
    open_labels,
    plan_of,
    prefer_explicit_attention,
    reads_logits,
    resolve_run,
    stored_network,
    trains_classifier,
    without_memory,
)
from .optim import make_optimizer
from .pictures import NUM_PICTURES
from .preflight import NUM_IMAGES, prove_features, prove_teacher

NUM_BANK, NUM_QUERIES = 5000, 2000
"""How many images a k-NN evaluation during training looks at: enough to tell accuracies 2 points
apart (the standard error of 2000 answers is at most 1.1 points) and 5 of each of 1000 classes, for
7000 forward passes and a third of a second on one core."""


@dataclass
class Job:
    """A built run on one process.

    Attributes:
        train_loader: batches of training views.
        val_loader: the images of an evaluation, for a student without a classifier at most
            `NUM_QUERIES`; None for unlabelled images.
        bank_loader: training images, at most `NUM_BANK`, by which k-NN judges the features of a
            student without a classifier.
        shown_loader: the few images that pictures are made of, validation images if there are any.
        classes: of the data set, in the order of the logits; the teacher's, if it names them, where
            the images are unlabelled.
        architecture: timm name and arguments that rebuild the student.
        amp_dtype: autocast precision; None: none.
        identity: what besides the recipe decides the result, so that a resume with anything else is
            refused.
        sources: the images, by their name in ``identity``.
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
    bank_loader: EvalLoader | None
    shown_loader: EvalLoader
    classes: tuple[str, ...]
    architecture: tuple[str, dict[str, Any]]
    amp_dtype: torch.dtype | None
    identity: dict[str, str]
    sources: dict[str, ImageSource]
    unused: tuple[str, ...]

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.distillation.student


def amp_dtype_of(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast precision of a run; raises `ConfigError` for float16 where torch has no loss
    scaling for it.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    if name == "float16" and device.type != "cuda":
        raise ConfigError(
            f"amp_dtype float16 needs a GPU, and this run is on {device.type}: choose bfloat16 or"
            " float32"
        )
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def open_data(recipe: Recipe) -> tuple[ImageSource, ImageSource | None]:
    """Training and validation images; unlabelled training images have no validation set, and where
    no label is read there may be none.
    """
    if not recipe.data.dir:
        raise ConfigError(
            "no images are named: give --data-dir, a folder with train/ and val/ in it"
        )
    train = open_source(recipe.data.dir, "train")
    unread = not _reads_labels(recipe)
    if not train.classes or (unread and len(train.classes) == 1):
        return train, None
    try:
        return train, open_source(recipe.data.dir, "val", classes=train.classes)
    except MissingSplit:
        if unread:
            return train, None
        raise


def classes_of(recipe: Recipe, train: ImageSource, val: ImageSource | None) -> tuple[str, ...]:
    """The classes a run tells apart, () where it has none; raises `ConfigError` where it needs
    labels that are not there.
    """
    labels_needed = _reads_labels(recipe)
    classes = train.classes if val is not None or labels_needed else ()
    if not train.classes and labels_needed:
        raise ConfigError(
            f"the images in {recipe.data.dir} have no labels (no class folders), and the objective"
            f" {labels_needed[0]!r} needs them: leave it out (--without {labels_needed[0]}) to"
            " learn from the teacher alone"
        )
    if len(classes) == 1:
        raise ConfigError(
            f"the images in {recipe.data.dir} are all of one class ({train.classes[0]!r}): there is"
            " nothing to tell apart"
        )
    return classes


def fingerprint_but(source: ImageSource, key: str) -> str:
    """The fingerprint of a source but for the size of the image of that name."""
    rest = copy.copy(source)
    rest.sizes = np.where([source.key(i) == key for i in range(len(source))], -1, source.sizes)
    return rest.fingerprint()


def _reads_labels(recipe: Recipe) -> list[str]:
    """Names of the objectives that read the images' labels."""
    return [name for name, objective in recipe.objectives.items() if objective.reads_labels]


def prepare(recipe: Recipe, world: World, say: Callable[[str], None]) -> Job:
    """Open the data, build the networks, resolve the plan and prove the teachers; nothing is
    written.

    Call it on every process: what one of them cannot do stops them all.
    """
    remedy = "end what else runs there, or choose a smaller network or --batch-size"
    with world.together(), memory_errors("before the first step", remedy):
        job, proving = _build(recipe, world, say)
    amp_dtype, classes = job.amp_dtype, job.classes
    if proving is not None:
        for name, teacher in job.teachers.items():
            needs = job.plan.reads(name)
            with torch.autocast(world.device.type, amp_dtype, enabled=amp_dtype is not None):
                if not needs.logits:
                    prove_features(teacher, needs, proving, world)
                    say(f"{name}: its features are finite and differ from image to image")
                    continue
                proof = prove_teacher(teacher, proving, classes, world)
            say(
                f"{name}: right on {proof.accuracy:.1%} of {proof.num_images} validation images"
                f" (chance {proof.chance:.1%})"
            )
    if recipe.train.compile:
        job.distillation.run = torch.compile(job.distillation.run)
        for teacher in job.teachers.values():
            teacher.run = torch.compile(teacher.run)
    return job


def _build(
    recipe: Recipe, world: World, say: Callable[[str], None]
) -> tuple[Job, EvalLoader | None]:
    """The job as far as one process can build it alone, and the validation images its teachers are
    to be proved on.
    """
    train_source, val_source = open_data(recipe)
    folders = classes_of(recipe, train_source, val_source)
    if train_source.classes and not folders:
        say(
            "there are no validation images, or one class alone, and no objective reads labels:"
            " nothing is evaluated"
        )
    amp_dtype = amp_dtype_of(recipe.train.amp_dtype, world.device)
    stores = open_labels(recipe)
    student, teachers, classes = _build_networks(recipe, folders, world.device, stores, say)
    student = replace(student, spec=evaluated_as_trained(student.spec, recipe.data.augment))
    plan = plan_of(
        recipe, student.network, {name: teacher.network for name, teacher in teachers.items()}
    )
    distillation = Distillation(student.model, plan).to(world.device)
    make_optimizer(
        distillation, recipe.optim
    )  # only to find a wrong name or argument before a file is written
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
        student.spec,
        batch_size=recipe.train.batch_size,
        seed=recipe.data_seed,
        accumulate=recipe.train.accumulate,
        in_memory=recipe.data.in_memory,
        views=recipe.data.views,
        labels={
            name: LabelReader(name, store, recipe.teachers[name].missing == "online")
            for name, store in stores.items()
        },
        **loader_args,
    )
    ours = identity_of_views(train_source, classes, student.spec, recipe, train_loader)
    for name, store in stores.items():
        _check_labels(name, store, ours, recipe, teachers.get(name), say)
        if recipe.teachers[name].missing == "error":
            teachers.pop(
                name, None
            )  # it was built to be compared with the one that made the labels
    val_loader = bank_loader = proving = None
    if val_source is not None:
        loader_args["batch_size"] = recipe.train.eval_batch_size
        if classes:
            val_loader = EvalLoader(val_source, student.spec, **loader_args)
        else:
            bank, queries = evenly(train_source, NUM_BANK), evenly(val_source, NUM_QUERIES)
            bank_loader, val_loader = (
                EvalLoader(source, student.spec, **loader_args) for source in (bank, queries)
            )
            say(
                f"evaluations ask the {min(K, len(bank))} nearest of {len(bank)} training images"
                f" for the class of {len(queries)} validation images (k-NN on the mean of the"
                " patches' features)"
            )
        proving = EvalLoader(val_source, student.spec, limit=NUM_IMAGES, **loader_args)
    few = evenly(train_source if val_source is None else val_source, NUM_PICTURES)
    shown_loader = EvalLoader(few, student.spec, batch_size=NUM_PICTURES, device=world.device)
    unused = unused_parameters(distillation, teachers, student.spec, world.device)
    if unused:
        shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        them = "it" if len(unused) == 1 else "them"
        say(
            f"no gradient reaches {plural(len(unused), 'parameter')} of the student ({shown}): no"
            f" objective reads {them}"
        )
    sources = {"training images": train_source} | (
        {} if val_source is None else {"validation images": val_source}
    )
    identity = {
        "training images": train_source.fingerprint(),
        "validation images": val_source.fingerprint() if val_source is not None else "",
        "image pipeline": train_loader.pipeline,
        **{
            f"weights of the {name}": weights_digest(teacher.model)
            for name, teacher in teachers.items()
        },
        **{f"labels of the {name}": store.manifest.digest for name, store in stores.items()},
    }
    job = Job(
        recipe=recipe,
        world=world,
        plan=plan,
        distillation=distillation,
        teachers=teachers,
        student_spec=student.spec,
        train_loader=train_loader,
        val_loader=val_loader,
        bank_loader=bank_loader,
        shown_loader=shown_loader,
        classes=classes,
        architecture=weights.describe(resolve_run(recipe.student.model), _model_args(recipe)),
        amp_dtype=amp_dtype,
        identity=identity,
        sources=sources,
        unused=unused,
    )
    return job, proving


def identity_of_views(
    source: ImageSource,
    classes: tuple[str, ...],
    spec: InputSpec,
    recipe: Recipe,
    loader: TrainLoader,
) -> dict[str, Any]:
    """What labels for this run have to share with it."""
    return images_identity(source, classes) | view_identity(
        spec, recipe.data.augment, recipe.data_seed, loader.pipeline
    )


def _check_labels(
    name: str,
    store: LabelStore,
    ours: dict[str, Any],
    recipe: Recipe,
    teacher: Teacher | None,
    say: Callable[[str], None],
) -> None:
    """Raise `DataError` unless the labels are of these images, these views and, if it is here, this
    teacher.
    """
    theirs = of_views(store.manifest.identity)
    if teacher is not None:
        ours = ours | {"teacher.weights": weights_digest(teacher.model)}
        theirs["teacher.weights"] = store.manifest.identity["teacher.weights"]
    changed = differing(theirs, ours)
    if changed:
        raise DataError(
            f"the labels of the {name} ({store.path}) are not for this run: {'; '.join(changed)}:"
            " make the recipe agree, or label again"
        )
    views = recipe.data.views or recipe.train.epochs
    if recipe.teachers[name].missing == "error":
        absent = [place for place in store.missing_parts() if place[0] < views]
        if absent:
            are = "is" if len(absent) == 1 else "are"
            raise DataError(
                f"{len(absent)} of {views * store.num_parts} parts of the labels of the {name}"
                f" {are} not written yet (the first: view {absent[0][0]}, part {absent[0][1]}):"
                " label the rest, show fewer views (--views), or let the teacher answer there"
                f" (--set teachers.{name}.missing=online)"
            )
    status = store.status()
    of = f"{status.records:,} of {store.manifest.num_samples * store.manifest.num_views:,} records"
    say(
        f"{name}: {store.manifest.about['network']['architecture']}, stored labels, {of}, {views}"
        " views used"
    )


def made_by(store: LabelStore, config: TeacherConfig) -> bool:
    """Whether these labels were written by a teacher of this very configuration, so that its
    weights need not be looked at again.
    """
    recipe = store.manifest.about.get("recipe") or {}
    then = recipe.get("teachers", {}).get(store.manifest.about.get("teacher"))
    now = to_dict(config)
    return then is not None and all(
        then.get(key) == now[key] for key in now if key not in ("labels", "missing")
    )


def _build_networks(
    recipe: Recipe,
    classes: tuple[str, ...],
    device: torch.device,
    stores: dict[str, LabelStore],
    say: Callable[[str], None],
) -> tuple[Built, dict[str, Teacher], tuple[str, ...]]:
    """Student, teachers and the classes the student answers with: the data set's; the teachers'
    where the images are unlabelled.

    None where no objective trains a classifier.
    """
    with without_memory():
        blank = build_student(recipe.student, max(len(classes), 1), with_weights=False)
    trained = trains_classifier(recipe.objectives, blank.network)
    torch.manual_seed(recipe.train.seed)
    student = build_student(recipe.student, max(len(classes), 1) if trained else 0)
    numbers = torch.get_rng_state()
    teachers: dict[str, Teacher] = {}
    names: set[tuple[str, ...]] = set()
    answering: list[Network] = []
    for name, config in recipe.teachers.items():
        if name in stores:
            network = stored_network(stores[name], name)
            if reads_logits(recipe.objectives, network):
                names.add(tuple(stores[name].manifest.about.get("classes", ())))
                answering.append(network)
            if config.missing == "error" and (not config.model or made_by(stores[name], config)):
                continue
        teacher, match = build_teacher(
            config, name, classes, student.spec, device, recipe.objectives
        )
        teachers[name] = teacher
        if name not in stores and reads_logits(recipe.objectives, teacher.network):
            names.add(match.classes)
            answering.append(teacher.network)
        say(f"{name}: {teacher.network.architecture}, {match.remark}")
    if not trained:
        judged = (
            "its features are judged by k-NN"
            if classes
            else "the images have no labels to judge its features by"
        )
        say(f"no objective trains the student's classifier: it is built without one, and {judged}")
        torch.set_rng_state(numbers)  # adapters begin alike, whatever the teachers are
        return student, teachers, ()
    if not classes:
        counts = {network.num_classes for network in answering}
        if len(counts) != 1 or len(names - {()}) > 1:
            raise ConfigError(
                "unlabelled images need exactly one set of classes, the teacher's: give teachers"
                " with equal classes"
            )
        classes = max(names, key=len)
        torch.manual_seed(recipe.train.seed)
        student = build_student(recipe.student, counts.pop())
    return student, teachers, classes


def weights_digest(model: nn.Module) -> str:
    """sha256 of everything a network computes with."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _model_args(recipe: Recipe) -> dict[str, Any]:
    args = dict(recipe.student.model_args)
    if recipe.student.image_size is not None:
        args["img_size"] = recipe.student.image_size
    return args


def unused_parameters(
    distillation: Distillation, teachers: dict[str, Teacher], spec: InputSpec, device: torch.device
) -> tuple[str, ...]:
    """Names of trainable parameters no loss reaches, found by one backward pass over two blank
    images in evaluation mode.
    """
    training = distillation.training
    distillation.eval()
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    batch = Batch(
        images=torch.zeros(2, 3, *spec.image_size, device=device),
        labels=labels,
        ids=labels,
        views=labels,
        view=0,
    )
    for name, layout in distillation.plan.labels.items():
        batch.targets[name], batch.missing[name] = (
            blank_targets(layout, 2, device),
            np.zeros(0, dtype=np.int64),
        )
    named = [
        (name, parameter)
        for name, parameter in distillation.named_parameters()
        if parameter.requires_grad
    ]
    loss = distillation(batch, teachers)["loss"]
    grads = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    distillation.train(training)
    return tuple(
        name.removeprefix("student.")
        for (name, _), grad in zip(named, grads, strict=True)
        if grad is None
    )
