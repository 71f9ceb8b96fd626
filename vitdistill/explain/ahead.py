"""What the runs of a recipe will compute and cost, before any of them has run."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.loader import order_of
from ..data.sources.base import ImageSource, check_enough, typical_side
from ..data.sources.joined import join
from ..data.sources.open import open_source
from ..distill.plan import Plan
from ..errors import MissingSplit
from ..recipes.config import Recipe
from ..recipes.stages import Stages, in_stage
from ..runs.networks import Built, build_blank, plan_of
from ..runs.prepare import loading_of, open_unlabelled
from ..runs.stages import networks_ahead
from ..world import ALONE
from .cost import IMAGENET_TRAIN_IMAGES, Cost, cost_of
from .text import explain


@dataclass(frozen=True)
class Forecast:
    """One run as it will be."""

    recipe: Recipe  # with networks that can be built
    num_images: int  # an epoch
    num_classes: int
    image_side: int  # pixels
    kinds: str  # what an epoch shows of labelled and unlabelled images, see `Order.describe`
    plan: Plan  # of a step of one process
    cost: Cost

    @property
    def text(self) -> str:
        """The page about it."""
        epochs = self.recipe.train.epochs
        return explain(self.plan, self.cost, self.num_images, epochs, self.image_side, self.kinds)

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return self.cost.step * self.num_images * self.recipe.train.epochs


@dataclass(frozen=True)
class Known:
    """What several forecasts share, each counted once.

    Args:
        stages: forecasts of stages that are the same in all of them, by name.
        images: opened training images, by the settings that say which they are.
    """

    stages: dict[str, Forecast] = field(default_factory=dict)
    images: dict[tuple[Any, ...], ImageSource] = field(default_factory=dict)


def forecast(recipe: Recipe | Stages, known: Known | None = None) -> dict[str, Forecast]:
    """Return every run by its stage, whether or not the ones before it have run."""
    known = known or Known()
    if isinstance(recipe, Recipe):
        return {"": foresee(recipe, _count_images(recipe, known))}
    before: dict[str, int] = {}
    found = {}
    for key, stage in recipe.stages.items():
        if key in known.stages:
            found[key] = known.stages[key]
            before[key] = found[key].plan.student.num_classes
            continue
        with in_stage(key):
            counts = _count_images(stage, known)
        resolved, student, teachers = networks_ahead(recipe, key, counts[1], before)
        with in_stage(key):
            found[key] = _forecast(resolved, student, teachers, counts)
    return found


def foresee(recipe: Recipe, counts: tuple[int, int, int, str]) -> Forecast:
    """Forecast a run; ``counts`` are the fields of `Forecast` after its recipe."""
    with torch.device("meta"):
        student, teachers = build_blank(recipe, counts[1])
    return _forecast(recipe, student, teachers, counts)


def _count_images(recipe: Recipe, known: Known) -> tuple[int, int, int, str]:
    """Return the fields of `Forecast` after its recipe; ImageNet-1k's without data."""
    data = recipe.data
    if not data.dir:
        return IMAGENET_TRAIN_IMAGES, 1000, 0, ""
    which = data.dir, data.val_split, data.unlabelled, recipe.learns_without_labels
    if which not in known.images:
        known.images[which] = _open_images(recipe)
    source = known.images[which]
    check_enough(source, recipe.train.batch_size)
    order = order_of(source, data.augment, loading_of(recipe, ALONE))
    count = order.steps * recipe.train.batch_size
    return count, len(source.classes) or 1000, typical_side(source), order.describe()


def _open_images(recipe: Recipe) -> ImageSource:
    data = recipe.data
    source = open_source(data.dir, "train", val_split=data.val_split)
    if data.unlabelled is None:
        return source
    val = None
    with suppress(MissingSplit):
        val = open_source(data.dir, "val", val_split=data.val_split)
    return join(source, open_unlabelled(recipe, source), val)


def _forecast(
    recipe: Recipe, student: Built, teachers: dict[str, Built], counts: tuple[int, int, int, str]
) -> Forecast:
    plan = plan_of(recipe, student.network, {name: b.network for name, b in teachers.items()})
    models = {name: built.model for name, built in teachers.items()}
    micro_batch = recipe.train.micro_batch()
    return Forecast(recipe, *counts, plan, cost_of(plan, student.model, models, micro_batch))
