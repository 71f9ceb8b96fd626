"""What the runs of a recipe will compute and cost, before any of them has run."""

from contextlib import suppress
from dataclasses import dataclass

import torch

from ..data.loader import order_of
from ..data.sources.base import check_enough, typical_side
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


def forecast(recipe: Recipe | Stages) -> dict[str, Forecast]:
    """Return every run by its stage, whether or not the ones before it have run."""
    if isinstance(recipe, Recipe):
        return {"": foresee(recipe, _count_images(recipe))}
    before: dict[str, int] = {}
    found = {}
    for key, stage in recipe.stages.items():
        with in_stage(key):
            counts = _count_images(stage)
        resolved, student, teachers = networks_ahead(recipe, key, counts[1], before)
        with in_stage(key):
            found[key] = _forecast(resolved, student, teachers, counts)
    return found


def foresee(recipe: Recipe, counts: tuple[int, int, int, str]) -> Forecast:
    """Return a run of these first fields of a `Forecast`."""
    with torch.device("meta"):
        student, teachers = build_blank(recipe, counts[1])
    return _forecast(recipe, student, teachers, counts)


def _count_images(recipe: Recipe) -> tuple[int, int, int, str]:
    """Return the first fields of a `Forecast`; ImageNet-1k's without data."""
    if not recipe.data.dir:
        return IMAGENET_TRAIN_IMAGES, 1000, 0, ""
    source = open_source(recipe.data.dir, "train", val_split=recipe.data.val_split)
    if recipe.data.unlabelled is not None:
        val = None
        with suppress(MissingSplit):
            val = open_source(recipe.data.dir, "val", val_split=recipe.data.val_split)
        source = join(source, open_unlabelled(recipe, source), val)
    check_enough(source, recipe.train.batch_size)
    order = order_of(source, recipe.data.augment, loading_of(recipe, ALONE))
    count = order.steps * recipe.train.batch_size
    return count, len(source.classes) or 1000, typical_side(source), order.describe()


def _forecast(
    recipe: Recipe, student: Built, teachers: dict[str, Built], counts: tuple[int, int, int, str]
) -> Forecast:
    plan = plan_of(recipe, student.network, {name: b.network for name, b in teachers.items()})
    models = {name: built.model for name, built in teachers.items()}
    micro_batch = recipe.train.batch_size // recipe.train.accumulate
    return Forecast(recipe, *counts, plan, cost_of(plan, student.model, models, micro_batch))
