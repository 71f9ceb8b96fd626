"""Labelling: a recipe's teachers answer, once, to the very views its student will see."""

import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from .. import keyed
from ..data.batch import TeacherBatch
from ..errors import ConfigError, DataError, Give, NonFiniteError, Preempted, Set, UserError
from ..labels.encoding import LogitEncoding
from ..labels.identity import differing, network_to_json, teacher_identity, versions
from ..labels.layout import Layout, NonFinite
from ..labels.manifest import Manifest
from ..labels.store import LabelStore
from ..labels.writing import Unit, write_missing
from ..memory import SMALLER_EVALUATION, memory_errors
from ..messages import format_bytes, format_duration
from ..methods.base import TeacherObjective
from ..recipes.config import Recipe
from ..recipes.convert import from_dict, to_dict
from ..storage.atomic import disk_errors, require_free, write_atomic
from ..storage.manifest import MANIFEST
from ..vit.flops import forward_flops
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..weights import create as weights
from ..world import World, agreed, join_world
from .identity import resolve_run
from .networks import weights_digest
from .prepare import Prepared, prepare
from .stop import StopRequest
from .stored import identity_of_views

DENSE_CLASSES = 256
"""Up to so many classes ``auto`` stores all logits; above, the ten largest and the mass of the
others.
"""


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How answers are stored.

    Args:
        encoding: of the logits, see `LogitEncoding`; ``auto``: float16 up to 256 classes and
            wherever an objective needs all of them, else topk.
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
                f"a part of {self.part_size} samples holds nothing", Give("part_size")
            )
        for name in ("k", "temperatures"):
            if getattr(self, name) not in (None, ()) and self.encoding != "topk":
                raise ConfigError(
                    f"{name} cannot take effect with the encoding {self.encoding}",
                    Give("encoding", "topk"),
                    field=name,
                )


@dataclass
class Labelled:
    """What labelling a recipe came to: its teachers' stores by name, and the parts this process
    wrote.
    """

    stores: dict[str, LabelStore] = field(default_factory=dict)
    parts: int = 0


def logit_encoding(recipe: Recipe, teacher: Network, options: LabelOptions) -> LogitEncoding:
    """How this teacher's logits are stored."""
    name, num_classes = teacher.name, teacher.num_classes
    readers = [
        o
        for o in recipe.objectives.values()
        if isinstance(o, TeacherObjective) and o.teacher == name
    ]
    wanted = [o.teacher_temperatures for o in readers if o.teacher_needs(teacher).logits]
    kind = options.encoding
    if kind == "auto":
        all_at_one = all(found is not None and len(found) <= 1 for found in wanted)
        kind = "topk" if num_classes > DENSE_CLASSES and all_at_one else "float16"
    if kind != "topk":
        return LogitEncoding(kind=kind, num_classes=num_classes)
    temperatures = (
        options.temperatures
        or tuple(sorted({t for found in wanted if found is not None for t in found}))
        or (1.0,)
    )
    return LogitEncoding(
        kind=kind,
        num_classes=num_classes,
        k=10 if options.k is None else options.k,
        temperatures=temperatures,
    )


