"""The processes of a run: alone, or torchrun's many that share each batch.

Where one process may fail alone (a damaged image, a full disk), all meet: every process raises the
first one's error, so that none waits forever for another. Such an error is marked as agreed, and
the command line prints it once; the error of a process that cannot meet is printed by itself.
"""

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from .errors import ConfigError, Give, UserError
from .messages import first_line, plural

T = TypeVar("T")
Error = TypeVar("Error", bound=UserError)

# What gloo says, in a plain RuntimeError, when a peer is gone; others raise a DistError.
_PEER_LOST = ("by peer", "Broken pipe", "Timed out waiting", "Socket Timeout")


class ProcessLost(UserError):
    """Another process of the run died, or does not answer."""

    exit_code = 70


def agreed(error: Error) -> Error:
    """Mark an error as one that every process raises."""
    error.agreed = True
    return error


@dataclass(frozen=True)
class World:
    """This process among ``size``, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def device_name(self) -> str:
        on_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if on_gpu else str(self.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def autocast(self, dtype: torch.dtype | None) -> torch.autocast:
        """Compute in this precision inside the block; None: in float32."""
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def any(self, *flags: bool) -> list[bool]:
        """Return which flags are set on any process: one small reduction between the hosts."""
        if self.size == 1:
            return list(flags)
        merged = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(merged, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in merged.tolist()]

    def mean(self, values: Tensor) -> Tensor:
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def take_from_main(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def gather(self, value: T) -> list[T]:
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
        """Meet at the end of the block; raise any process's user error on every process.

        Nothing inside may meet.
        """
        failure: UserError | None = None
        try:
            yield
        except UserError as error:
            failure = error
        self.agree(failure)

    def from_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the main process; return its result, or raise its user error, on all."""
        found: T | None = None
        with self.together():
            if self.is_main:
                found = work()
        return self.gather(found)[0]  # type: ignore[return-value]


ALONE = World(0, 1, torch.device("cpu"))
"""A process alone, on the CPU."""


def choose_device(name: str = "auto") -> torch.device:
    """Return this process's device; ``auto``: its GPU if there is one, else the CPU.

    Raises `ConfigError` where there is no such device, or not one for every process.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        choices = "choose from auto, cpu, cuda, cuda:N"
        raise ConfigError(f"there is no device {name!r}", choices, field="device")
    if kind == "cpu":
        return torch.device("cpu")
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_processes > 1 and number:
        what = f"{name!r} is one device, and each of {num_processes} processes needs its own"
        raise ConfigError(what, Give("device", "cuda"), field="device")
    index, num_gpus = int(number or os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # Every process checks the largest index, so that all of them stop and not only those without
    # a GPU.
    largest = max(index, num_processes - 1)
    if num_gpus == 1 and not number:  # a scheduler may show each process only its own GPU
        largest = index = 0
    if largest >= num_gpus:
        what = f"the device cuda:{largest} is needed, and torch sees {plural(num_gpus, 'GPU')}"
        raise ConfigError(what, Give("device", "cpu"), field="device")
    try:
        torch.cuda.set_device(index)
        torch.cuda.mem_get_info(index)  # the first call to need the device
    except RuntimeError as error:
        what = f"the device cuda:{index} cannot be used ({first_line(error)})"
        raise ConfigError(what, ("end what else uses it", Give("device")), field="device") from None
    # By default torch rounds to TF32 in convolutions but not in matrix products: patches embedded
    # all together and one by one would differ by 1e-3. So use the products' setting for both.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return torch.device("cuda", index)


def check_own_gpus(world: World) -> None:
    """Raise `ConfigError` on every process if two of them compute on one GPU."""
    if world.device.type != "cuda":
        return
    uuid = torch.cuda.get_device_properties(world.device).uuid
    num_gpus = len({*world.gather((platform.node(), str(uuid)))})
    if num_gpus < world.size:
        what = f"{world.size} processes share {plural(num_gpus, 'GPU')}, and each needs its own"
        fixes = f"start {num_gpus}, or show each its own", Give("device", "cpu")
        raise agreed(ConfigError(what, fixes, field="device"))


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started, or be alone.

    Raises:
        ProcessLost: another process died while this one waited for it.
    """
    chosen = choose_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
        return
    if size == 1:
        yield World(0, 1, chosen)
        return
    # gloo beside NCCL: flags and errors travel between the hosts without waiting for the GPUs.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    failed = True
    try:
        # The others wait while one process writes, which may take long on a slow disk.
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
        world = World(dist.get_rank(), size, chosen)
        check_own_gpus(world)
        yield world
        failed = False
    except RuntimeError as error:
        by_gloo = any(words in str(error) for words in _PEER_LOST)
        if not by_gloo and not isinstance(error, dist.DistError):
            raise
        reason = str(error).strip().splitlines()[0]
        what = f"another process of this run died or does not answer ({reason})"
        fix = "see its own message; the same command goes on from what was saved"
        raise ProcessLost(what, fix) from error
    finally:
        if dist.is_initialized():
            # NCCL shuts down only together: after an error it would wait for the others.
            if failed and chosen.type == "cuda":
                distributed_c10d._abort_process_group()
            else:
                dist.destroy_process_group()
