"""Labelling: a recipe's teachers answer, once, to the very views its student will see."""

import os
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from ..errors import Add, ConfigError, Drop, Give, Preempted, Set, UserError
from ..labels.encoding import LogitEncoding
from ..labels.layout import Layout
from ..labels.manifest import Manifest
from ..labels.store import LabelStore
from ..labels.writing import write_missing
from ..memory import SMALLER_EVALUATION, memory_errors
from ..messages import format_bytes, format_duration, listed, printable
from ..methods.base import TeacherObjective
from ..recipes.config import Recipe
from ..storage.atomic import disk_errors, require_free, write_atomic
from ..storage.manifest import MANIFEST
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..world import agreed, join_world
from .answers import LabelRun, prepare_teachers
from .prepare import Prepared, Say
from .stop import StopRequest

COMPLETE_CLASSES = 256
"""Up to so many classes ``auto`` stores all logits; above, the largest and the mass of the rest."""
_DEFAULT_K = 10
_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How answers are stored.

    Args:
        encoding: of the logits, see `LogitEncoding`; ``auto``: float16 up to 256 classes and
            wherever an objective reads all of them, else topk.
        k: classes that topk keeps; None: 10.
        temperatures: at which topk is right; empty: those of the recipe's objectives.
        hidden_dtype: of hidden states and features; None: float16.
        part_size: samples of a part, the unit of writing and resuming.
    """

    encoding: Literal["auto", "float32", "float16", "topk"] = "auto"
    k: int | None = None
    temperatures: tuple[float, ...] = ()
    hidden_dtype: Literal["float16", "float32"] | None = None
    part_size: int = 16384

    def __post_init__(self) -> None:
        if self.part_size < 1:
            raise ConfigError(
                f"a part of {self.part_size} samples holds nothing",
                Give("part_size"),
                field="part_size",
            )
        for name in ("k", "temperatures"):
            if getattr(self, name) not in (None, ()) and self.encoding != "topk":
                raise ConfigError(
                    f"{name} cannot take effect with the encoding {self.encoding}",
                    Give("encoding", "topk"),
                    field=name,
                )


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
    `Preempted`, what is written stays, and the same command goes on.
    """
    output = Path(output)
    with join_world(device) as world:
        say = say if world.is_main else lambda text: None
        with world.together():
            recipe = _without_labels(recipe)
            _refuse_foreign(output)
        prepared = prepare_teachers(recipe, world, say)
        with world.together(), memory_errors("while a teacher was tried", SMALLER_EVALUATION):
            run, networks, speed = _try_teachers(prepared, options)
            part_size = options.part_size
            manifests = {name: run.manifest(name, n, part_size) for name, n in networks.items()}
            stores = _open_stores(output, manifests, speed, say)
        return Labelled(stores, _write(run, stores, output, _Progress(say)))


def _without_labels(recipe: Recipe) -> Recipe:
    """Return the recipe as its teachers run it; refuse answers that depend on more than a view."""
    if not recipe.teachers:
        raise ConfigError("the recipe has no teacher to label with", Add("kd"), field="teachers")
    if recipe.selector is not None:
        raise ConfigError(
            f"{type(recipe.selector).__name__} chooses a teacher's patches anew in every step, so"
            " its answers cannot be stored",
            Drop("selector"),
            field="selector",
        )
    if recipe.masking is not None:
        raise ConfigError(
            f"{type(recipe.masking).__name__} hides patches, and labels are of whole images",
            "take a recipe without masking",
            field="masking",
        )
    if recipe.data.augment.repeated_aug > 1:
        raise ConfigError(
            "labels are of one view an image and epoch, and repeated augmentation shows several",
            Set("data.augment.repeated_aug", 1),
            field="data.augment.repeated_aug",
        )
    teachers = recipe.teachers.items()
    return replace(
        recipe, teachers={name: replace(t, labels=None, missing="error") for name, t in teachers}
    )


def _refuse_foreign(output: Path) -> None:
    """Raise `ConfigError` for a folder that holds something, and no labels."""
    with disk_errors(output):
        names = sorted(os.listdir(output)) if output.is_dir() else []
    found = [name for name in names if name[0] != "."]
    if found and not any((output / name / MANIFEST).is_file() for name in found):
        raise ConfigError(
            f"{printable(output)} holds no labels, but {listed(found)}",
            Give("output"),
            field="output",
        )


# -- what is stored -------------------------------------------------------------------------------


def logit_encoding(recipe: Recipe, teacher: Network, options: LabelOptions) -> LogitEncoding:
    """Return how this teacher's logits are stored."""
    readers = [
        objective.teacher_temperatures
        for objective in recipe.objectives.values()
        if isinstance(objective, TeacherObjective)
        and objective.teacher == teacher.name
        and objective.teacher_needs(teacher).logits
    ]
    kind = options.encoding
    if kind == "auto":
        sparse = all(wanted is not None and len(wanted) <= 1 for wanted in readers)
        kind = "topk" if teacher.num_classes > COMPLETE_CLASSES and sparse else "float16"
    if kind != "topk":
        return LogitEncoding(kind=kind, num_classes=teacher.num_classes)
    read_at = sorted({t for wanted in readers for t in wanted or ()})
    return LogitEncoding(
        kind="topk",
        num_classes=teacher.num_classes,
        k=_DEFAULT_K if options.k is None else options.k,
        temperatures=options.temperatures or tuple(read_at) or (1.0,),
    )


