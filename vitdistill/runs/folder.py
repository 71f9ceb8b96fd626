"""A run's folder: who may write it, its recipe, logs, weights and environment.

``recipe.yaml`` (runnable again), ``metrics.jsonl`` (what the run computed: equal after a resume),
``timing.jsonl`` (how fast it went), ``environment.json`` (by the step from which it held),
``weights.json`` (sha256 of the weights files it began from), ``checkpoints/`` (training state),
``last/`` and ``best/`` (the student, for timm), ``pictures.png``, ``tensorboard/``,
``summary.json`` (there when the run is finished).
"""

import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .. import __version__
from ..errors import ConfigError, PermissionDenied, UserError
from ..recipes.config import Recipe
from ..recipes.convert import replace_fields
from ..recipes.fingerprint import differences, weights_files
from ..recipes.yaml import dump_recipe, load_recipe
from ..storage.atomic import (
    clear_aside,
    disk_errors,
    remove_temporaries,
    sha256_file,
    write_atomic,
)
from ..storage.lock import lock_folder
from ..storage.log import AppendLog
from ..weights import export

RECIPE, WEIGHTS, METRICS, TIMING, ENVIRONMENT, SUMMARY, CLAIM, PICTURES = (
    "recipe.yaml",
    "weights.json",
    "metrics.jsonl",
    "timing.jsonl",
    "environment.json",
    "summary.json",
    "in_use.json",
    "pictures.png",
)


def check_folder(path: Path, recipe: Recipe) -> bool:
    """Whether ``path`` holds this run already; writes nothing.

    Raises:
        ConfigError: it holds something else, or a run of another recipe (the differing fields are
            named).
        PermissionDenied: it cannot be written.
        DiskError: it cannot be the name of a folder.
    """
    with disk_errors(path):
        return _check_folder(path, recipe)


def _check_folder(path: Path, recipe: Recipe) -> bool:
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError(
            f"the output {path} needs a folder where the file {parent} is: name another with"
            " --output"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionDenied(f"the output {path} cannot be written: no permission in {parent}")
    # Neither a run nor anybody's: the lock and temporaries of a process killed while it began a
    # run, a system's own files (.DS_Store), and the claim that earlier versions wrote.
    found = (
        sorted(name for name in os.listdir(path) if name != CLAIM and not name.startswith("."))
        if path.exists()
        else []
    )
    if not found:
        return False
    if not (path / RECIPE).is_file():
        raise ConfigError(
            f"the output {path} is not empty ({found[0]} is in it) and holds no run: name another"
            " folder with --output"
        )
    lines = changes(path, recipe, load_recipe(path / RECIPE))
    if lines:
        more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise ConfigError(
            f"the output {path} holds a run of another recipe ({'; '.join(lines[:3])}{more}): name"
            " another folder with --output, or resume that run with 'vitdistill train"
            f" {path / RECIPE} --output {path}'"
        )
    return True


def changes(path: Path, recipe: Recipe, saved: Recipe) -> list[str]:
    """What of ``recipe`` is not as in the run in this folder, whose recipe is ``saved``.

    A weights file in another place is the same one if its content is.
    """
    lines, here, there = differences(recipe, saved), weights_files(recipe), weights_files(saved)
    moved = [field for field in here.keys() & there.keys() if here[field] != there[field]]
    if not moved:
        return lines
    known = _read_weights(path)
    same = {
        field: here[field]
        for field in moved
        if known.get(field) and _sha256(here[field]) == known[field]
    }
    return differences(recipe, replace_fields(saved, same)) if same else lines


def _read_weights(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads((path / WEIGHTS).read_bytes()))
    except (
        OSError,
        ValueError,
        TypeError,
    ):  # not there, or not whole: then another path is another file
        return {}


def _sha256(file: str) -> str | None:
    return sha256_file(file) if Path(file).is_file() else None


def saved_recipe(path: Path) -> Recipe | None:
    """The recipe of the run in this folder; None where there is none, or none that this version
    reads.
    """
    try:
        return load_recipe(path / RECIPE) if (path / RECIPE).is_file() else None
    except UserError:
        return None


def finished(path: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The summary of this very run if it is there and finished; raises as `check_folder`."""
    if not check_folder(path, recipe) or not (path / SUMMARY).is_file():
        return None
    return dict(json.loads((path / SUMMARY).read_bytes()))


class RunFolder:
    """The open folder of a running run, locked for this process until the block is left.

    Raises:
        ConfigError: another process is writing it; or as `check_folder`.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self._logs: dict[str, AppendLog] = {}
        self._lock = lock_folder(path)
        try:
            # Another process may have begun a run here since the folder was first looked at.
            if not check_folder(path, recipe):
                write_atomic(path / RECIPE, dump_recipe(recipe).encode())
                digests = {field: _sha256(file) for field, file in weights_files(recipe).items()}
                if digests:
                    write_atomic(path / WEIGHTS, json.dumps(digests, indent=2).encode())
            self._clear_leftovers()
        except BaseException:
            self._lock.release()
            raise

    def _clear_leftovers(self) -> None:
        """Remove what a killed process left: unfinished files, and an old export whose replacement
        is in place.
        """
        (self.path / CLAIM).unlink(missing_ok=True)
        remove_temporaries(self.path, export.FILES)
        for old in self.path.glob(".replaced-*-*"):
            new = self.path / old.name.split("-")[1]
            if (new / export.CONFIG).is_file():
                clear_aside(old, new, export.FILES)

    def open_logs(self, offsets: Mapping[str, int]) -> None:
        """Open the logs, cut back to where the resumed checkpoint was."""
        for name in (METRICS, TIMING):
            self._logs[name] = AppendLog(self.path / name, offsets.get(name, 0))

    def log(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one JSON line."""
        self._logs[name].append(json.dumps(record))

    def offsets(self) -> dict[str, int]:
        """Where the logs end, on disk."""
        return {name: log.sync() for name, log in self._logs.items()}

    def record_environment(self, step: int, processes: int) -> list[str]:
        """Note what the run runs on from ``step`` on; returns what is not as before and can change
        the last bits, for the user.
        """
        path, now = self.path / ENVIRONMENT, {**environment(), "processes": processes}
        known = dict(json.loads(path.read_bytes())) if path.is_file() else {}
        before = known[max(known, key=int)] if known else now
        if now != before or not known:
            kept = {begun: found for begun, found in known.items() if int(begun) < step}
            write_atomic(path, json.dumps({**kept, str(step): now}, indent=2).encode())
        return [
            f"{key} {before.get(key)} before, {now[key]} now"
            for key in _DECISIVE
            if now[key] != before.get(key)
        ]

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            for log in self._logs.values():
                log.close()
        finally:
            self._lock.release()


# Other values of these leave samples and views as they are, and may change numbers in their last
# bits (processes: dropout's draws too).
_DECISIVE = (
    "vitdistill",
    "torch",
    "torchvision",
    "timm",
    "pillow",
    "processor",
    "gpus",
    "threads",
    "processes",
)


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
