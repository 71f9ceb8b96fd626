"""Everything a run needs, built and checked before a single file is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import keyed
from ..data.decoded import check_images
from ..data.loader import EvalLoader, Loading, TrainLoader
from ..data.sources.base import ImageSource, PartSource, renumber
from ..data.sources.joined import join
from ..data.sources.open import open_source
from ..distill.plan import Plan
from ..distill.shares import describe_shares, measure_shares
from ..distill.step import Distillation, blank_batch
from ..distill.teacher import Teacher
from ..errors import ConfigError, DataError, Drop, MissingSplit, Say, Set, UserError
from ..evaluate.knn import K
from ..labels.identity import views_identity
from ..labels.reader import LabelReader
from ..memory import memory_errors
from ..messages import listed, plural
from ..recipes.config import Recipe
from ..world import World
from .length import check_length
from .networks import (
    Networks,
    amp_dtype_of,
    build_networks,
    compile_errors,
    compile_networks,
    name_precision,
)
from .optim import make_optimizer
from .pictures import NUM_PICTURES
from .preflight import (
    NUM_IMAGES,
    Proof,
    accuracy_on_chosen,
    describe_accuracy,
    doubt_views,
    doubt_weights,
    prove_features,
    prove_teacher,
)
from .stored import check_labels, open_labels

# Images a k-NN evaluation during training looks at: the standard error of 2000 answers is at most
# 1.1 points, and the bank has 5 images of each of 1000 classes.
NUM_BANK, NUM_QUERIES = 5000, 2000


@dataclass(frozen=True)
class Images:
    """The images of a run."""

    train: ImageSource  # those with labels first
    val: ImageSource | None  # None where there are none to judge the student by
    classes: tuple[str, ...]  # in the order of the logits; () where the run tells none apart

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how they were found."""
        val = () if self.val is None else self.val.notes
        return tuple(dict.fromkeys((*self.train.notes, *val)))

    @property
    def labelled(self) -> ImageSource:
        """The training images with labels."""
        return PartSource(self.train, np.flatnonzero(self.train.labels >= 0))


@dataclass(frozen=True)
class Loaders:
    """The batches of one process."""

    train: TrainLoader
    val: EvalLoader | None  # images of an evaluation
    bank: EvalLoader | None  # those by which k-NN judges a student without a classifier
    proof: EvalLoader | None  # validation images that the teachers are proved on
    shown: EvalLoader  # the few that pictures are made of


@dataclass(frozen=True)
class Prepared:
    """A run on one process, ready for its first step."""

    recipe: Recipe
    world: World
    images: Images
    networks: Networks
    loaders: Loaders
    amp_dtype: torch.dtype | None  # of autocast; None: none
    unused: tuple[str, ...] = ()  # parameters no gradient reaches
    proofs: dict[str, Proof] = field(default_factory=dict)  # of the teachers, by name

    @property
    def distillation(self) -> Distillation:
        """Student and adapters."""
        return self.networks.distillation

    @property
    def student(self) -> nn.Module:
        return self.distillation.student

    @property
    def plan(self) -> Plan:
        return self.distillation.plan

    @property
    def teachers(self) -> dict[str, Teacher]:
        return self.networks.teachers

    def identity(self) -> dict[str, str]:
        """Return what decides the result besides the recipe, by content."""
        train, val = self.images.train, self.images.val
        found = {
            "training images": train.fingerprint(),
            "validation images": "" if val is None else val.fingerprint(),
            "image pipeline": self.loaders.train.pipeline,
            "precision": name_precision(self.amp_dtype),
        }
        found |= {f"weights of the {name}": self.networks.digests[name] for name in self.teachers}
        stores = open_labels(self.recipe).items()
        return found | {f"labels of the {name}": store.manifest.digest for name, store in stores}

    def identity_of_views(self) -> dict[str, Any]:
        """Return what labels have to share with the run that reads them."""
        images, networks, recipe = self.images.train, self.networks, self.recipe
        made_by = networks.spec, recipe.data.augment, recipe.data_seed, self.loaders.train.pipeline
        return views_identity(images, networks.classes, *made_by)

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


_LESS = Set("train.batch_size"), "end what else runs here", "choose a smaller network"


def prepare(recipe: Recipe, world: World, say: Say, begun_in: str | None = None) -> Prepared:
    """Open the images, build the networks, resolve the plan and prove the teachers; write nothing.

    Call it on every process: if one fails, all stop. ``begun_in``: the precision that the run began
    in, which ``auto`` then means on any device.
    """
    with world.together(), memory_errors("before the first step", _LESS):
        prepared = build(recipe, world, say, begun_in)
        networks = prepared.networks
        make_optimizer(networks.distillation, recipe.optim)  # raises for a wrong name or argument
        check_labels(recipe, prepared.identity_of_views(), networks.digests, say)
        loader = prepared.loaders.train
        check_length(recipe, len(loader.source), loader.steps_per_epoch, say)
    proofs = prove_teachers(prepared, say)
    with world.together(), memory_errors("before the first step", _LESS):
        unused = unused_parameters(prepared)
    if unused:
        them = "it" if len(unused) == 1 else "them"
        named = f"{plural(len(unused), 'parameter')} ({listed(unused)})"
        say(f"no gradient reaches {named}: no objective reads {them}")
    return replace(prepared, unused=unused, proofs=proofs)


def build(recipe: Recipe, world: World, say: Say, begun_in: str | None = None) -> Prepared:
    """Open the images, build the networks, and make the batches of this process."""
    images = open_images(recipe, say)
    networks = build_networks(recipe, images.classes, world.device, say)
    images, networks = judge_by_teacher(images, networks, say)
    loaders = make_loaders(recipe, images, networks, world, say)
    wanted = recipe.train.amp_dtype
    amp_dtype = amp_dtype_of(wanted, world.device)
    here = name_precision(amp_dtype)
    if wanted == "auto" and begun_in not in (None, here):
        say(f"goes on in {begun_in}, as the run began, although auto means {here} here")
        amp_dtype = amp_dtype_of(begun_in, world.device)
    return Prepared(recipe, world, images, networks, loaders, amp_dtype)


def open_images(recipe: Recipe, say: Say = lambda text: None) -> Images:
    """Open a recipe's training images, and its validation images where there are labels.

    Raises:
        ConfigError: the images lack labels that the recipe needs, or are all of one class.
    """
    data = recipe.data
    if not data.dir:
        raise ConfigError("no images are given", Set("data.dir", "FOLDER"))
    reading = [name for name, objective in recipe.objectives.items() if objective.reads_labels]
    train, val = open_source(data.dir, "train", val_split=data.val_split), None
    if reading and len(train.classes) < 2:
        one = f"are all of one class ({train.classes[0]!r})" if train.classes else ""
        found = one or "have no labels (no class folders)"
        what = f"the images in {data.dir} {found}, and the objective {reading[0]!r} reads labels"
        raise ConfigError(what, (Set("data.dir"), Drop(reading[0])))
    if len(train.classes) != 1:
        try:
            classes = train.classes or None
            val = open_source(data.dir, "val", classes=classes, val_split=data.val_split)
            shown = {*val.labels.tolist()}
            absent = [name for i, name in enumerate(train.classes) if i not in shown]
            if absent:
                what = f"{val.name} has no images of {listed(absent)}, which scores leave out"
                say(DataError(what, "add some, to judge these classes too"))
        except MissingSplit:
            if reading:
                raise
    if train.classes and val is None:
        say("no validation images, or one class alone: nothing is evaluated")
    if data.skip_damaged:
        say("every image is decoded once, to leave damaged ones out")
    how = data.skip_damaged, data.workers
    train, val = check_images(train, *how), None if val is None else check_images(val, *how)
    if data.unlabelled is not None:
        train = join(train, check_images(open_unlabelled(recipe, train), *how), val)
    images = Images(train, val, train.classes if val is not None else ())
    for note in images.notes:
        say(note)
    return images


def open_unlabelled(recipe: Recipe, train: ImageSource) -> ImageSource:
    """Open the images without labels; `ConfigError` where they would have no effect."""
    assert recipe.data.unlabelled is not None
    why = "" if train.classes else f"the images in {train.name} have no labels either"
    if not recipe.learns_without_labels:
        why = "every objective reads labels"
    if why:
        what = f"{why}, so further images without labels have no effect"
        raise ConfigError(what, Set("data.unlabelled", "none"))
    try:
        return open_source(recipe.data.unlabelled, "train")
    except UserError as error:
        error.field = "data.unlabelled"
        raise


def judge_by_teacher(images: Images, networks: Networks, say: Say) -> tuple[Images, Networks]:
    """Keep validation images beside unlabelled training images if the teacher has their classes.

    A teacher without class names is matched by their number, and proved by its accuracy.
    """
    if images.val is None or images.train.classes:
        return images, networks
    classes, count = images.val.classes, networks.distillation.plan.student.num_classes
    answered = networks.classes or (classes if count == len(classes) else ())
    if set(classes) <= set(answered):
        renumber(images.val, answered)
        return images, replace(networks, classes=answered)
    say(
        f"the training images are unlabelled, and the classes of {images.val.name}"
        f" ({listed(classes)}) are not the teacher's: nothing is evaluated"
    )
    return replace(images, val=None), networks


def loading_of(recipe: Recipe, world: World) -> Loading:
    data, train = recipe.data, recipe.train
    return Loading(
        batch_size=train.batch_size,
        seed=recipe.data_seed,
        accumulate=train.accumulate,
        workers=data.workers,
        in_memory=data.in_memory,
        views=data.views,
        labelled_share=data.labelled_share,
        world=world,
    )


