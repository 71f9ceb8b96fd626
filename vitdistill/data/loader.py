"""Batches for training and evaluation: the same samples and views for any number of workers and
processes.

The order of an epoch is a keyed permutation; step ``k`` of epoch ``e`` takes the ``k``-th slice of
it, process ``r`` the ``r``-th part of that slice, micro-batch ``m`` the ``m``-th part of that.
Nothing is carried over from one step to the next, so a run resumes at any step. Small data sets are
decoded once and augmented in batches on the device (`TrainLoader.pipeline` says ``batched``);
otherwise worker processes make the views one by one (``per-sample``).
"""

import atexit
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from .. import keyed
from ..errors import ConfigError, DataError, UserError
from ..keyed import I64, Stream
from ..memory import memory_errors
from ..messages import plural
from .augment import Augment, InputSpec
from .batch import Batch, TargetReader
from .order import epoch_order, pair_partners
from .sources.base import ImageSource, check_enough
from .views.batched import BatchViews, can_batch
from .views.checksums import view_checksums
from .views.erasing import erase
from .views.mixing import Mixing, check_even
from .views.single import eval_view, normalize, prepare, train_views

IN_MEMORY_BYTES = 2 * 2**30
"""Data sets of fewer decoded bytes than this are kept in memory."""

_EVAL_CACHE_BYTES = 2**30


_Pixels = tuple["_Piece", UInt8[Tensor, "B 3 H W"], npt.NDArray[np.uint32] | None]


@dataclass(frozen=True)
class _Piece:
    """What a micro-batch consists of: sample ids and view ids, int64 (B,) each."""

    epoch: int
    ids: I64
    views: I64


@dataclass(frozen=True)
class Labelling:
    """Whole training images, mixed as a student would see them, to be shown to a teacher.

    Attributes:
        images: float32, in the student's normalisation, on the device.
        ids: the samples' numbers, int64; checksums: of their views, uint32, see `view_checksums`.
    """

    images: Float[Tensor, "B 3 H W"]
    ids: I64
    checksums: npt.NDArray[np.uint32]


class TrainLoader:
    """The training batches of one process.

    Attributes:
        steps_per_epoch: optimizer steps in an epoch; the last incomplete batch is left out.
        pipeline: ``batched`` or ``per-sample``; decided by the data set and the options alone, and
            it changes pixels.
    """

    def __init__(
        self,
        source: ImageSource,
        augment: Augment,
        spec: InputSpec,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        in_memory: bool | None = None,
        views: int | None = None,
        labels: Mapping[str, TargetReader] | None = None,
    ) -> None:
        """Prepare to load; ``batch_size`` counts the images of an optimizer step over all processes
        and micro-batches.

        ``workers`` are processes that make views, or threads that decode a data set into memory.
        ``in_memory`` None keeps images decoded when they take less than 2 GiB. ``views``: how many
        different views of each image there are, None for a new one every epoch. ``labels``: stored
        answers to put beside the images, by teacher. Raises `ConfigError` when the sizes do not
        divide, `DataError` when the data set is smaller than one batch or an image is damaged.
        """
        check_batches(source, augment, batch_size, world_size, accumulate)
        _check_sizes(batch_size, world_size, accumulate, rank, workers)
        self.source, self.augment, self.spec, self.seed = source, augment, spec, seed
        self.workers, self.device = workers, torch.device(device)
        self._views, self._labels_of = views, dict(labels or {})
        self._batch_size, self._rank, self._world_size, self._accumulate = (
            batch_size,
            rank,
            world_size,
            accumulate,
        )
        self._labels = torch.from_numpy(source.labels)
        self._mixing = (
            Mixing(augment.mixup, augment.cutmix, augment.mixup_prob, augment.mixup_switch_prob)
            if augment.mixes
            else None
        )
        self._order: tuple[int, I64, I64] | None = None
        self._pairs: tuple[int, I64] | None = None
        self.steps_per_epoch = len(self._epoch_order(0)[0]) // batch_size
        self.pipeline: Literal["batched", "per-sample"] = "per-sample"
        self._memory: ImageSource | BatchViews = source
        with memory_errors(
            f"while {plural(len(source), 'image')} were decoded into it",
            "read them one by one, --in-memory false",
        ):
            self._choose_pipeline(in_memory)

    def batches(
        self, start_step: int = 0, num_steps: int | None = None
    ) -> Iterator[tuple[Batch, ...]]:
        """The steps from ``start_step`` on, each a tuple of micro-batches; without end when
        ``num_steps`` is None.

        Step ``s`` is step ``s % steps_per_epoch`` of epoch ``s // steps_per_epoch``.
        """
        end = None if num_steps is None else start_step + num_steps
        pixels = self._pixels(self._pieces(start_step, end))
        try:
            while True:
                micro_batches = [
                    self._finish(piece, images, sums)
                    for piece, images, sums in islice(pixels, self._accumulate)
                ]
                if not micro_batches:
                    return
                yield tuple(micro_batches)
        finally:
            pixels.close()

    def labelling(self, view: int, first: int, last: int, batch_size: int) -> Iterator[Labelling]:
        """View ``view`` of the samples ``first`` to ``last - 1``, in order, for a teacher that is
        to label them.

        Where images are mixed, every sample comes mixed with its partner in that view; the one
        without a partner (of an odd number) comes as it is.
        """
        partners = self._partners(view) if self._mixing is not None else None
        starts = range(first, last, batch_size)

        def pieces() -> Iterator[_Piece]:
            for start in starts:
                ids = np.arange(start, min(start + batch_size, last), dtype=np.int64)
                if partners is not None:
                    ids = np.stack([ids, partners[ids]], axis=1).flatten()
                yield _Piece(view, ids, np.full(len(ids), view, dtype=np.int64))

        pixels = self._pixels(pieces(), checked=True)
        try:
            for piece, images, sums in pixels:
                assert sums is not None
                batch = self._mixed(piece, images)
                own = slice(None, None, 1 if partners is None else 2)
                yield Labelling(batch.images[own], piece.ids[own], sums[own])
        finally:
            pixels.close()

    def most_of(self, view: int, ids: I64) -> I64:
        """The sample that makes up the most of each of these views: itself, or the one that is
        mixed in.
        """
        if self._mixing is None:
            return ids
        partners = self._partners(view)[ids]
        keys = keyed.keys(self.seed, view, np.minimum(ids, partners), Stream.MIX)
        lam, _, _ = self._mixing.draw(keys, *self.spec.image_size)
        return np.where(lam >= 0.5, ids, partners)

    def _partners(self, view: int) -> I64:
        if self._pairs is None or self._pairs[0] != view:
            self._pairs = (view, pair_partners(len(self.source), self.seed, view))
        return self._pairs[1]

    def _choose_pipeline(self, in_memory: bool | None) -> None:
        """Depends on the data set and the options only: never on workers, device or processes."""
        if in_memory is False:
            return
        limit = None if in_memory else IN_MEMORY_BYTES
        size = self._common_size(limit) if can_batch(self.augment, self.spec) else None
        if size is not None:
            images = _decode_alike(self.source, self.augment, self.spec, size, self.workers)
            self._memory = BatchViews(images, self.augment, self.spec, self.seed)
            self.pipeline = "batched"
            return
        sizes = _sizes_below(self.source, limit)
        if sizes is not None:
            self._memory = _DecodedSource(self.source, sizes, self.workers)

    def _common_size(self, limit: int | None) -> tuple[int, int] | None:
        """The one (width, height) of all prepared images, or None when they differ or take
        ``limit`` bytes or more.
        """
        if self.augment.crop != "rrc":
            height, width = self.spec.image_size
            return (
                (width, height)
                if limit is None or len(self.source) * height * width * 3 < limit
                else None
            )
        sizes = _sizes_below(self.source, limit)
        return sizes[0] if sizes is not None and len(set(sizes)) == 1 else None

    def _epoch_order(self, epoch: int) -> tuple[I64, I64]:
        """Sample ids and view ids of an epoch, in order."""
        if self._order is None or self._order[0] != epoch:
            ids, views = epoch_order(
                len(self.source), self.seed, epoch, self.augment.repeated_aug, self._views
            )
            self._order = (epoch, ids, views)
        return self._order[1], self._order[2]

    def _pieces(self, start_step: int, end_step: int | None) -> Iterator[_Piece]:
        share = self._batch_size // self._world_size
        micro = share // self._accumulate
        step = start_step
        while end_step is None or step < end_step:
            epoch, k = divmod(step, self.steps_per_epoch)
            ids, views = self._epoch_order(epoch)
            first = k * self._batch_size + self._rank * share
            for start in range(first, first + share, micro):
                yield _Piece(epoch, ids[start : start + micro], views[start : start + micro])
            step += 1

    def _pixels(
        self, pieces: Iterator[_Piece], checked: bool = False
    ) -> "Generator[_Pixels, None, None]":
        """uint8 views on the device; with their checksums where ``checked``, or where labels have
        to fit them.

        Views made on a GPU are copied to the host for it, so they are looked at from time to time
        only: the first four micro-batches, and one in 64 afterwards.
        """
        wanted = checked or bool(self._labels_of)
        if isinstance(self._memory, BatchViews):
            for number, piece in enumerate(pieces):
                images = self._memory(piece.ids, piece.views, self.device)
                due = checked or self.device.type == "cpu" or number < 4 or number % 64 == 0
                yield (
                    piece,
                    images,
                    self._checksums(piece, images.cpu()) if wanted and due else None,
                )
            return
        views = _TrainViews(
            self._memory, self.augment, self.spec, self.seed, self._checksums if wanted else None
        )
        with _loaded(views, pieces, self.workers, self.device) as loaded:
            for piece, images, sums in loaded:
                yield piece, images.to(self.device, non_blocking=True), sums

    @property
    def _checksums(self) -> "_Checksums":
        return _Checksums(self.augment.reprob, self._mixing, self.seed)

    def _finish(
        self,
        piece: _Piece,
        pixels: UInt8[Tensor, "B 3 H W"],
        checksums: npt.NDArray[np.uint32] | None,
    ) -> Batch:
        batch = self._mixed(piece, pixels)
        for name, reader in self._labels_of.items():
            batch.targets[name] = reader(piece.views, piece.ids, checksums, self.device)
        return batch

    def _mixed(self, piece: _Piece, pixels: UInt8[Tensor, "B 3 H W"]) -> Batch:
        images = erase(
            normalize(pixels, self.spec), self.augment.reprob, self.seed, piece.ids, piece.views
        )
        ids = torch.from_numpy(piece.ids)
        labels = self._labels[ids].to(self.device, non_blocking=True)
        views = torch.from_numpy(piece.views).to(self.device, non_blocking=True)
        batch = Batch(
            images,
            labels,
            ids.to(self.device, non_blocking=True),
            views,
            piece.epoch,
            seed=self.seed,
        )
        if self._mixing is not None:
            batch.images, batch.mixed_labels, batch.lam = self._mixing(
                images, labels, self.seed, piece.ids, piece.views
            )
        return batch