def label(
    recipe: Recipe,
    output: str | Path,
    options: LabelOptions,
    *,
    device: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> Labelled:
    """Write the labels of every teacher of the recipe into ``output/NAME``, or go on with those
    that are there.

    Every view that the recipe's student will see is labelled: ``data.views`` of each image, or one
    an epoch. Any number of processes, under torchrun or not, may run this at the same time.

    Raises:
        UserError: one sentence, before anything is written for everything that can be known before.
        Preempted: it was asked to stop; what is written stays, and the same command goes on.
    """
    with join_world(device) as here:
        with here.together():
            recipe = _without_labels(recipe)
            _refuse_foreign(Path(output))
        job = prepare(
            for_teachers(recipe, here.size), here, say if here.is_main else lambda text: None
        )
        job = replace(job, recipe=recipe)
        with here.together(), memory_errors("while a teacher was tried", SMALLER_EVALUATION):
            work = _Work(job, options)
            stores = work.stores(Path(output), say if here.is_main else lambda text: None)
        return Labelled(
            stores,
            _write(
                here, work, stores, Path(output), _Progress(work, say) if here.is_main else None
            ),
        )


def _write(
    here: World,
    work: "_Work",
    stores: dict[str, LabelStore],
    output: Path,
    progress: "_Progress | None",
) -> int:
    """Write what is missing, and return how many parts this process sealed.

    When one process fails or is asked to stop, all of torchrun's stop: between meetings the others
    see the note that it leaves.

    Raises:
        UserError: of the first process that failed, on every one.
        Preempted: one was asked to stop.
    """
    note = output / f".stop-{here.from_main(partial(secrets.token_hex, 8))}"
    try:
        with StopRequest() as stop, here.together():

            def stopped() -> bool:
                return bool(stop.name) or (here.size > 1 and os.path.exists(note))

            done = False
            try:
                parts = write_missing(
                    [*stores.values()],
                    lambda unit: work.make(unit, stopped),
                    rank=here.rank,
                    world_size=here.size,
                    stop=stopped,
                    progress=progress or (lambda done, total: None),
                )
                done = not stop.name
            finally:
                if here.size > 1 and not done:
                    with suppress(UserError):  # on a full disk the others meet it too
                        write_atomic(note, b"")
        name = next((found for found in here.gather(stop.name) if found), "")
    finally:
        if here.is_main:
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


def for_teachers(recipe: Recipe, processes: int = 1) -> Recipe:
    """The recipe as labelling needs it: of the student only its input, and batches of training that
    divide among any processes.
    """
    student = replace(recipe.student, checkpoint=None, pretrained=False)
    return replace(
        recipe, student=student, train=replace(recipe.train, batch_size=2 * processes, accumulate=1)
    )


def _refuse_foreign(output: Path) -> None:
    """Raise `ConfigError` for a folder that holds something, and no labels."""
    with disk_errors(output):
        found = (
            sorted(path.name for path in output.iterdir() if path.name[0] != ".")
            if output.is_dir()
            else []
        )
    if found and not any((output / name / MANIFEST).is_file() for name in found):
        raise ConfigError(
            f"the output {output} is not empty ({found[0]} is in it) and holds no labels: name"
            " another folder"
        )


def _without_labels(recipe: Recipe) -> Recipe:
    """The recipe as its teachers are to run it; raises `ConfigError` for one without any, or whose
    answers depend on more than a view.
    """
    if not recipe.teachers:
        raise ConfigError(
            "the recipe has no teacher to label with: take one that has, or add one (--with kd"
            " --teacher-model ...)"
        )
    if recipe.selector is not None:
        raise ConfigError(
            f"{type(recipe.selector).__name__} chooses a teacher's patches anew in every step, so"
            " its answers cannot be stored: leave it out (--without selector)"
        )
    if recipe.masking is not None:
        raise ConfigError(
            f"labels are answers to whole images, and {type(recipe.masking).__name__} hides"
            " patches: take a recipe without"
        )
    if recipe.data.augment.repeated_aug > 1:
        raise ConfigError(
            "labels are of one view an image and epoch, and repeated_aug shows several of some: set"
            " --repeated-aug 1"
        )
    return replace(
        recipe,
        teachers={
            name: replace(t, labels=None, missing="error") for name, t in recipe.teachers.items()
        },
    )


class _Work:
    """The teachers of a job, and how their answers become records."""

    def __init__(self, job: Prepared, options: LabelOptions) -> None:
        self.job, self.options = job, options
        self.batch_size = job.recipe.train.eval_batch_size
        self.num_views = job.recipe.data.views or job.recipe.train.epochs
        self.layouts: dict[str, Layout] = {}
        self.networks: dict[str, Network] = {}
        for name, needs in job.plan.live.items():
            if needs.attention or needs.qkv:
                raise ConfigError(
                    f"the recipe reads attention of the {name}, which is too large to be stored:"
                    " leave out the objective that does"
                )
        count = min(2 * self.batch_size, len(job.loaders.train.source))
        timed = begun = time.perf_counter()
        for batch, answers in self.answers(0, 0, count):
            if not self.layouts:
                for name, output in answers.items():
                    self.layouts[name] = self._layout(name, output)
                    self.networks[name] = replace(job.plan.teachers[name], grids=dict(output.grids))
                timed = begun if count <= self.batch_size else time.perf_counter()
            for name, answer in answers.items():
                self.records(name, 0, batch, answer)  # which waits for the device
            self.images_per_second = len(batch.ids) / (time.perf_counter() - timed)

    def _layout(self, name: str, output: ViTOutput) -> Layout:
        needs = self.job.plan.live[name]
        if self.options.hidden_dtype is not None and not (needs.hidden or needs.features):
            raise ConfigError(
                f"hidden_dtype cannot take effect: the recipe reads no hidden states of the {name},"
                " only logits"
            )
        shapes = {
            block: (hidden.shape[1], hidden.shape[2])
            for block, hidden in sorted(output.hidden.items())
        }
        return Layout(
            logits=(
                None
                if output.logits is None
                else logit_encoding(self.job.recipe, self.job.plan.teachers[name], self.options)
            ),
            hidden=tuple((block, *shape) for block, shape in shapes.items()),
            features=(
                None
                if output.features is None
                else (output.features.shape[1], output.features.shape[2])
            ),
            hidden_dtype=self.options.hidden_dtype or "float16",
        )

    def stores(self, output: Path, say: Callable[[str], None]) -> dict[str, LabelStore]:
        """The teachers' stores, made if they are not there; says what is to be written."""
        manifests = {name: self._manifest(name) for name in self.layouts}
        there = {
            name: LabelStore.open(output / name)
            for name in manifests
            if (output / name / MANIFEST).is_file()
        }
        images = len(self.job.loaders.train.source)
        left = {
            name: images * self.num_views - (there[name].status().records if name in there else 0)
            for name in manifests
        }
        size = sum(
            max(left[name], 0) * manifest.layout.record_bytes
            for name, manifest in manifests.items()
        )
        if size:
            require_free(output, size + 1_000_000)
        stores = {
            name: LabelStore.create(output / name, manifest) for name, manifest in manifests.items()
        }
        for name, store in stores.items():
            say(f"{name}: {describe(store.layout)}, {store.layout.record_bytes} bytes a record")
        say(
            f"{images:,} images x {self.num_views} views: {format_bytes(size)} to write in"
            f" {output}, about {format_duration(max(left.values()) / self.images_per_second)} of"
            f" one process at {self.images_per_second:,.0f} images/s"
        )
        return stores

    def identity(self, name: str) -> dict[str, Any]:
        """What the labels of this teacher belong to."""
        job, teacher = self.job, self.job.teachers[name]
        precision = str(teacher.dtype or job.amp_dtype or torch.float32).removeprefix("torch.")
        if (
            precision == "float32"
            and job.world.device.type == "cuda"
            and torch.backends.cuda.matmul.allow_tf32
        ):
            precision = "tf32"
        views = identity_of_views(
            job.recipe,
            job.loaders.train.source,
            job.networks.classes,
            job.networks.spec,
            job.loaders.train.pipeline,
        )
        config = job.recipe.teachers[name]
        architecture, args = weights.describe(resolve_run(config.model), config.model_args)
        classes = None if teacher.class_index is None else teacher.class_index.tolist()
        made = {
            "teacher.architecture": architecture.partition(".")[0],
            "teacher.model_args": args,
            "teacher.classes_taken": classes,
        }
        return (
            views
            | made
            | teacher_identity(
                weights_digest(teacher.model), teacher.spec, precision, self.batch_size
            )
        )

    def _manifest(self, name: str) -> Manifest:
        job = self.job
        teacher, recipe = job.teachers[name], job.recipe
        return Manifest(
            identity=self.identity(name),
            layout=self.layouts[name],
            num_samples=len(job.loaders.train.source),
            num_views=self.num_views,
            part_size=self.options.part_size,
            about={
                "teacher": name,
                "versions": versions(),
                "network": network_to_json(
                    replace(
                        self.networks[name],
                        flops=forward_flops(teacher.model, teacher.spec.image_size),
                    )
                ),
                "recipe": to_dict(recipe),
                "classes": list(job.networks.classes),
                "command": shlex.join(["vitdistill", *sys.argv[1:]]),
            },
        )

    def answers(
        self, view: int, first: int, last: int
    ) -> Iterator[tuple[TeacherBatch, dict[str, ViTOutput]]]:
        """Batches of these samples in this view, and what every teacher says of them."""
        job = self.job
        for batch in job.loaders.train.teacher_batches(view, first, last, self.batch_size):
            with torch.autocast(
                job.world.device.type, job.amp_dtype, enabled=job.amp_dtype is not None
            ):
                yield (
                    batch,
                    {
                        name: teacher(batch.images, job.plan.live[name])
                        for name, teacher in job.teachers.items()
                    },
                )

    def make(self, unit: Unit, stop: Callable[[], bool]) -> list[npt.NDArray[Any]] | None:
        """The records of a part for each of its stores; None when asked to stop."""
        names = [
            next(name for name in self.layouts if store.path.name == name) for store in unit.stores
        ]
        made: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
        for batch, answers in self.answers(unit.view, unit.lo, unit.hi):
            if stop():
                return None
            for name in names:
                made[name].append(self.records(name, unit.view, batch, answers[name]))
        return [np.concatenate(made[name]) for name in names]

    def records(
        self, name: str, view: int, batch: TeacherBatch, answer: ViTOutput
    ) -> npt.NDArray[Any]:
        """A teacher's answer to a batch as records."""
        try:
            return self.layouts[name].encode(
                answer.logits, answer.hidden, answer.features, batch.checksums
            )
        except NonFinite as error:
            sample = int(batch.ids[error.index])
            key = self.job.loaders.train.source.key(sample)
            raise NonFiniteError(
                f"the answer of the {name} to view {view} of sample {sample} ({key}) cannot be"
                f" stored ({error})",
                ("check its weights", Set(f"teachers.{name}.precision", "float32")),
                field=f"teachers.{name}.precision",
            ) from error


class _Progress:
    """A line every few seconds of writing."""

    def __init__(self, work: _Work, say: Callable[[str], None]) -> None:
        self.say, self.begun, self.shown, self.start, self.last = (
            say,
            time.perf_counter(),
            -10.0,
            -1,
            -1,
        )

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter() - self.begun
        if self.start < 0:
            self.start = done
            if done:
                self.say(f"{done} of {total} parts are there already")
        if self.last < done and done > self.start and (now - self.shown > 10.0 or done == total):
            self.shown, self.last = now, done
            left = (
                f", {format_duration(now / (done - self.start) * (total - done))} left"
                if done < total
                else ""
            )
            self.say(f"{done} of {total} parts{left}")


@dataclass(frozen=True)
class Check:
    """How a teacher's answers, made anew, compare with what is stored; both pass through the
    store's encoding first.

    Attributes:
        count: records compared; views: of them, how many views have the pixels that were labelled.
        agreement: how often the most probable class is the same; 1 where no logits are stored.
        divergence: KL(now || stored) of the probabilities, mean.
        variation: total variation of the probabilities, half the sum of their differences, mean.
        hidden: largest difference of hidden states and features, over the largest of them; 0 where
            none are stored.
        tolerance: for ``variation`` and ``hidden``, by the arithmetic's precision.
    """

    count: int
    views: int
    agreement: float
    divergence: float
    variation: float
    hidden: float
    tolerance: float

    @property
    def as_stored(self) -> bool:
        """Whether the differences are those of rounding."""
        return (
            self.views == self.count
            and self.variation <= self.tolerance
            and self.hidden <= self.tolerance
        )

    def __str__(self) -> str:
        text = (
            f"{self.count} records answered anew: {self.views} views as labelled, top class equal"
            f" in {self.agreement:.1%}"
        )
        text += f", divergence {self.divergence:.2g}, total variation {self.variation:.2g}"
        if self.hidden:
            text += f", hidden states within {self.hidden:.2g}"
        return (
            f"{text} (at most {self.tolerance:g})"
            if self.as_stored
            else f"{text}, which is more than rounding ({self.tolerance:g})"
        )


CHUNK = 32
"""Records that are checked side by side."""


def check(
    store: LabelStore,
    name: str,
    samples: int,
    *,
    data_dir: str | None = None,
    model: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> Check:
    """Run the teacher again on about ``samples`` stored (view, image), in random places, and
    compare.

    Args:
        name: what the teacher is called here.
        data_dir: where the images are; None: where they were when they were labelled; ``model``
            likewise.

    Raises:
        DataError: the images, the views or the teacher's weights are not those of the labels; or
            nothing is stored yet.
    """
    about = store.manifest.about
    recipe = _alone(
        from_dict(about["recipe"], f"the recipe of {store.path}"),
        str(about["teacher"]),
        data_dir,
        model,
    )
    sealed = [
        (view, part)
        for view in range(store.manifest.num_views)
        for part in range(store.num_parts)
        if store.is_sealed(view, part)
    ]
    if not sealed:
        raise DataError(f"{store.path} has no records yet: run 'vitdistill label' first")
    with join_world(device) as here:
        job = prepare(for_teachers(recipe, here.size), here, say)
        job = replace(job, recipe=recipe)
        work = _Work(job, LabelOptions())
        (teacher,) = work.layouts
        work.layouts[teacher] = store.layout
        changed = differing(store.manifest.identity, work.identity(teacher))
        if changed:
            raise DataError(
                f"what made the labels in {store.path} has changed: {'; '.join(changed)}"
            )
        order = keyed.permutation(recipe.data_seed, 0, len(sealed), keyed.Stream.SUBSET)
        chunks = -(-store.manifest.part_size // CHUNK)
        compared: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        left = samples
        for number in range(len(sealed) * chunks):  # every record once, before any twice
            view, part = sealed[order[number % len(order)]]
            low, high = store.part_range(part)
            first = low + (number // len(order) + int(order[number % len(order)])) % chunks * CHUNK
            last = min(first + min(CHUNK, left), high)
            if left <= 0 or first >= high:
                continue
            left -= last - first
            for batch, answers in work.answers(view, first, last):
                written, _ = store.read(np.full(len(batch.ids), view), batch.ids)
                compared.append((written, work.records(teacher, view, batch, answers[teacher])))
        precision = store.manifest.identity["teacher.precision"]
    stored, now = (np.concatenate([pair[side] for pair in compared]) for side in (0, 1))
    return _compared(store.layout, stored, now, 1e-3 if precision == "float32" else 5e-2)


def _alone(recipe: Recipe, name: str, data_dir: str | None, model: str | None) -> Recipe:
    """The recipe with this one teacher, and the objectives that do not read another."""
    objectives = {
        # Heads are the student's, and none is to be missed here because its teacher is.
        key: replace(objective, head="all") if hasattr(objective, "head") else objective  # type: ignore[call-arg]
        for key, objective in recipe.objectives.items()
        if not isinstance(objective, TeacherObjective) or objective.teacher == name
    }
    teacher = recipe.teachers[name]
    teacher = (
        teacher
        if model is None
        else replace(teacher, model=model, checkpoint=None, pretrained=False)
    )
    data = recipe.data if data_dir is None else replace(recipe.data, dir=data_dir)
    return replace(recipe, teachers={name: teacher}, objectives=objectives, data=data)


def _compared(
    layout: Layout, stored: npt.NDArray[Any], now: npt.NDArray[Any], tolerance: float
) -> Check:
    views = int((stored["pixels"] == now["pixels"]).sum())
    ours, theirs = layout.targets(now), layout.targets(stored)
    agreement, divergence, variation, hidden = 1.0, 0.0, 0.0, 0.0
    if layout.logits is not None:
        at = layout.logits.temperatures[0] if layout.logits.temperatures else 1.0
        a, b = ((t.logits(at) / at).double().log_softmax(-1) for t in (ours, theirs))
        agreement = float((a.argmax(-1) == b.argmax(-1)).double().mean())
        divergence = float((a.exp() * (a - b)).sum(-1).clamp(min=0).mean())
        variation = float((a.exp() - b.exp()).abs().sum(-1).mean() / 2)
    pairs = [(ours.hidden[i], theirs.hidden[i]) for i in ours.hidden]
    if ours.features is not None and theirs.features is not None:
        pairs.append((ours.features, theirs.features))
    for a, b in pairs:
        hidden = max(hidden, float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)))
    return Check(len(stored), views, agreement, divergence, variation, hidden, tolerance)


def describe(layout: Layout) -> str:
    """What a record holds, in words."""
    parts = []
    logits = layout.logits
    if logits is not None:
        at = ", ".join(f"{t:g}" for t in logits.temperatures)
        words = {
            "float32": f"{logits.num_classes} logits, exact",
            "float16": f"{logits.num_classes} logits in float16",
            "topk": (
                f"all {logits.num_classes} logits in float16, largest first"
                if logits.is_complete
                else (
                    f"the {logits.k} largest of {logits.num_classes} logits and the mass of the"
                    f" others at T = {at}"
                )
            ),
        }
        parts.append(words[logits.kind])
    parts += [
        f"hidden states after block {block} ({tokens} x {width})"
        for block, tokens, width in layout.hidden
    ]
    if layout.features is not None:
        parts.append(f"features after the final norm ({layout.features[0]} x {layout.features[1]})")
    if layout.hidden or layout.features:
        parts[-1] += f" in {layout.hidden_dtype}"
    return ", ".join(parts)
