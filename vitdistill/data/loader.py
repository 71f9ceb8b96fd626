"""Batches for training and evaluation: equal for any number of workers and processes.

Small data sets are decoded once and their views made in batches on the device (``batched``);
otherwise worker processes make the views one by one (``per-sample``).
"""

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ..errors import ConfigError, DataError, Set
from ..memory import memory_errors
from ..messages import plural
from ..world import ALONE, World
from .augment import Augment, InputSpec
from .batch import Batch, TargetReader, TeacherBatch
from .decoded import keep_decoded, name_all_damaged
from .order import Kind, Order, Samples, divide, epoch_samples, evenly, view_samples
from .sources.base import ImageSource, check_enough
from .views.batched import BatchViews
from .views.checksums import view_checksums
from .views.erasing import erase
from .views.geometry import send_images
from .views.mixing import mix
from .views.single import eval_view, normalize, train_views
from .workers import map_in_workers

_EVAL_CACHE_BYTES = 2**30

_Step = tuple[Batch, ...]
_Views = tuple[Samples, UInt8[Tensor, "B 3 H W"], npt.NDArray[np.uint32] | None]


@dataclass(frozen=True)
class Loading:
    """How training images are loaded and divided."""

    batch_size: int  # of an optimizer step, over all processes and micro-batches
    seed: int  # of the order, the views and the mixing
    accumulate: int = 1  # micro-batches per step and process
    workers: int = 0  # processes that make views, or threads that decode into memory
    in_memory: bool | None = None  # keep images decoded; None: when they take less than 2 GiB
    views: int | None = None  # different views of an image; None: a new one every epoch
    labelled_share: float = 0.25  # of a batch, where some images have labels and some have none
    world: World = ALONE  # this process, and the device the batches go to


class TrainLoader:
    """The training batches of one process."""

    def __init__(
        self,
        source: ImageSource,
        augment: Augment,
        spec: InputSpec,
        loading: Loading,
        labels: Mapping[str, TargetReader] | None = None,
    ) -> None:
        """Prepare to load; ``labels`` maps teachers' names to readers of their stored answers.

        Raises `ConfigError` when the sizes do not divide, `DataError` when the data set is smaller
        than one batch or an image is damaged.
        """
        world = loading.world
        check_batches(source, augment, loading)
        self.source, self.augment, self.spec, self.loading = source, augment, spec, loading
        self._device = world.device
        self._targets = dict(labels or {})
        self._labels = torch.from_numpy(source.labels)
        self.order = order_of(source, augment, loading)
        self.steps_per_epoch = self.order.steps
        place = f"while {plural(len(source), 'image')} were decoded into it"
        with (
            memory_errors(place, Set("data.in_memory", False)),
            name_all_damaged(source, loading.workers),
        ):
            kept = keep_decoded(source, augment, spec, loading.in_memory, loading.workers)
        self._images = BatchViews(kept, augment, spec) if isinstance(kept, Tensor) else kept
        # It changes pixels, so only the data set and the options decide it.
        self.pipeline = "batched" if isinstance(kept, Tensor) else "per-sample"

    def batches(self, start_step: int = 0, num_steps: int | None = None) -> Iterator[_Step]:
        """Yield the steps from ``start_step`` on, each a tuple of micro-batches.

        Step ``s`` is step ``s % steps_per_epoch`` of epoch ``s // steps_per_epoch``; there is no
        end when ``num_steps`` is None.
        """
        end = None if num_steps is None else start_step + num_steps
        with closing(self._views(self._samples(start_step, end))) as views:
            while step := [*islice(views, self.loading.accumulate)]:
                yield tuple(self._batch(*made) for made in step)

    def teacher_batches(
        self, view: int, first: int, last: int, batch_size: int
    ) -> Iterator[TeacherBatch]:
        """Yield view ``view`` of the samples ``first`` to ``last - 1``, in order.

        With mixing, each image comes mixed with its partner in that view; one without a partner
        comes as it is.
        """
        samples = view_samples(self.order, view, first, last, batch_size)
        own = slice(None, None, 2 if self.order.paired else 1)
        with closing(self._views(samples, checked=True)) as views:
            for shown, pixels, checksums in views:
                assert checksums is not None
                images = self._mixed(shown, pixels).images
                yield TeacherBatch(images[own], shown.ids[own], checksums[own])

    def _samples(self, start_step: int, end_step: int | None) -> Iterator[Samples]:
        """Yield this process's micro-batches of the steps from ``start_step`` on."""
        batch_size, world = self.loading.batch_size, self.loading.world
        share = batch_size // world.size
        micro = share // self.loading.accumulate
        for step in count(start_step) if end_step is None else range(start_step, end_step):
            epoch, k = divmod(step, self.steps_per_epoch)
            ids, views = epoch_samples(self.order, epoch)
            first = k * batch_size + world.rank * share
            for start in range(first, first + share, micro):
                part = slice(start, start + micro)
                yield Samples(ids[part], views[part], self.loading.seed, epoch)

    def _views(
        self, samples: Iterator[Samples], checked: bool = False
    ) -> Generator[_Views, None, None]:
        """Make uint8 views on the device, with checksums if ``checked`` or labels are stored."""
        wanted = checked or bool(self._targets)
        augment, device = self.augment, self._device
        if isinstance(self._images, BatchViews):
            for number, shown in enumerate(samples):
                pixels = self._images(shown, device)
                # Checksums of a GPU's views need a copy to the host, so in training only the first
                # four micro-batches and one in 64 afterwards are looked at.
                due = checked or device.type == "cpu" or number < 4 or number % 64 == 0
                sums = view_checksums(pixels.cpu(), augment, shown) if wanted and due else None
                yield shown, pixels, sums
            return
        make = partial(_make_train_views, self._images, augment, self.spec, wanted)
        workers = self.loading.workers
        with name_all_damaged(self.source, workers), map_in_workers(make, samples, workers) as made:
            for shown, pixels, sums in made:
                yield shown, send_images(pixels, device), sums

    def _batch(
        self,
        shown: Samples,
        pixels: UInt8[Tensor, "B 3 H W"],
        checksums: npt.NDArray[np.uint32] | None,
    ) -> Batch:
        batch = self._mixed(shown, pixels)
        if len(self.order.kinds) > 1:
            rows = np.flatnonzero(shown.ids < self.order.kinds[0].size)
            batch.labelled = torch.from_numpy(rows).to(self._device, non_blocking=True)
        for name, read in self._targets.items():
            batch.targets[name] = read(shown.views, shown.ids, checksums, self._device)
        return batch

    def _mixed(self, shown: Samples, pixels: UInt8[Tensor, "B 3 H W"]) -> Batch:
        batch = _plain_batch(shown, pixels, self.spec, self._labels)
        batch.images = erase(batch.images, self.augment.reprob, shown)
        if self.augment.mixes:
            mixed = mix(batch.images, batch.labels, self.augment, shown)
            batch.images, batch.mixed_labels, batch.lam = mixed
        return batch


class EvalLoader:
    """The evaluation batches of one process; iterate it as often as you like.

    Over all processes every sample comes exactly once, without padding: process ``r`` has samples
    ``r``, ``r + world.size``, ... A small data set is decoded in the first pass and kept.
    """

    def __init__(
        self,
        source: ImageSource,
        spec: InputSpec,
        *,
        batch_size: int,
        workers: int = 0,
        world: World = ALONE,
        limit: int | None = None,
    ) -> None:
        """Load ``batch_size`` images a process; ``limit``: that many in all, see `evenly`."""
        self.source, self.spec, self.workers, self.device = source, spec, workers, world.device
        ids = evenly(source.labels, len(source) if limit is None else limit)
        own = ids[world.rank :: world.size]
        parts = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
        self._samples = [Samples(part, np.zeros_like(part)) for part in parts]
        self._labels = torch.from_numpy(source.labels)
        height, width = spec.image_size
        self._keep = len(own) * height * width * 3 < _EVAL_CACHE_BYTES
        self._kept: list[UInt8[Tensor, "B 3 H W"]] = []

    def cut_as(self, spec: InputSpec) -> "EvalLoader":
        """Return a loader of the same images for another network."""
        other = copy(self)
        other.spec, other._kept, other._keep = spec, [], False
        return other

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Batch]:
        if self._kept:
            yield from map(self._batch, self._samples, self._kept)
            return
        seen: list[UInt8[Tensor, "B 3 H W"]] = []
        make = partial(_make_eval_views, self.source, self.spec)
        with (
            name_all_damaged(self.source, self.workers),
            map_in_workers(make, self._samples, self.workers) as made,
        ):
            for shown, pixels in made:
                if self._keep:
                    seen.append(pixels.clone())  # out of shared memory
                yield self._batch(shown, pixels)
        self._kept = seen

    def _batch(self, shown: Samples, pixels: UInt8[Tensor, "B 3 H W"]) -> Batch:
        return _plain_batch(shown, send_images(pixels, self.device), self.spec, self._labels)


