"""Checkpoints of a run: complete, verified, without pickle, one folder a step.

    <run>/checkpoints/step-00001234/state.safetensors    every tensor
                                    state.json           every number and string
                                    manifest.json        sizes and sha256 of the two, and its own

A save fills a temporary folder, syncs it, reads it back, renames it, and only then removes older
ones: a kill, a power cut or a full disk leaves the checkpoints that were there. A checkpoint counts
because its manifest verifies, not because of its name: a resume reads the newest one, and the one
before it if that is damaged. Only one process saves, and it holds the lock of the run's folder.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..errors import DataError, DiskError, NonFiniteError
from . import atomic, manifest
from .atomic import StrPath, disk_errors
from .manifest import MANIFEST
from .tensors import tensor_bytes

TENSORS = "state.safetensors"
STATE = "state.json"
FILES = frozenset({TENSORS, STATE, MANIFEST})

_NAME = re.compile(r"step-([0-9]{8,})")
_KIND = "vitdistill checkpoint"

State = tuple[dict[str, Tensor], dict[str, Any]]
"""A run's tensors by name, on the CPU, and its numbers and strings as plain JSON."""


def folder_of(run_dir: StrPath, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def save(
    run_dir: StrPath,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Save the state after optimizer step ``step``, keep ``keep`` checkpoints, return its folder.

    ``state`` is plain JSON: anything that would come back as something else is a ``TypeError``.
    Only older checkpoints are removed, and none that holds a file of somebody else's. After a
    `DiskError`, earlier checkpoints are untouched.
    """
    assert keep >= 1 and step >= 0
    final = folder_of(run_dir, step)
    text = json.dumps(state, separators=(",", ":")).encode()
    if repr(json.loads(text)) != repr(dict(state)):  # tuples, integer keys, numpy's numbers
        raise TypeError("the state holds what JSON would give back as something else")
    contents = {TENSORS: tensor_bytes(tensors), STATE: text}
    atomic.make_dirs(final.parent)
    atomic.remove_temporaries(final.parent)
    # A resumed run may reach a step that is on disk already, whole or damaged.
    with atomic.staged_dir(final, replaces=FILES) as temporary:
        for name, content in contents.items():
            atomic.write_new(temporary / name, content)
        manifest.write_manifest(temporary, contents, {"kind": _KIND, "step": step})
        del contents, content
        try:
            body = manifest.read_manifest(temporary)
            for name in (TENSORS, STATE):
                manifest.read_verified(temporary, name, body)
        except DataError as error:
            what = f"{final} was written but reads back changed, so the disk is failing"
            fix = "move the run's folder to another disk; earlier checkpoints are untouched"
            raise DiskError(what, fix) from error
    _prune(final, keep)
    return final


def load(path: StrPath) -> State:
    """Read and verify a checkpoint; ``DataError`` names the file that is missing or damaged."""
    folder = Path(path)
    body = manifest.read_manifest(folder)
    identity = body["identity"]
    named = not _NAME.fullmatch(folder.name) or _step(folder) == identity.get("step")
    if identity.get("kind") != _KIND or set(body["files"]) != {TENSORS, STATE} or not named:
        raise DataError(f"{folder} is not the checkpoint its name says")
    state = json.loads(manifest.read_verified(folder, STATE, body))
    tensors = safetensors.torch.load(manifest.read_verified(folder, TENSORS, body))
    return tensors, state


def settle(run_dir: StrPath) -> None:
    """Finish what a killed process left half replaced; only for the process that saves."""
    atomic.settle_asides(Path(run_dir) / "checkpoints", FILES)


def load_latest(
    run_dir: StrPath,
    warn: Callable[[str], None] = lambda text: None,
    check: Callable[[Mapping[str, Tensor]], None] = lambda tensors: None,
) -> tuple[Path, State] | None:
    """Load the newest checkpoint that verifies, and its folder; None when there is none at all.

    ``warn`` is told of each damaged one on the way; `DataError` if all are damaged. ``check``
    raises `NonFiniteError` for tensors that no run can resume from.
    """
    damaged, place = [], Path(run_dir) / "checkpoints"
    for folder in _candidates(place):
        try:
            state = load(folder)
            check(state[0])
            return folder, state
        except (DataError, DiskError, NonFiniteError) as error:
            damaged.append(folder)
            warn(f"{folder} cannot be resumed from, and an earlier checkpoint is tried: {error}")
    if damaged:
        what = f"none of the checkpoints in {place} is intact"
        raise DataError(what, ("restore one from a copy", "start again in a new folder"))
    return None


def _candidates(folder: Path) -> list[Path]:
    with disk_errors(folder):
        entries = list(folder.iterdir()) if folder.is_dir() else []
    found = [entry for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _prune(newest: Path, keep: int) -> None:
    """Remove what is older than the newest ``keep`` checkpoints, counting from ``newest``.

    Later steps stay: somebody went back to an earlier one. An older one counts if its sizes are
    right; its content was read back when it was saved.
    """
    kept = 1
    for folder in _candidates(newest.parent):
        if _step(folder) >= _step(newest):
            continue
        if kept < keep:
            with suppress(DataError):
                manifest.check_sizes(folder)
                kept += 1
        else:
            atomic.remove_dir(folder, FILES)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
