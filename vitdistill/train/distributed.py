"""The processes of a run: one is not a special case, torchrun's many share the global batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError


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

    def any(self, flags: Tensor) -> list[bool]:
        """Which of the flags is set on any process; one small reduction, one host sync."""
        if self.size > 1:
            flags = flags.to(torch.int32)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def share(self, error: Exception | None) -> None:
        """Wait for all processes; re-raise the main process's ``error`` on every one of them, so that none is left waiting."""
        if self.size > 1:
            box = [error if self.is_main else None]
            dist.broadcast_object_list(box, src=0)
            error = box[0]
        if error is not None:
            raise error


def choose_device(name: str = "auto") -> torch.device:
    """``auto``: this process's GPU if there is one, else the CPU; raises `ConfigError` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"the device {name!r} is unknown: choose auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"the device {name!r} was asked for, but this machine's torch sees no GPU: use --device cpu")
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ConfigError(f"the device cuda:{index} was asked for, but there are only {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return device


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join torchrun's processes, or be alone."""
    chosen = choose_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        alone = not dist.is_initialized()
        yield World(0 if alone else dist.get_rank(), 1 if alone else dist.get_world_size(), chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        yield World(dist.get_rank(), size, chosen)
    finally:
        dist.destroy_process_group()
