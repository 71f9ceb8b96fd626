"""A function mapped over items by worker processes, in order.

The parent alone decides when to stop: workers ignore signals to the process group, and end with the
iteration or with the program. User errors travel to the parent and are raised there, so that their
sentence arrives alone; a worker that was killed is noticed where the next item is asked for.
"""

import atexit
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError, Set, UserError

T = TypeVar("T")
R = TypeVar("R")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def map_in_workers(
    function: Callable[[T], R], items: Iterable[T], workers: int
) -> Iterator[Iterator[R]]:
    """Map ``function`` over ``items`` in ``workers`` processes; 0: in this one.

    Raises what ``function`` raises, and `DataError` when a worker was killed.
    """
    with warnings.catch_warnings():
        # More processes than cores is the user's choice: a recipe's default may be made for a
        # larger machine, and it costs little.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Any] = DataLoader(
            _Task(function),
            sampler=items,
            batch_size=None,
            num_workers=workers,
            collate_fn=_identity,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # otherwise the global one is drawn from
        )
        with _start_workers():
            running = _Workers(iter(loader))
    _RUNNING.add(running)
    try:
        yield _receive(running)
    finally:
        running.stop()


def _receive(running: "_Workers") -> Iterator[Any]:
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
                "a data loading worker was killed, often for lack of memory",
                (Set("data.workers"), Set("train.batch_size")),
                field="data.workers",
            ) from error
        if isinstance(item, _Failure):
            raise item.error
        yield item


@dataclass(frozen=True)
class _Failure:
    """A user error on its way from a worker to the parent."""

    error: UserError


@dataclass(frozen=True)
class _Task(Dataset[Any]):
    function: Callable[[Any], Any]

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except UserError as error:
            return _Failure(error)


def _identity(item: Any) -> Any:
    return item


def _ignore_signals(worker: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _start_workers() -> Iterator[None]:
    """Keep signals right while torch starts workers.

    Workers begin with signals blocked: one that came before `_ignore_signals` would end them. And
    the SIGCHLD handler that torch sets is undone: it raises for a dead worker at any point of the
    program, be it in the middle of a backward pass or of a checkpoint. Without it, `_receive`
    notices the death within seconds.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass(eq=False)
class _Workers:
    """The running worker processes of one iterator."""

    iterator: Any
    owner: int = field(default_factory=os.getpid)

    @property
    def processes(self) -> list[Any]:
        return list(getattr(self.iterator, "_workers", []))

    def lost(self) -> bool:
        """Whether a worker dies within a moment: its connections break before it is gone."""
        return bool(wait([process.sentinel for process in self.processes], timeout=2.0))

    def stop(self) -> None:
        """End the workers; one that does not leave is killed (it has no state to lose)."""
        processes, iterator, self.iterator = self.processes, self.iterator, None
        if not processes or os.getpid() != self.owner:
            return
        iterator._shutdown_workers()
        for process in processes:
            if process.is_alive():
                process.kill()


_RUNNING: "weakref.WeakSet[_Workers]" = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    # Before multiprocessing joins its children at exit, which would wait forever for workers that
    # ignore SIGTERM.
    for workers in list(_RUNNING):
        workers.stop()
