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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError, Set, UserError

T = TypeVar("T")
R = TypeVar("R")

# How torch and the standard library say that a worker, or a connection to one, is lost.
_LOST = ("DataLoader worker", "Too many open files", "items of ancdata", "shared memory")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def map_in_workers(
    function: Callable[[T], R], items: Iterable[T], workers: int
) -> Iterator[Iterator[R]]:
    """Map ``function`` over ``items`` in ``workers`` processes; 0: in this one.

    Raises what ``function`` raises, and `DataError` when a worker was killed or cannot send. The
    tensors that arrive lie in shared memory and hold a file open each: copy what is to be kept.
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
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # otherwise torch draws from the global one
        )
        try:
            with _start_workers(workers):
                iterator: Any = iter(loader)
        except OSError as error:
            raise _exhausted() from error
    processes, owner = list(getattr(iterator, "_workers", [])), os.getpid()

    def stop() -> None:
        """End the workers; one that does not leave is killed (it has no state to lose)."""
        if processes and os.getpid() == owner:
            iterator._shutdown_workers()
            for process in processes:
                if process.is_alive():
                    process.kill()

    # An iteration may still be open when the program ends. Hooks run last in, first out: this one
    # before multiprocessing's, which would wait for workers that ignore its SIGTERM.
    atexit.register(stop)
    try:
        yield _receive(iterator, processes)
    finally:
        atexit.unregister(stop)
        stop()


def _receive(iterator: Any, processes: list[Any]) -> Iterator[Any]:
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            # A dead worker shows as torch's RuntimeError, or as a broken connection in the middle
            # of a transfer, which breaks a moment before the worker is gone.
            lost = wait([process.sentinel for process in processes], timeout=2.0)
            if not lost and not any(words in str(error) for words in _LOST):
                raise
            raise _exhausted() from error
        if isinstance(item, UserError):
            raise item
        yield item


def _exhausted() -> DataError:
    why = "lack of memory, of shared memory (/dev/shm; docker gives 64 MB) or of open files"
    what = f"a data loading worker was lost, most often for {why}"
    fixes = Set("data.workers"), Set("train.batch_size"), "raise the limit"
    return DataError(what, fixes, field="data.workers")


@dataclass(frozen=True)
class _Task(Dataset[Any]):
    function: Callable[[Any], Any]

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.function(item)
        except UserError as error:
            return error


def _identity(item: Any) -> Any:
    return item


def _prepare_worker(worker: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # The thread that pickles items drops one that it cannot send, and the parent would wait for it
    # forever. So exit: the parent notices a lost worker.
    Queue._on_queue_feeder_error = staticmethod(lambda error, item: os._exit(1))  # type: ignore


@contextmanager
def _start_workers(count: int) -> Iterator[None]:
    """Protect signal handling while torch starts workers.

    Workers begin with signals blocked: one that came before `_prepare_worker` would end them. The
    SIGCHLD handler that torch sets is undone: for a dead worker it raises anywhere in the program,
    even in the middle of a checkpoint. `_receive` notices the death within seconds.
    """
    # If torch runs out of file descriptors it ends in a traceback, so try to open as many first:
    # six pipes a worker.
    with ExitStack() as stack:
        for _ in range(6 * count):
            for end in os.pipe():
                stack.callback(os.close, end)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
