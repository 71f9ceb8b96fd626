"""The training state on disk: complete, verified, without pickle, one folder a step.

    <run>/checkpoints/step-00001234/state.safetensors    every tensor
                                    state.json           every number and string
                                    manifest.json        sizes and sha256 of the two, and its own

A checkpoint is valid when its manifest verifies, not because of its name. Saving writes a temporary
folder, syncs it, reads it back, renames it, and only then prunes; so a kill, a power cut or a full
disk leaves the checkpoints that were there.
"""

import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import DataError, DiskError
from ..messages import printable
from .atomic import (
    disk_errors,
    make_dirs,
    remove_dir,
    remove_stale_temporaries,
    require_free,
    staged_dir,
    write_new,
)
from .manifest import MANIFEST, read_manifest, read_verified, verify_dir, write_manifest
from .tensors import tensors_content

TENSORS = "state.safetensors"
STATE = "state.json"
FILES = frozenset({TENSORS, STATE, MANIFEST})

_NAME = re.compile(r"step-(?P<step>[0-9]{8,})(?P<replaced>\.replaced-[0-9a-f]{8})?")
_KIND = "vitdistill checkpoint"


def folder_of(run_dir: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of an optimizer step lives."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def save(
    run_dir: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Save the state after optimizer step ``step`` and return its folder; then prune to ``keep``
    verified checkpoints.

    ``state`` holds None, bool, int, float, str, lists and dicts with string keys (``TypeError``
    otherwise: nothing may come back changed). Pruning touches only folders this module made, older
    than ``step``, once ``keep`` verified ones remain. Raises ``DiskError`` or ``PermissionDenied``;
    then every earlier checkpoint is untouched.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step at least 0, not {keep} and {step}")
    final = folder_of(run_dir, step)
    text = _json_bytes(state)
    content = tensors_content(tensors)
    make_dirs(final.parent)
    remove_stale_temporaries(final.parent, FILES, alone=True)
    require_free(final, content.size + len(text) + 8192)
    # A resumed run may reach a step that is on disk already, whole or damaged: that stays findable
    # until the new one is in.
    aside = final.with_name(f"{final.name}.replaced-{secrets.token_hex(4)}")
    with staged_dir(final, aside=aside) as temp:
        digests = {
            TENSORS: write_new(temp / TENSORS, content),
            STATE: write_new(temp / STATE, text),
        }
        write_manifest(temp, digests, {"kind": _KIND, "step": step})
        _read_back(temp, final)
    _prune(final, keep)
    return final


def _read_back(temp: Path, final: Path) -> None:
    try:
        verify_dir(temp)
    except DataError as error:
        raise DiskError(
            f"{printable(final)} was written but reads back changed; the disk is failing:"
            " earlier checkpoints are untouched, move the run folder to another disk."
        ) from error


def verify(path: str | os.PathLike[str]) -> int:
    """Re-read a whole checkpoint and return its step; ``DataError`` naming the file that is missing
    or damaged.
    """
    return _checked_identity(Path(path), verify_dir(path))


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The verified tensors (on CPU) and state of a checkpoint folder; ``DataError`` naming the file
    that is damaged.
    """
    folder = Path(path)
    body = read_manifest(folder)
    _checked_identity(folder, body)
    state = json.loads(read_verified(folder, STATE, body))
    try:
        tensors = safetensors.torch.load(read_verified(folder, TENSORS, body))
    except safetensors.SafetensorError as error:
        raise DataError(
            f"{printable(folder / TENSORS)} is not a safetensors file ({error})."
        ) from error
    return tensors, state


def _checked_identity(folder: Path, body: Mapping[str, Any]) -> int:
    identity = body["identity"]
    if identity.get("kind") != _KIND or set(body["files"]) != {TENSORS, STATE}:
        raise DataError(f"{printable(folder)} is not a checkpoint of vitdistill.")
    match = _NAME.fullmatch(folder.name)
    if match is not None and int(match["step"]) != identity["step"]:
        raise DataError(
            f"{printable(folder)} holds step {identity['step']}: it was renamed; give it its"
            " own name back."
        )
    return int(identity["step"])


def _warn(sentence: str) -> None:
    logging.getLogger(__name__).warning("%s", sentence)


def latest(run_dir: str | os.PathLike[str], warn: Callable[[str], None] = _warn) -> Path | None:
    """The newest checkpoint that verifies, or None when there is none at all.

    Each damaged one on the way is named through ``warn``. Raises ``DataError`` when there are
    checkpoints and none verifies.
    """
    damaged = []
    for folder in _candidates(Path(run_dir) / "checkpoints"):
        try:
            verify(folder)
        except DataError as error:
            damaged.append(folder)
            warn(
                f"Checkpoint {printable(folder)} is damaged and the one before it is used"
                f" instead: {error}"
            )
        else:
            return folder
    if damaged:
        where = printable(damaged[0].parent)
        which = (
            f"The only checkpoint in {where} is not"
            if len(damaged) == 1
            else f"None of the {len(damaged)} checkpoints in {where} is"
        )
        raise DataError(
            f"{which} intact; restore one from a copy, or start again in a new run folder."
        )
    return None


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; of two for one step the one that replaced the other."""
    with disk_errors(folder):
        matches = [
            m
            for m in map(_NAME.fullmatch, os.listdir(folder) if folder.is_dir() else [])
            if m is not None
        ]
        matches = [m for m in matches if (folder / m[0]).is_dir()]
    matches.sort(key=lambda m: (int(m["step"]), m["replaced"] is None, m[0]), reverse=True)
    return [folder / m[0] for m in matches]


def _prune(newest: Path, keep: int) -> None:
    """Remove what is older than the newest ``keep`` verified checkpoints, counting from ``newest``,
    just read back.
    """
    kept = 1
    step = _step(newest)
    for folder in _candidates(newest.parent):
        # Later steps belong to a line of training somebody went back from: theirs to keep or
        # delete.
        if folder == newest or _step(folder) > step:
            continue
        if kept < keep and _step(folder) < step:
            try:
                verify(folder)
            except DataError:
                continue
            kept += 1
        else:
            remove_dir(folder, FILES)


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} is no checkpoint name")
    return int(match["step"])


