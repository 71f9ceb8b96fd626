"""Everything a run needs, built and checked before a single file is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import keyed
from ..data.loader import EvalLoader, Loading, TrainLoader
from ..data.sources.base import ImageSource
from ..data.sources.open import open_source
from ..distill.plan import Plan
from ..distill.step import Distillation, blank_batch
from ..distill.teacher import Teacher
from ..errors import ConfigError, Drop, MissingSplit, Set
from ..evaluate.features import evenly
from ..evaluate.knn import K
from ..labels.reader import LabelReader
from ..memory import memory_errors
from ..messages import listed, plural
from ..recipes.config import Recipe
from ..world import World
from .networks import Networks, amp_dtype_of, build_networks
from .optim import make_optimizer
from .pictures import NUM_PICTURES
from .preflight import NUM_IMAGES, prove_features, prove_teacher
from .stored import check_labels, identity_of_views, open_labels

NUM_BANK, NUM_QUERIES = 5000, 2000
"""How many images a k-NN evaluation during training looks at: enough to tell accuracies 2 points
apart (the standard error of 2000 answers is at most 1.1 points) and 5 of each of 1000 classes, for
7000 forward passes and a third of a second on one core."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Images:
    """The images of a run.

    Attributes:
        train: training images.
        val: validation images; None where there are none to judge the student by.
        classes: that the run tells apart, in the order of the logits; () where it has none.
    """

    train: ImageSource
    val: ImageSource | None
    classes: tuple[str, ...]

    @property
    def sources(self) -> dict[str, ImageSource]:
        """The images by the name they have in a run's identity."""
        found = {"training images": self.train}
        return found if self.val is None else {**found, "validation images": self.val}


@dataclass(frozen=True)
class Loaders:
    """The batches of one process.

    Attributes:
        train: training views.
        val: images of an evaluation, at most `NUM_QUERIES` for a student without a classifier;
            None for unlabelled images.
        bank: training images, at most `NUM_BANK`, by which k-NN judges the features of a student
            without a classifier.
        proof: validation images that the teachers are proved on.
        shown: the few images that pictures are made of.
    """

    train: TrainLoader
    val: EvalLoader | None
    bank: EvalLoader | None
    proof: EvalLoader | None
    shown: EvalLoader


@dataclass(frozen=True)
class Prepared:
    """A run on one process, ready for its first step.

    Attributes:
        amp_dtype: autocast precision; None: none.
        identity: what decides the result besides the recipe; a resume with anything else is
            refused.
        unused: parameters no gradient reaches.
    """

    recipe: Recipe
    world: World
    images: Images
    networks: Networks
    loaders: Loaders
    amp_dtype: torch.dtype | None
    identity: dict[str, str]
    unused: tuple[str, ...]

    @property
    def distillation(self) -> Distillation:
        """Student and adapters."""
        return self.networks.distillation

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.distillation.student

    @property
    def plan(self) -> Plan:
        """What every network computes."""
        return self.distillation.plan

    @property
    def teachers(self) -> dict[str, Teacher]:
        """The teachers that run, by name."""
        return self.networks.teachers

    @contextmanager
    def in_micro_batch(self, step: int, number: int) -> Iterator[None]:
        """Set the precision and the random draws of a micro-batch's forward pass.

        Dropout and stochastic depth draw from a generator that is seeded by the step, so that a
        resumed run needs no generator state.
        """
        place = number * self.world.size + self.world.rank
        key = keyed.keys(self.recipe.train.seed, step, place, keyed.Stream.DROPOUT)[0]
        torch.manual_seed(int(key) >> 1)
        with self.world.autocast(self.amp_dtype):
            yield


def prepare(recipe: Recipe, world: World, say: Say) -> Prepared:
    """Open the images, build the networks, resolve the plan and prove the teachers; write nothing.

    Call it on every process: what one of them cannot do stops them all.
    """
    less = (Set("train.batch_size"), "end what else runs here", "choose a smaller network")
    with world.together(), memory_errors("before the first step", less):
        images = open_images(recipe, say)
        networks = build_networks(recipe, images.classes, world.device, say)
        loaders = make_loaders(recipe, images, networks, world, say)
        prepared = check_together(recipe, world, images, networks, loaders, say)
    prove_teachers(prepared, say)
    if recipe.train.compile:
        networks.distillation.run = torch.compile(networks.distillation.run)
        for teacher in networks.teachers.values():
            teacher.run = torch.compile(teacher.run)
    return prepared


