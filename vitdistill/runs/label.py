"""Labelling: run a recipe's teachers once, on exactly the views its student will see."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..distill.plan import Plan
from ..errors import Add, ConfigError, Drop, Give, Preempted, Say, Set
from ..labels.encoding import LogitEncoding
from ..labels.layout import Layout
from ..labels.manifest import Manifest
from ..labels.store import LabelStore
from ..labels.writing import write_missing
from ..memory import SMALLER_EVALUATION, memory_errors
from ..messages import format_bytes, format_duration, listed, plural
from ..recipes.config import Recipe
from ..recipes.settings import LabelOptions
from ..storage.atomic import disk_errors, require_free
from ..storage.manifest import MANIFEST
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..world import agreed, join_world
from .answers import LabelRun, prepare_teachers
from .folder import contents
from .networks import find_logit_readers
from .prepare import Prepared
from .stop import StopRequest

COMPLETE_CLASSES = 256  # up to this many, ``auto`` stores all logits; above, the largest
_DEFAULT_K = 10
_EVERY_S = 10.0


@dataclass(frozen=True)
class Labelled:
    """The label stores of a recipe's teachers, and how many parts this process wrote."""

    stores: dict[str, LabelStore]
    parts: int


def label(
    recipe: Recipe,
    output: str | Path,
    options: LabelOptions,
    *,
    device: str = "auto",
    say: Say = lambda text: None,
) -> Labelled:
    """Write the labels of every teacher of the recipe into ``output/NAME``, or go on with them.

    Every view that the recipe's student will see is labelled: ``data.views`` of each image, or one
    an epoch. Any number of processes, under torchrun or not, may run this at the same time. After
    `Preempted`, what is written stays, and the same call continues it.
    """
    output = Path(output)
    with join_world(device) as world:
        say = say if world.is_main else lambda text: None
        with world.together():
            recipe = _without_labels(recipe)
            with disk_errors(output):
                found = contents(output)
            if found and not any((output / name / MANIFEST).is_file() for name in found):
                what = f"{output} holds no labels, but {listed(found)}"
                raise ConfigError(what, Give("output"))
        run = LabelRun(prepare_teachers(recipe, world, say))
        with world.together(), memory_errors("while a teacher was tried", SMALLER_EVALUATION):
            manifests = _manifests(run, options)
            stores = _open_stores(output, manifests, say)
            for store in stores:  # raise on a truncated part, do not count it as written
                for place in store.sealed_parts():
                    store.load(*place)
        # From here on processes do not meet: each writes parts of its own. The launcher stops the
        # others when one fails, and passes a signal on to all.
        shape = next(iter(manifests.values()))
        progress = _Progress(say, world.is_main, shape.num_samples * shape.num_views)
        with StopRequest() as stop, progress:
            parts = write_missing(
                stores,
                partial(run.make, stop=stop, tell=progress.within),
                rank=world.rank,
                world_size=world.size,
                stop=lambda: bool(stop),
                progress=progress,
            )
        if stop:
            what = f"stopped by {stop.name}; what is written in {output} stays"
            raise agreed(Preempted(what, "the same command goes on from there"))
        return Labelled(dict(zip(manifests, stores, strict=True)), parts)


def _without_labels(recipe: Recipe) -> Recipe:
    """Return the recipe with all teachers live; refuse answers that depend on more than a view."""
    if not recipe.teachers:
        raise ConfigError("the recipe has no teacher to label with", Add("kd"), field="teachers")
    for field in ("selector", "masking"):
        part = getattr(recipe, field)
        if part is not None:
            what = f"{type(part).__name__} chooses patches anew in every step"
            raise ConfigError(f"{what}, and labels are of whole images", Drop(field), field=field)
    if recipe.data.augment.repeated_aug > 1:
        what = "labels are of one view an image and epoch, and repeated augmentation shows several"
        raise ConfigError(what, Set("data.augment.repeated_aug", 1))
    teachers = recipe.teachers.items()
    return replace(
        recipe, teachers={name: replace(t, labels=None, missing="error") for name, t in teachers}
    )


# -- what is stored -------------------------------------------------------------------------------


def logit_encoding(recipe: Recipe, teacher: Network, options: LabelOptions) -> LogitEncoding:
    readers = find_logit_readers(recipe.objectives, teacher)
    read_at = [objective.teacher_temperatures for objective in readers]
    kind, k, temperatures = options.encoding, options.k or 0, options.temperatures
    if kind == "auto":
        sparse = all(wanted is not None and len(wanted) <= 1 for wanted in read_at)
        kind = "topk" if teacher.num_classes > COMPLETE_CLASSES and sparse else "float16"
    if kind == "topk":
        k = _DEFAULT_K if options.k is None else options.k
        wanted_at = sorted({t for wanted in read_at for t in wanted or ()})
        temperatures = temperatures or tuple(wanted_at) or (1.0,)
    return LogitEncoding(kind=kind, num_classes=teacher.num_classes, k=k, temperatures=temperatures)


