"""A run's folder: who may write it, its recipe, logs, weights and environment.

``recipe.yaml`` (runnable again), ``metrics.jsonl`` (what the run computed: equal after a resume), ``timing.jsonl`` (how fast it went),
``environment.json``, ``checkpoints/`` (training state), ``last/`` and ``best/`` (the student, for timm), ``tensorboard/``.
"""

import json
import os
import platform
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .. import __version__, durable
from ..errors import ConfigError, PermissionDenied
from ..recipe import Recipe, differences, dump_recipe, load_recipe

RECIPE, METRICS, TIMING, ENVIRONMENT, CLAIM = "recipe.yaml", "metrics.jsonl", "timing.jsonl", "environment.json", "in_use.json"


def check_folder(path: Path, recipe: Recipe) -> bool:
    """Whether ``path`` holds this run already; writes nothing.

    Raises:
        ConfigError: it holds something else, or a run of another recipe (the differing fields are named).
        PermissionDenied: it cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"the output {path} is a file: name a folder")
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionDenied(f"the output {path} cannot be written: no permission in {parent}")
    if not path.exists() or not any(path.iterdir()):
        return False
    if not (path / RECIPE).is_file():
        found = sorted(entry.name for entry in path.iterdir())[0]
        raise ConfigError(f"the output {path} is not empty ({found} is in it) and holds no run: name another folder with --output")
    lines = differences(recipe, load_recipe(path / RECIPE))
    if lines:
        more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise ConfigError(
            f"the output {path} holds a run of another recipe ({'; '.join(lines[:3])}{more}): name another folder with --output, "
            f"or resume that run with 'vitdistill train {path / RECIPE} --output {path}'"
        )
    return True


class RunFolder:
    """The open folder of a running run, claimed for this process."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        durable.make_dirs(path)
        self._claim()
        try:
            if not (path / RECIPE).exists():
                durable.write_atomic(path / RECIPE, dump_recipe(recipe).encode())
            durable.write_atomic(path / ENVIRONMENT, json.dumps(environment(), indent=2).encode())
        except BaseException:
            self._release()
            raise
        self._logs: dict[str, durable.AppendLog] = {}

    def _claim(self) -> None:
        path = self.path / CLAIM
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
        for _ in range(3):
            try:
                durable.write_atomic(path, mine, replace=False)
            except FileExistsError:
                self._take_over_if_dead(path)
                continue
            return
        raise ConfigError(f"{self.path} is being claimed by another process: wait for it, or name another folder with --output")

    def _take_over_if_dead(self, path: Path) -> None:
        try:
            owner = json.loads(path.read_bytes())
            host, pid = str(owner["host"]), int(owner["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            host, pid = socket.gethostname(), -1  # not a claim of ours
        if host != socket.gethostname():
            raise ConfigError(
                f"{self.path} is in use by process {pid} on {host}: wait for it, or delete {path} if that run is dead"
            )
        if pid > 0 and pid != os.getpid():
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                pass
            except PermissionError:
                pid = -pid
            else:
                pid = -pid
            if pid < 0:
                raise ConfigError(f"{self.path} is in use by process {-pid}: wait for it, or name another folder with --output")
        path.unlink(missing_ok=True)

    def _release(self) -> None:
        (self.path / CLAIM).unlink(missing_ok=True)

    def open_logs(self, offsets: Mapping[str, int]) -> None:
        """Open the logs, cut back to where the resumed checkpoint was."""
        for name in (METRICS, TIMING):
            self._logs[name] = durable.AppendLog(self.path / name, offsets.get(name, 0))

    def log(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one JSON line."""
        self._logs[name].append(json.dumps(record))

    def offsets(self) -> dict[str, int]:
        """Where the logs end, on disk."""
        return {name: log.sync() for name, log in self._logs.items()}

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for log in self._logs.values():
            log.close()
        self._release()


def environment() -> dict[str, Any]:
    """What this run runs on: versions, machine, command."""
    import timm
    import torchvision
    from PIL import Image

    return {
        "vitdistill": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "pillow": Image.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }
