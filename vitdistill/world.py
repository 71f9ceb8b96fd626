"""The processes of a run: one is not a special case, torchrun's many share the global batch.

Whatever can fail on one process alone (a damaged image, a refused folder, a full disk) is met
together: every process learns of it and leaves with the same sentence, so that none is left waiting
for the others. Such an error is marked as agreed upon, and the command line prints it once; what a
process meets alone it says itself.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError, UserError

T = TypeVar("T")
Error = TypeVar("Error", bound=UserError)

# What torch says, as a plain RuntimeError, when a peer is gone: gloo's words, then NCCL's.
_PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "NCCL",
)


class ProcessLost(UserError):
    """Another process of the run died, or does not answer."""

    exit_code = 70
    agreed = True  # all that are left say so


def agreed(error: Error) -> Error:
    """The error, marked as one that every process raises by itself."""
    error.agreed = True
    return error


@dataclass(frozen=True)
class World:
    """This process among all of them, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """Which of the flags is set on any process; one small reduction between the hosts, none for
        one process.
        """
        if self.size == 1:
            return list(flags)
        merged = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(merged, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in merged.tolist()]

    def most(self, count: int) -> int:
        """The largest count of all processes."""
        return max(self.gather(count))

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def settle(self, error: UserError | None) -> UserError | None:
        """Meet, and return the error of the first process that has one."""
        first = next((found for found in self.gather(error) if found is not None), None)
        return None if first is None else agreed(first)

    def agree(self, error: UserError | None) -> None:
        """Meet, and raise on every process the error of the first that has one."""
        first = self.settle(error)
        if first is not None:
            raise first

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block together: a user error of one process in it is raised on all of them.
        Nothing in it may meet.
        """
        failure: UserError | None = None
        try:
            yield
        except UserError as error:
            failure = error
        self.agree(failure)

    def from_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the main process, on every one; its user errors too."""
        found: T | None = None
        with self.together():
            if self.is_main:
                found = work()
        return self.gather(found)[0]  # type: ignore[return-value]


def choose_device(name: str = "auto") -> torch.device:
    """``auto``: this process's GPU if there is one, else the CPU; raises `ConfigError` for a device
    that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"the device {name!r} is not one this can train on: choose auto, cpu, cuda or cuda:N"
        )
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"the device {name!r} was asked for, but this machine's torch sees no GPU: use"
                " --device cpu"
            )
        num_gpus, num_local = (
            torch.cuda.device_count(),
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
        if num_local > 1 and device.index is not None:
            raise ConfigError(
                f"the device {name!r} was asked for by {num_local} processes, and each needs its"
                " own: use --device cuda"
            )
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        # Every process looks at the largest index, so that all of them stop, and not only those
        # without a GPU.
        if max(index, num_local - 1) >= num_gpus:
            raise ConfigError(
                f"the device cuda:{max(index, num_local - 1)} is needed, and the last GPU here is"
                f" cuda:{num_gpus - 1}"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return device


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join torchrun's processes, or be alone.

    Raises:
        ProcessLost: another process died while this one waited for it.
    """
    chosen = choose_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        alone = not dist.is_initialized()
        yield World(0 if alone else dist.get_rank(), 1 if alone else dist.get_world_size(), chosen)
        return
    # gloo beside NCCL: flags and sentences travel between the hosts without waiting for the GPUs.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield World(dist.get_rank(), size, chosen)
    except RuntimeError as error:
        if not any(words in str(error) for words in _PEER_LOST):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ProcessLost(
            f"another process of this run died or does not answer ({reason}): its own message says"
            " why, and the same command goes on from what was saved"
        ) from error
    finally:
        dist.destroy_process_group()