def foresee_layout(recipe: Recipe, plan: Plan, name: str, options: LabelOptions) -> Layout:
    """Return the layout of a teacher's labels in advance; sizes of hidden states are 0.

    Raises:
        ConfigError: the recipe reads attention, or an option cannot take effect.
    """
    needs = plan.live[name]
    if needs.attention or needs.qkv:
        what = f"the recipe reads attention of the {name}, which is too large to be stored"
        raise ConfigError(what, "leave out the objective that does", field="objectives")
    if options.hidden_dtype is not None and not (needs.hidden or needs.features):
        what = f"hidden_dtype cannot take effect: the recipe reads only logits of the {name}"
        raise ConfigError(what, "leave hidden_dtype out", field="hidden_dtype")
    return Layout(
        logits=logit_encoding(recipe, plan.teachers[name], options) if needs.logits else None,
        hidden=tuple((block, 0, 0) for block in sorted(needs.hidden)),
        features=(0, 0) if needs.features else None,
        hidden_dtype=options.hidden_dtype or "float16",
    )


def _layout(prepared: Prepared, name: str, answer: ViTOutput, options: LabelOptions) -> Layout:
    features = answer.features
    return replace(
        foresee_layout(prepared.recipe, prepared.plan, name, options),
        hidden=tuple((b, h.shape[1], h.shape[2]) for b, h in sorted(answer.hidden.items())),
        features=None if features is None else (features.shape[1], features.shape[2]),
    )


def _manifests(run: LabelRun, options: LabelOptions) -> dict[str, Manifest]:
    """Label a batch without storing it, to see what each teacher records."""
    prepared, manifests = run.prepared, {}
    batch, answers = next(run.answers(0, 0, min(run.batch_size, len(prepared.images.train))))
    for name, answer in answers.items():
        run.layouts[name] = _layout(prepared, name, answer, options)
        run.records(name, 0, batch, answer)
        network = replace(prepared.plan.teachers[name], grids=dict(answer.grids))
        manifests[name] = run.manifest(name, network, options.part_size)
    return manifests


# -- writing --------------------------------------------------------------------------------------


def _open_stores(output: Path, manifests: Mapping[str, Manifest], say: Say) -> list[LabelStore]:
    """Open or create the teachers' stores; say how much there is to write."""
    size = 0
    for name, manifest in manifests.items():
        folder = output / name
        there = LabelStore.open(folder).status().records if (folder / MANIFEST).is_file() else 0
        left = max(manifest.num_samples * manifest.num_views - there, 0)
        size += left * manifest.layout.record_bytes
        record = format_bytes(manifest.layout.record_bytes)
        say(
            f"{name}: {manifest.layout.describe()}, {record} a record,"
            f" {manifest.num_samples:,} images x {plural(manifest.num_views, 'view')}"
        )
    if size:
        require_free(output, size + 1_000_000)
    say(f"{format_bytes(size)} to write in {output}")
    return [LabelStore.create(output / name, m) for name, m in manifests.items()]


class _Progress(Progress):
    """A bar on a terminal, elsewhere a line every few seconds; both move inside a part too."""

    def __init__(self, say: Say, enabled: bool, num_views: int) -> None:
        console = Console()
        silent = not (enabled and console.is_terminal)
        super().__init__(console=console, transient=True, disable=silent)
        self._bar = self.add_task("labelling", total=None)
        self._say, self._parts, self._num_views = say, (0, 0), num_views
        self._start: int | None = None
        self._said = ""
        self._begun = self._shown = time.perf_counter()

    def __call__(self, done: int, total: int, share: float = 0.0) -> None:
        """Show that ``done`` of ``total`` parts are there, and a ``share`` of the next one."""
        self._parts, at, now = (done, total), done + share, time.perf_counter()
        self.update(self._bar, completed=at, total=total)
        due = self.disable and now - self._shown > _EVERY_S
        if self._start is None:  # some parts may have been there already
            self._start = done
        elif at > self._start and (due or done == total):
            self._shown = now
            left = (now - self._begun) / (at - self._start) * (total - at)
            line = f"{at / total:.0%} of {plural(self._num_views, 'view')}"
            line += f", {format_duration(left)} left"
            if line != self._said:  # the end of the last part is the end of all
                self._say(line)
                self._said = line

    def within(self, share: float) -> None:
        """Show that a ``share`` of a part is made."""
        self(*self._parts, share)