def _layout(prepared: Prepared, name: str, answer: ViTOutput, options: LabelOptions) -> Layout:
    needs, logits = prepared.plan.live[name], None
    if needs.attention or needs.qkv:
        raise ConfigError(
            f"the recipe reads attention of the {name}, which is too large to be stored",
            "leave out the objective that does",
            field="objectives",
        )
    if options.hidden_dtype is not None and not (needs.hidden or needs.features):
        raise ConfigError(
            f"hidden_dtype cannot take effect: the recipe reads only logits of the {name}",
            "leave hidden_dtype out",
            field="hidden_dtype",
        )
    if answer.logits is not None:
        logits = logit_encoding(prepared.recipe, prepared.plan.teachers[name], options)
    states, features = sorted(answer.hidden.items()), answer.features
    return Layout(
        logits=logits,
        hidden=tuple((block, state.shape[1], state.shape[2]) for block, state in states),
        features=None if features is None else (features.shape[1], features.shape[2]),
        hidden_dtype=options.hidden_dtype or "float16",
    )


def _try_teachers(
    prepared: Prepared, options: LabelOptions
) -> tuple[LabelRun, dict[str, Network], float]:
    """Label two batches to nowhere, to see what there is to store and how fast it is made.

    Returns:
        The run, each teacher with the grids of its answers, and images per second.
    """
    run = LabelRun(prepared, {})
    networks: dict[str, Network] = {}
    speed, begun = 0.0, time.perf_counter()
    for batch, answers in run.answers(0, 0, min(2 * run.batch_size, run.num_images)):
        for name, answer in answers.items():
            if name not in networks:
                run.layouts[name] = _layout(prepared, name, answer, options)
                networks[name] = replace(prepared.plan.teachers[name], grids=dict(answer.grids))
            run.records(name, 0, batch, answer)  # which waits for the device
        now = time.perf_counter()
        speed, begun = len(batch.ids) / (now - begun), now
    return run, networks, speed


# -- writing --------------------------------------------------------------------------------------


def _open_stores(
    output: Path, manifests: Mapping[str, Manifest], speed: float, say: Say
) -> dict[str, LabelStore]:
    """Return the teachers' stores, made if they are missing; say what is to be written."""
    missing, size = 0, 0
    for name, manifest in manifests.items():
        folder = output / name
        there = LabelStore.open(folder).status().records if (folder / MANIFEST).is_file() else 0
        left = max(manifest.num_samples * manifest.num_views - there, 0)
        missing, size = max(missing, left), size + left * manifest.layout.record_bytes
    if size:
        require_free(output, size + 1_000_000)
    stores = {name: LabelStore.create(output / name, m) for name, m in manifests.items()}
    for name, store in stores.items():
        say(f"{name}: {store.layout.describe()}, {store.layout.record_bytes} bytes a record")
    manifest = next(iter(manifests.values()))
    say(
        f"{manifest.num_samples:,} images x {manifest.num_views} views: {format_bytes(size)} to"
        f" write in {output}, about {format_duration(missing / speed)} of one process at"
        f" {speed:,.0f} images/s"
    )
    return stores


def _write(
    run: LabelRun, stores: dict[str, LabelStore], output: Path, progress: "_Progress"
) -> int:
    """Write what is missing, and return how many parts this process sealed.

    When one process fails or is asked to stop, all of torchrun's stop and raise its error. They do
    not meet before all is written, so the one leaves a note, a file that the others look for.
    """
    world = run.prepared.world
    note = output / f".stop-{world.from_main(partial(secrets.token_hex, 8))}"
    try:
        with StopRequest() as stop, world.together():

            def stopped() -> bool:
                return bool(stop) or (world.size > 1 and note.exists())

            done = False
            try:
                parts = write_missing(
                    [*stores.values()],
                    lambda unit: run.make(unit, stopped),
                    rank=world.rank,
                    world_size=world.size,
                    stop=stopped,
                    progress=progress,
                )
                done = not stop
            finally:
                if world.size > 1 and not done:
                    with suppress(UserError):  # on a full disk the others meet it too
                        write_atomic(note, b"")
        name = next((found for found in world.gather(stop.name) if found), "")
    finally:
        if world.is_main:
            with suppress(OSError):
                note.unlink(missing_ok=True)
    if name:
        raise agreed(
            Preempted(
                f"stopped by {name}; what is written in {output} stays, and the same command goes"
                " on from there"
            )
        )
    return parts


class _Progress:
    """A line every few seconds of writing."""

    def __init__(self, say: Say) -> None:
        self._say, self._begun, self._shown = say, time.perf_counter(), -_EVERY_S
        self._start: int | None = None
        self._last = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter() - self._begun
        if self._start is None:
            self._start = self._last = done
            if done:
                self._say(f"{done} of {total} parts are there already")
        if self._last < done and (now - self._shown > _EVERY_S or done == total):
            self._shown, self._last = now, done
            left = now / (done - self._start) * (total - done)
            rest = f", {format_duration(left)} left" if left else ""
            self._say(f"{done} of {total} parts{rest}")