class EvalLoader:
    """The evaluation batches of one process; iterate it as often as you like.

    Over all processes every sample comes exactly once, without padding: process ``r`` has samples
    ``r``, ``r + world_size``, ... A small data set is decoded in the first pass and kept.
    """

    def __init__(
        self,
        source: ImageSource,
        spec: InputSpec,
        *,
        batch_size: int,
        workers: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
    ) -> None:
        """``batch_size`` images a process; ``limit`` takes that many samples of a fixed shuffle in
        place of all.
        """
        _check_sizes(batch_size * world_size, world_size, 1, rank, workers)
        if limit is not None and limit < 1:
            raise ConfigError(f"limit is {limit}; it must be 1 or more images, or left out.")
        self.source, self.spec, self.workers, self.device = (
            source,
            spec,
            workers,
            torch.device(device),
        )
        ids = np.arange(len(source), dtype=np.int64)
        if limit is not None:
            ids = keyed.permutation(0, 0, len(source), Stream.SUBSET)[:limit]
        mine = ids[rank::world_size]
        self._pieces = [
            _Piece(0, p, np.zeros_like(p))
            for p in (mine[i : i + batch_size] for i in range(0, len(mine), batch_size))
        ]
        self._labels = torch.from_numpy(source.labels)
        height, width = spec.image_size
        self._cacheable = len(mine) * height * width * 3 < _EVAL_CACHE_BYTES
        self._cache: list[Tensor] | None = None

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self._pieces)

    def __iter__(self) -> Iterator[Batch]:
        """One pass over this process's samples, in order."""
        seen: list[Tensor] = []
        for piece, pixels in self._pixels():
            if self._cacheable and self._cache is None:
                seen.append(pixels)
                if len(seen) == len(self._pieces):
                    self._cache = seen
            ids = torch.from_numpy(piece.ids)
            images = normalize(pixels.to(self.device, non_blocking=True), self.spec)
            labels = self._labels[ids].to(self.device, non_blocking=True)
            views = torch.from_numpy(piece.views).to(self.device, non_blocking=True)
            yield Batch(images, labels, ids.to(self.device, non_blocking=True), views, 0)

    def _pixels(self) -> Iterator[tuple[_Piece, Tensor]]:
        if self._cache is not None:
            yield from zip(self._pieces, self._cache, strict=True)
            return
        with _loaded(
            _EvalViews(self.source, self.spec), self._pieces, self.workers, self.device
        ) as loaded:
            for piece, images, _ in loaded:
                yield piece, images


