"""A run's folder: who may write it, its recipe, logs, weights and environment.

``docs/design.md`` lists its files.
"""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
import torchvision

from .. import __version__
from ..errors import ConfigError, DataError, Fix, Give, UserError
from ..recipes.config import Recipe
from ..recipes.yaml import dump_recipe, load_recipe
from ..storage.atomic import disk_errors, remove_temporaries, settle_asides, write_atomic
from ..storage.lock import lock_folder
from ..storage.log import AppendLog
from ..weights.export import FILES
from ..world import World
from .identity import RECIPE, SUMMARY, WEIGHTS, changes, note_identity, read_record

METRICS, TIMING, ENVIRONMENT = "metrics.jsonl", "timing.jsonl", "environment.json"
FIRST_PICTURES, PICTURES = "pictures_first.png", "pictures.png"
SUMMED_UP = ("scores", "best_top1", "best_epoch", "seconds")
"""What every summary has."""


def check_folder(path: Path, recipe: Recipe, fix: Fix = "") -> bool:
    """Return whether ``path`` holds this run already; write nothing.

    Raises:
        ConfigError: it cannot be written, holds something else, or a run of another recipe;
            ``fix`` is what to do then, besides another output.
    """
    with disk_errors(path):
        parent = next(place for place in (path, *path.absolute().parents) if place.exists())
        found = contents(path) if parent == path and path.is_dir() else []
    fixes: tuple[Fix, ...] = (Give("output"),)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = f"cannot be made: {parent} is a file, or may not be written"
    elif not found:
        return False
    elif not (path / RECIPE).is_file():
        what = f"is not empty ({found[0]} is in it) and holds no run"
    elif not (lines := changes(path, recipe)):
        return True
    else:
        more = [f"and {len(lines) - 3} more"] if len(lines) > 3 else []
        what = f"holds another run ({'; '.join([*lines[:3], *more])})"
        fixes += (fix or f"go on with that one by 'vitdistill train {shlex.quote(str(path))}'",)
    raise ConfigError(f"the output {path} {what}", fixes, field="output")


def contents(path: Path) -> list[str]:
    """Return the names in a folder, [] where there is none.

    Hidden ones do not count: locks and temporaries of a killed process, a system's own files.
    """
    names = os.listdir(path) if path.exists() else []
    return sorted(name for name in names if not name.startswith("."))


def saved_recipe(path: Path) -> Recipe | None:
    """Return the recipe of the run in this folder; None if it has none that this version reads."""
    try:
        return load_recipe(path / RECIPE) if (path / RECIPE).is_file() else None
    except UserError:
        return None


def finished(path: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the summary of this very run if it is finished; `DataError` if its weights are gone.

    Raises as `check_folder`.
    """
    summary = read_record(path / SUMMARY, SUMMED_UP) if check_folder(path, recipe) else None
    if summary is not None:
        made = ["last"] if summary["best_top1"] is None else ["last", "best"]
        gone = [kind for kind in made if not (path / kind / WEIGHTS).is_file()]
        if gone:
            what = f"the run {path} is finished, but the weights in {' and '.join(gone)} are gone"
            raise DataError(what, ("restore them", Give("output")), field="output")
    return summary


class RunFolder:
    """The open folder of a running run, locked for this process until the block is left.

    Raises:
        ConfigError: another process is writing it; or as `check_folder`.
        DataError: the run that is resumed began with something else, see `note_identity`.
    """

    def __init__(self, path: Path, recipe: Recipe, identity: Mapping[str, str]) -> None:
        self.path = path
        self._logs: dict[str, AppendLog] = {}
        with ExitStack() as stack:
            stack.enter_context(lock_folder(path))
            # Another process may have begun a run here since the folder was first looked at.
            if not check_folder(path, recipe):
                write_atomic(path / RECIPE, dump_recipe(recipe).encode())
            note_identity(path, recipe, identity)
            remove_temporaries(path)
            settle_asides(path, FILES)
            self._open = stack.pop_all()

    def open_logs(self, offsets: Mapping[str, int]) -> None:
        """Open the logs, cut back to where the resumed checkpoint was."""
        for name in (METRICS, TIMING):
            self._logs[name] = AppendLog(self.path / name, offsets.get(name, 0))
            self._open.callback(self._logs[name].close)

    def log(self, name: str, record: Mapping[str, Any]) -> None:
        self._logs[name].append(json.dumps(record))

    def offsets(self) -> dict[str, int]:
        """Where the logs end, on disk."""
        return {name: log.sync() for name, log in self._logs.items()}

    def record_environment(self, step: int, world: World, images: Sequence[str] = ()) -> str:
        """Record the environment from ``step`` on, with notes on the images.

        Return the previous device, if that was another; else "".
        """
        path, device = self.path / ENVIRONMENT, world.device_name
        now = environment() | {"device": device, "processes": world.size, "images": [*images]}
        known = (read_record(path) or {}).items()
        kept = {begun: v for begun, v in known if begun.isdecimal() and int(begun) < step}
        last = kept[max(kept, key=int)] if kept else {}
        if now != last:
            write_atomic(path, json.dumps({**kept, str(step): now}, indent=2).encode())
        before: str = last.get("device", "")
        return "" if before == device else before

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def environment() -> dict[str, Any]:
    return {
        "vitdistill": __version__,
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, torchvision, timm)},
        "pillow": PIL.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "command": ["vitdistill", *sys.argv[1:]],  # as it is typed, wherever the program lies
    }