def _json_bytes(state: Mapping[str, Any]) -> bytes:
    _check_json(state, "state")
    return json.dumps(state, ensure_ascii=True, separators=(",", ":")).encode()


def _check_json(value: Any, where: str) -> None:
    """Refuse what JSON would give back as something else: tuples, keys that are no strings,
    arrays.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}, which is no string")
            _check_json(item, f"{where}[{key!r}]")
    elif type(value) is list:
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"{where} is {type(value).__name__}, which JSON does not keep")


# -- optimizers -----------------------------------------------------------------------------------


def pack_optimizer(
    state_dict: Mapping[str, Any], prefix: str = "optimizer."
) -> tuple[dict[str, Tensor], Any]:
    """Split an optimizer's ``state_dict`` into named tensors and a JSON-able rest that
    ``unpack_optimizer`` joins exactly.

    Keeps dict keys that are integers, tuples, None, dtypes, and the memory layout of dense tensors.
    ``TypeError`` for other objects.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            tensors[where] = value.detach()
            kept: dict[str, Any] = {"tensor": where}
            # Reductions over a channels-last tensor add in another order: its strides are part of
            # an exact state.
            if not value.is_contiguous() and _is_dense(value):
                kept["stride"] = list(value.stride())
            return kept
        if isinstance(value, Mapping):
            return {
                "dict": [
                    [_key(key, where), pack(item, f"{where}.{key}")] for key, item in value.items()
                ]
            }
        if type(value) in (list, tuple):
            return {
                type(value).__name__: [
                    pack(item, f"{where}.{index}") for index, item in enumerate(value)
                ]
            }
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if value is None or isinstance(value, bool | int | float | str):
            return _plain(value)
        raise TypeError(
            f"optimizer state {where!r} is {type(value).__name__}, which cannot be saved without"
            " pickle"
        )

    return tensors, {
        "dict": [[key, pack(item, f"{prefix}{key}")] for key, item in state_dict.items()]
    }


def _plain(value: Any) -> Any:
    """numpy's float64 and the like are subclasses of Python's numbers: give JSON the plain
    number.
    """
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return None


def _key(key: Any, where: str) -> Any:
    if type(key) not in (int, str):
        raise TypeError(
            f"optimizer state {where!r} has the key {key!r}, neither string nor integer"
        )
    return key


def _is_dense(tensor: Tensor) -> bool:
    return torch.empty_like(tensor, memory_format=torch.preserve_format).stride() == tensor.stride()


def unpack_optimizer(tensors: Mapping[str, Tensor], structure: Any) -> dict[str, Any]:
    """The inverse of ``pack_optimizer``: a ``state_dict`` for the optimizer's ``load_state_dict``.

    Raises ``DataError`` when a tensor is missing.
    """

    def unpack(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if "tensor" in value:
            if value["tensor"] not in tensors:
                raise DataError(
                    f"The optimizer's state lacks the tensor {value['tensor']!r}; the checkpoint"
                    " does not fit this version."
                )
            tensor = tensors[value["tensor"]]
            if "stride" in value:
                tensor = torch.empty_strided(
                    tensor.shape, value["stride"], dtype=tensor.dtype
                ).copy_(tensor)
            return tensor
        if "dtype" in value:
            return getattr(torch, value["dtype"])
        if "dict" in value:
            return {key: unpack(item) for key, item in value["dict"]}
        if "tuple" in value:
            return tuple(unpack(item) for item in value["tuple"])
        return [unpack(item) for item in value["list"]]

    unpacked = unpack(structure)
    return dict(unpacked)