def order_of(source: ImageSource, augment: Augment, loading: Loading) -> Order:
    kinds = divide(source.labels, loading.batch_size, loading.labelled_share)
    return Order(kinds, loading.seed, augment.repeated_aug, loading.views, augment.mixes)


def check_batches(source: ImageSource, augment: Augment, loading: Loading) -> None:
    """Raise `ConfigError` or `DataError` unless ``source`` can be divided into such batches."""
    batch_size, accumulate, processes = loading.batch_size, loading.accumulate, loading.world.size
    micro_batch, rest = divmod(batch_size, processes * accumulate)
    problem = ""
    if rest:
        problem = f"is no multiple of {processes} processes x {accumulate} micro-batches"
    elif augment.mixes and micro_batch % 2:
        problem = f"makes micro-batches of {micro_batch}, and mixup and cutmix need an even number"
    if problem:
        fixes = Set("train.batch_size"), Set("train.accumulate")
        raise ConfigError(f"batch_size {batch_size} {problem}", fixes, field="train.batch_size")
    check_enough(source, batch_size)
    kinds = divide(source.labels, batch_size, loading.labelled_share)
    if len(kinds) > 1:
        _check_kinds(source.name, kinds[1], loading, micro_batch, 2 if augment.mixes else 1)


def _check_kinds(name: str, others: Kind, loading: Loading, micro_batch: int, unit: int) -> None:
    """Refuse a labelled share that is no multiple of ``unit`` images in a micro-batch."""
    batch_size, share = loading.batch_size, loading.labelled_share
    wanted = micro_batch * share / unit
    number = round(wanted)
    if abs(wanted - number) > 1e-6 or not 0 < number * unit < micro_batch:
        nearest = min(max(number, 1), micro_batch // unit - 1) * unit / micro_batch
        wrong = f"{wanted * unit:g} images, no {'even' if unit == 2 else 'whole'} number"
        what = f"labelled_share {share:g} of a micro-batch of {micro_batch} is {wrong}"
        fixes = Set("data.labelled_share", nearest), Set("train.batch_size")
        raise ConfigError(what, fixes, field="data.labelled_share")
    if others.size < others.count:
        few = f"fewer than the {others.count} of one batch of {batch_size}"
        what = f"{name} has {plural(others.size, 'image')} without labels, {few}"
        fixes = Set("train.batch_size"), Set("data.unlabelled", "none")
        raise DataError(what, fixes, field="data.unlabelled")


def _make_train_views(
    source: ImageSource, augment: Augment, spec: InputSpec, checked: bool, shown: Samples
) -> _Views:
    pixels = train_views(source.load, augment, spec, shown)
    return shown, pixels, view_checksums(pixels, augment, shown) if checked else None


def _make_eval_views(
    source: ImageSource, spec: InputSpec, shown: Samples
) -> tuple[Samples, UInt8[Tensor, "B 3 H W"]]:
    return shown, torch.stack([eval_view(source.load(i), spec) for i in shown.ids.tolist()])


def _plain_batch(
    shown: Samples, pixels: UInt8[Tensor, "B 3 H W"], spec: InputSpec, labels: Int[Tensor, " N"]
) -> Batch:
    ids, views = torch.from_numpy(shown.ids), torch.from_numpy(shown.views)
    labels, ids, views = (
        it.to(pixels.device, non_blocking=True) for it in (labels[ids], ids, views)
    )
    return Batch(normalize(pixels, spec), labels, ids, views, shown.epoch, seed=shown.seed)