def open_images(recipe: Recipe, say: Say = lambda text: None) -> Images:
    """Open a recipe's training and validation images.

    Validation images are not needed where the training images are unlabelled, or no objective reads
    labels.

    Raises:
        ConfigError: the images lack labels that the recipe needs, or are all of one class.
    """
    if not recipe.data.dir:
        raise ConfigError("no images are named", Set("data.dir", "FOLDER"), field="data.dir")
    reading = [name for name, objective in recipe.objectives.items() if objective.reads_labels]
    train, val = open_source(recipe.data.dir, "train"), None
    if train.classes and (reading or len(train.classes) > 1):
        try:
            val = open_source(recipe.data.dir, "val", classes=train.classes)
        except MissingSplit:
            if reading:
                raise
    elif reading:
        raise ConfigError(
            f"the images in {recipe.data.dir} have no labels (no class folders), and the objective"
            f" {reading[0]!r} reads them",
            (Drop(reading[0]), Set("data.dir")),
            field="data.dir",
        )
    classes = train.classes if val is not None else ()
    if len(classes) == 1:
        raise ConfigError(
            f"the images in {recipe.data.dir} are all of one class ({classes[0]!r})",
            Set("data.dir"),
            field="data.dir",
        )
    if train.classes and not classes:
        say(
            "there are no validation images, or one class alone, and no objective reads labels:"
            " nothing is evaluated"
        )
    return Images(train, val, classes)


def make_loaders(
    recipe: Recipe, images: Images, networks: Networks, world: World, say: Say
) -> Loaders:
    """Make the batches of this process."""
    spec, val, bank, proof = networks.spec, None, None, None
    loading = Loading(
        recipe.train.batch_size,
        recipe.data_seed,
        recipe.train.accumulate,
        recipe.data.workers,
        recipe.data.in_memory,
        recipe.data.views,
        world,
    )
    labels = {
        name: LabelReader(name, store, recipe.teachers[name].missing == "online")
        for name, store in open_labels(recipe).items()
    }
    train = TrainLoader(images.train, recipe.data.augment, spec, loading, labels)
    if images.val is not None:
        process: dict[str, Any] = {
            "batch_size": recipe.train.eval_batch_size,
            "workers": recipe.data.workers,
            "world": world,
        }
        judged = images.val
        if not networks.classes:
            nearest, judged = evenly(images.train, NUM_BANK), evenly(images.val, NUM_QUERIES)
            bank = EvalLoader(nearest, spec, **process)
            say(
                f"evaluations ask the {min(K, len(nearest))} nearest of {len(nearest)} training"
                f" images for the class of {len(judged)} validation images (k-NN on the mean of the"
                " patches' features)"
            )
        val = EvalLoader(judged, spec, **process)
        proof = EvalLoader(images.val, spec, limit=NUM_IMAGES, **process)
    few = evenly(images.val or images.train, NUM_PICTURES)
    alone = World(0, 1, world.device)
    shown = EvalLoader(few, spec, batch_size=NUM_PICTURES, world=alone)
    return Loaders(train, val, bank, proof, shown)


def check_together(
    recipe: Recipe,
    world: World,
    images: Images,
    networks: Networks,
    loaders: Loaders,
    say: Say,
) -> Prepared:
    """Check what has been built against each other, and give it its identity."""
    make_optimizer(networks.distillation, recipe.optim)  # raises for a wrong name or argument
    pipeline = loaders.train.pipeline
    views = identity_of_views(recipe, images.train, networks.classes, networks.spec, pipeline)
    check_labels(recipe, views, networks.digests, say)
    unused = unused_parameters(networks, world.device)
    if unused:
        say(
            f"no gradient reaches {plural(len(unused), 'parameter')} of the student"
            f" ({listed(unused)}): no objective reads {'it' if len(unused) == 1 else 'them'}"
        )
    identity = {
        "training images": images.train.fingerprint(),
        "validation images": images.val.fingerprint() if images.val is not None else "",
        "image pipeline": pipeline,
        **{f"weights of the {name}": networks.digests[name] for name in networks.teachers},
        **{
            f"labels of the {name}": store.manifest.digest
            for name, store in open_labels(recipe).items()
        },
    }
    amp_dtype = amp_dtype_of(recipe.train.amp_dtype, world.device)
    return Prepared(recipe, world, images, networks, loaders, amp_dtype, identity, unused)


def prove_teachers(prepared: Prepared, say: Say) -> None:
    """Prove every teacher that runs on validation images, if there are any."""
    world, images = prepared.world, prepared.loaders.proof
    if images is None:
        return
    for name, teacher in prepared.teachers.items():
        needs = prepared.plan.reads(name)
        with world.autocast(prepared.amp_dtype):
            if not needs.logits:
                prove_features(teacher, needs, images, world)
                say(f"{name}: its features are finite and differ from image to image")
                continue
            proof = prove_teacher(teacher, images, prepared.networks.classes, world)
        say(
            f"{name}: right on {proof.accuracy:.1%} of {proof.num_images} validation images"
            f" (chance {proof.chance:.1%})"
        )


def unused_parameters(networks: Networks, device: torch.device) -> tuple[str, ...]:
    """Name the trainable parameters no loss reaches.

    One backward pass over two blank images in evaluation mode finds them.
    """
    distillation = networks.distillation
    training = distillation.training
    distillation.eval()
    named = {name: p for name, p in distillation.named_parameters() if p.requires_grad}
    loss = distillation(blank_batch(distillation.plan, 2, device), networks.teachers)["loss"]
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    distillation.train(training)
    return tuple(
        name.removeprefix("student.")
        for name, grad in zip(named, grads, strict=True)
        if grad is None
    )
