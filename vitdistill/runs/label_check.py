"""Checking labels: run the teacher again on some of them."""

from dataclasses import dataclass, replace

import numpy as np

from .. import keyed
from ..errors import DataError, Give, Say
from ..labels.identity import differing
from ..labels.layout import Layout, Records
from ..labels.store import LabelStore
from ..methods.base import TeacherObjective
from ..recipes.config import Recipe
from ..recipes.convert import from_dict
from ..world import join_world
from .answers import LabelRun, prepare_teachers

_CHUNK = 32  # records of a part that are checked before another part is opened


@dataclass(frozen=True)
class Check:
    """How a teacher's new answers, encoded, compare with the stored ones."""

    count: int  # records compared
    views: int  # how many of them have the pixels that were labelled
    agreement: float  # how often the most probable class is the same
    variation: float  # mean of half the sum of absolute probability differences
    hidden: float  # largest difference of hidden states or features, over the largest value
    tolerance: float  # for the last two, by the teacher's precision

    @property
    def as_stored(self) -> bool:
        """Whether the differences are those of rounding."""
        return self.views == self.count and max(self.variation, self.hidden) <= self.tolerance

    def __str__(self) -> str:
        limit = "at most" if self.as_stored else "more than rounding,"
        hidden = f", hidden states within {self.hidden:.2g}" if self.hidden else ""
        return (
            f"{self.count} records answered anew: {self.views} views as labelled, top class equal"
            f" in {self.agreement:.1%}, total variation {self.variation:.2g}{hidden}"
            f" ({limit} {self.tolerance:g})"
        )


def check(
    store: LabelStore,
    samples: int,
    *,
    data_dir: str | None = None,
    model: str | None = None,
    device: str = "auto",
    say: Say = lambda text: None,
) -> Check:
    """Run the teacher again on about ``samples`` stored (view, image), in random places.

    ``data_dir`` and ``model``: where the images and the teacher are now, if they moved. `DataError`
    if they are not those of the labels.
    """
    about, sealed = store.manifest.about, list(store.sealed_parts())
    if not sealed:
        raise DataError(f"{store.path} has no records yet", "label first")
    name = str(about["teacher"])
    recipe = from_dict(about["recipe"], f"the recipe of {store.path}")
    recipe = _alone(recipe, name, data_dir, model)
    stored, now = [], []
    with join_world(device) as world:
        run = LabelRun(prepare_teachers(recipe, world, say), {name: store.layout})
        changed = differing(store.manifest.identity, run.identity(name))
        if changed:
            what = f"what made the labels in {store.path} has changed: {changed}"
            raise DataError(what, (Give("data_dir"), Give("teacher_model")))
        for view, first, last in _places(store, sealed, samples, recipe.data_seed):
            for batch, answers in run.answers(view, first, last):
                stored.append(store.read(np.full(len(batch.ids), view), batch.ids)[0])
                now.append(run.records(name, view, batch, answers[name]))
    tolerance = 1e-3 if store.manifest.identity["teacher.precision"] == "float32" else 5e-2
    return _compare(store.layout, np.concatenate(stored), np.concatenate(now), tolerance)


def _places(
    store: LabelStore, sealed: list[tuple[int, int]], samples: int, seed: int
) -> list[tuple[int, int, int]]:
    """Choose (view, first, last) of about ``samples`` records, spread over sealed parts."""
    chunk = min(_CHUNK, store.manifest.part_size)
    order = keyed.permutation(seed, 0, len(sealed), keyed.Stream.SUBSET)[: -(-samples // chunk)]
    each = -(-samples // len(order))
    places = []
    for number in map(int, order):
        view, part = sealed[number]
        low, high = store.manifest.part_range(part)
        first = low + number * each % max(high - low - each + 1, 1)
        places.append((view, first, min(first + each, high)))
    return places


def _alone(recipe: Recipe, name: str, data_dir: str | None, model: str | None) -> Recipe:
    """Return the recipe with this one teacher, and without objectives that read another."""
    objectives = {
        # A student's head may be that of a teacher dropped here; which head it is does not matter.
        key: replace(objective, head="all") if hasattr(objective, "head") else objective  # type: ignore[call-arg]
        for key, objective in recipe.objectives.items()
        if not isinstance(objective, TeacherObjective) or objective.teacher == name
    }
    teacher = recipe.teachers[name]
    if model is not None:
        teacher = replace(teacher, model=model, checkpoint=None, pretrained=False)
    data = recipe.data if data_dir is None else replace(recipe.data, dir=data_dir)
    return replace(recipe, teachers={name: teacher}, objectives=objectives, data=data)


def _compare(layout: Layout, stored: Records, now: Records, tolerance: float) -> Check:
    ours, theirs = layout.targets(now), layout.targets(stored)
    agreement, variation, hidden = 1.0, 0.0, 0.0
    if layout.logits is not None:
        t = layout.logits.temperatures[0] if layout.logits.temperatures else 1.0
        a, b = ((targets.logits(t) / t).double().softmax(-1) for targets in (ours, theirs))
        agreement = float((a.argmax(-1) == b.argmax(-1)).double().mean())
        variation = float((a - b).abs().sum(-1).mean() / 2)
    pairs = [(ours.hidden[i], theirs.hidden[i]) for i in ours.hidden]
    if ours.features is not None and theirs.features is not None:
        pairs.append((ours.features, theirs.features))
    for a, b in pairs:
        hidden = max(hidden, float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)))
    views = int((ours.pixels == theirs.pixels).sum())
    return Check(len(ours), views, agreement, variation, hidden, tolerance)