def check_batches(
    source: ImageSource, augment: Augment, batch_size: int, world_size: int, accumulate: int
) -> None:
    """Raise `ConfigError` for batches that cannot be divided, and `DataError` for fewer images than
    one has.
    """
    _check_sizes(batch_size, world_size, accumulate, 0, 0)
    check_enough(source, batch_size)
    if augment.mixes:
        check_even(batch_size // (world_size * accumulate))


def _check_sizes(
    batch_size: int, world_size: int, accumulate: int, rank: int, workers: int
) -> None:
    if batch_size < 1 or accumulate < 1 or world_size < 1:
        raise ConfigError(
            f"batch_size {batch_size}, world_size {world_size} and accumulate {accumulate} must all"
            " be 1 or more."
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of {world_size} processes.")
    if workers < 0:
        raise ConfigError(f"workers is {workers}; it must be 0 or more.")
    if batch_size % (world_size * accumulate):
        raise ConfigError(
            f"batch_size {batch_size} does not divide by {world_size} processes x {accumulate}"
            " micro-batches."
        )


def _sizes_below(source: ImageSource, limit: int | None) -> list[tuple[int, int]] | None:
    """(width, height) of every image, or None when decoded they take ``limit`` bytes or more.

    A large data set is given up after the headers of its first ``limit`` bytes.
    """
    sizes, total = [], 0
    for i in range(len(source)):
        sizes.append(source.image_size(i))
        total += sizes[-1][0] * sizes[-1][1] * 3
        if limit is not None and total >= limit:
            return None
    return sizes


def _decode_alike(
    source: ImageSource, augment: Augment, spec: InputSpec, size: tuple[int, int], threads: int
) -> UInt8[Tensor, "N 3 H W"]:
    images = torch.empty((len(source), 3, size[1], size[0]), dtype=torch.uint8)

    def decode(i: int) -> None:
        images[i] = pil_to_tensor(prepare(source.load(i), augment, spec))

    _for_each(decode, len(source), threads)
    return images


def _for_each(function: Any, count: int, threads: int) -> None:
    if threads < 2:
        for i in range(count):
            function(i)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            for _ in pool.map(function, range(count)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _DecodedSource(ImageSource):
    """A source whose images, of various sizes, are kept decoded: one flat array, which forked
    workers share.
    """

    def __init__(self, source: ImageSource, sizes: list[tuple[int, int]], threads: int) -> None:
        self._source = source
        self.name, self.classes, self.labels, self.sizes = (
            source.name,
            source.classes,
            source.labels,
            source.sizes,
        )
        self._shapes = np.array(sizes, dtype=np.int64)
        self._ends = np.cumsum(self._shapes[:, 0] * self._shapes[:, 1] * 3)
        self._pixels = np.empty(int(self._ends[-1]), dtype=np.uint8)

        def decode(i: int) -> None:
            self._slice(i)[...] = np.asarray(source.load(i))

        _for_each(decode, len(source), threads)

    def _slice(self, i: int) -> np.ndarray:
        width, height = self._shapes[i]
        end = self._ends[i]
        return self._pixels[end - width * height * 3 : end].reshape(height, width, 3)

    def key(self, i: int) -> str:
        return self._source.key(i)

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self._slice(i))

    def image_size(self, i: int) -> tuple[int, int]:
        width, height = self._shapes[i]
        return int(width), int(height)


@dataclass(frozen=True)
class _Failure:
    """A user error on its way from a worker to the parent (raised there, so that its sentence
    arrives alone).
    """

    error: UserError


def _load(source: ImageSource, i: int) -> Image.Image:
    """Image ``i``; the error of one that cannot be read says in ``image`` which one it is."""
    try:
        return source.load(i)
    except DataError as error:
        error.image = (source.name, source.key(i))
        raise


@dataclass(frozen=True)
class _Checksums:
    """Checksums of a micro-batch's views, in whichever process makes them."""

    reprob: float
    mixing: Mixing | None
    seed: int

    def __call__(self, piece: _Piece, pixels: UInt8[Tensor, "B 3 H W"]) -> npt.NDArray[np.uint32]:
        return view_checksums(pixels, self.reprob, self.mixing, self.seed, piece.ids, piece.views)


@dataclass(frozen=True)
class _TrainViews(Dataset[Any]):
    source: ImageSource
    augment: Augment
    spec: InputSpec
    seed: int
    checksums: _Checksums | None = None

    def __getitem__(self, piece: _Piece) -> _Pixels | _Failure:
        try:
            images = train_views(
                partial(_load, self.source),
                self.augment,
                self.spec,
                self.seed,
                piece.views,
                piece.ids,
            )
            return piece, images, None if self.checksums is None else self.checksums(piece, images)
        except UserError as error:
            return _Failure(error)


@dataclass(frozen=True)
class _EvalViews(Dataset[Any]):
    source: ImageSource
    spec: InputSpec

    def __getitem__(self, piece: _Piece) -> _Pixels | _Failure:
        try:
            return (
                piece,
                torch.stack(
                    [eval_view(_load(self.source, i), self.spec) for i in piece.ids.tolist()]
                ),
                None,
            )
        except UserError as error:
            return _Failure(error)


def _same(item: Any) -> Any:
    return item


def _ignore_signals(worker: int) -> None:
    """The parent alone decides when to stop: a signal to the process group must not take its
    workers away.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@dataclass(eq=False)
class _Workers:
    """The running worker processes of one iterator."""

    iterator: Any
    owner: int = field(default_factory=os.getpid)

    def lost(self) -> bool:
        """Whether a worker is dead, or dies within a moment: its connections break before it is
        gone.
        """
        return bool(wait([process.sentinel for process in _processes(self.iterator)], timeout=2.0))

    def stop(self) -> None:
        """End the workers; they ignore SIGTERM, so one that does not leave is killed (it has no
        state to lose).
        """
        iterator, self.iterator = self.iterator, None
        if iterator is None or os.getpid() != self.owner:
            return
        processes = _processes(iterator)
        if processes:
            iterator._shutdown_workers()
        for process in processes:
            if process.is_alive():
                process.kill()


def _processes(iterator: Any) -> list[Any]:
    return list(getattr(iterator, "_workers", []))


_RUNNING: "weakref.WeakSet[_Workers]" = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    # Before multiprocessing joins its children at exit, which would wait for ever for workers that
    # ignore SIGTERM.
    for workers in list(_RUNNING):
        workers.stop()


@contextmanager
def _without_child_handler() -> Iterator[None]:
    """Undo the SIGCHLD handler that torch sets with the first workers.

    It raises for a dead worker at any point of the program, be it in the middle of a backward pass
    or of a checkpoint. Without it the death is noticed, within seconds, where the next batch is
    asked for.
    """
    main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGCHLD) if main else None
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGCHLD, previous)


@contextmanager
def _loaded(
    views: Dataset[Any], pieces: Iterable[_Piece], workers: int, device: torch.device
) -> Iterator[Iterator[_Pixels]]:
    """The pieces with their pixels, in order, made by ``workers`` processes; user errors are raised
    here.
    """
    loader: DataLoader[Any]
    with warnings.catch_warnings():
        # More processes than cores is the user's choice (a recipe's default may be made for a
        # larger machine), and costs little.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            views,
            sampler=pieces,
            batch_size=None,
            num_workers=workers,
            collate_fn=_same,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),
        )
        with _without_child_handler():
            running = _Workers(iter(loader))
    _RUNNING.add(running)
    try:
        yield _received(running, device)
    finally:
        running.stop()


def _received(running: _Workers, device: torch.device) -> Iterator[_Pixels]:
    while True:
        try:
            item = next(running.iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            # A dead worker shows as torch's RuntimeError, or as a broken connection in the middle
            # of a transfer.
            if "DataLoader worker" not in str(error) and not running.lost():
                raise
            raise DataError(
                "a data loading worker was killed, often for lack of memory; use fewer workers or a"
                " smaller batch_size."
            ) from error
        if isinstance(item, _Failure):
            raise item.error
        piece, images, sums = item
        yield piece, images.pin_memory() if device.type == "cuda" else images, sums