def make_loaders(
    recipe: Recipe, images: Images, networks: Networks, world: World, say: Say
) -> Loaders:
    spec, data = networks.spec, recipe.data
    labels = {
        name: LabelReader(name, store, recipe.teachers[name].missing == "online")
        for name, store in open_labels(recipe).items()
    }
    judged_by = partial(
        EvalLoader,
        spec=spec,
        batch_size=recipe.train.eval_batch_size,
        workers=data.workers,
        world=world,
    )
    val, bank, proof = None, None, None
    if images.val is not None:
        proof, val = judged_by(images.val, limit=NUM_IMAGES), judged_by(images.val)
        if not networks.classes:
            bank = judged_by(images.labelled, limit=NUM_BANK)
            val = judged_by(images.val, limit=NUM_QUERIES)
            num = min(NUM_BANK, len(images.labelled))
            say(f"evaluated by the {min(K, num)} nearest of {num} training images (k-NN)")
    few, alone = images.val or images.train, World(0, 1, world.device)
    shown = EvalLoader(few, spec, batch_size=NUM_PICTURES, world=alone, limit=NUM_PICTURES)
    train = TrainLoader(images.train, data.augment, spec, loading_of(recipe, world), labels)
    return Loaders(train, val, bank, proof, shown)


def shares_at_start(prepared: Prepared) -> list[str | UserError]:
    """Return lines on how much each objective weighs before the first step, on a few images.

    Return [] if labels are stored: they belong to the views of training.
    """
    if prepared.plan.stored:
        return []
    with prepared.in_micro_batch(0, 0), memory_errors("before the first step", _LESS):
        batch = next(iter(prepared.loaders.shown))
        num_images = max(prepared.recipe.train.micro_batch(prepared.world.size), 2)
        batch = batch.rows(torch.arange(min(num_images, len(batch.ids)), device=batch.ids.device))
        shares = measure_shares(prepared.distillation.train(), batch, prepared.teachers)
    return describe_shares(shares)


def prove_teachers(prepared: Prepared, say: Say) -> dict[str, Proof]:
    """Prove every teacher that runs, say what is suspicious, and return the proofs by name."""
    world, images, found = prepared.world, prepared.loaders.proof, dict[str, Proof]()
    classes = prepared.networks.classes or prepared.images.classes
    for name, teacher in prepared.teachers.items():
        needs, doubts = prepared.plan.reads(name), [doubt_weights(teacher)]
        with world.autocast(prepared.amp_dtype):
            if images is not None and needs.logits:
                accept = prepared.recipe.teachers[name].accept_unproven
                proof = found[name] = prove_teacher(teacher, images, classes, world, accept)
                right = describe_accuracy(proof.accuracy, proof.num_images)
                say(f"{name}: {right} (chance {proof.chance:.1%})")
                doubts = [*proof.doubts, doubt_views(teacher, proof, images, world)]
                num_keep = prepared.plan.num_keep[name]
                if prepared.plan.selector is not None and num_keep is not None:
                    accuracy = accuracy_on_chosen(prepared.distillation, teacher, images, world)
                    shown = f"the {num_keep} of {teacher.network.num_patches} patches it is shown"
                    say(f"{name}: right on {accuracy:.1%} of them by {shown} at the start")
            elif images is not None:
                prove_features(teacher, needs, images, world)
                say(f"{name}: its features are finite and differ from image to image")
        for doubt in filter(None, doubts):
            say(doubt)
    return found


def unused_parameters(prepared: Prepared) -> tuple[str, ...]:
    """Name the trainable parameters no loss reaches, by a backward pass over blank images.

    Which these are depends on the plan alone, not on images, labels or mode (tests/contract).
    With ``train.compile`` the pass is a whole micro-batch, and also compiles the networks.
    """
    distillation, train, size = prepared.distillation, prepared.recipe.train, 2
    if train.compile:
        size = train.micro_batch(prepared.world.size)
        compile_networks(distillation, *prepared.teachers.values())
    batch = blank_batch(prepared.plan, size, prepared.world.device)
    named = {name: p for name, p in distillation.named_parameters() if p.requires_grad}
    before = [buffer.clone() for buffer in distillation.buffers()]
    distillation.train(train.compile)
    with compile_errors(train.compile):
        with prepared.in_micro_batch(0, 0):
            loss = distillation(batch, prepared.teachers)["loss"]
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    with torch.no_grad():
        for buffer, value in zip(distillation.buffers(), before, strict=True):
            buffer.copy_(value)  # running means of BatchNorm
    reached = zip(named, grads, strict=True)
    return tuple(name.removeprefix("student.") for name, grad in reached if grad is None)


def distribute(prepared: Prepared) -> nn.Module:
    """Wrap the trained module so that processes average its gradients."""
    if prepared.world.size == 1:
        return prepared.distillation
    # Without device_ids: batches are on the device already.
    unused = bool(prepared.unused)
    return DistributedDataParallel(prepared.distillation, find_unused_parameters=unused)
