"""Manifests: what a published folder must hold, so that every lost or flipped bit is noticed.

Weights files do not notice damage themselves: with a flipped bit, they load as other numbers.
``manifest.json`` has each file's size and sha256, and its own. It is written last, before the
folder gets its final name, and a folder counts by its manifest, never by its name alone.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..messages import printable
from .atomic import StrPath, read_bytes, write_new

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


def write_manifest(
    folder: StrPath,
    contents: Mapping[str, bytes],
    identity: Mapping[str, Any],
    write: Callable[[Path, bytes], object] = write_new,
) -> None:
    """Write the manifest of an unpublished folder, or with `write_atomic` of a published one.

    Args:
        contents: what was written, by file name: digested as meant, not as found on the disk.
        identity: plain JSON that says what the folder is.
    """
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    body = {"format": MANIFEST_FORMAT, "files": files, "identity": dict(identity)}
    write(Path(folder, MANIFEST), _manifest_bytes(body))


def _manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """Spell a manifest in the one way there is: a reader compares all of it, to the last space."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    whole = {"manifest": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(whole, sort_keys=True, indent=1).encode() + b"\n"


def read_manifest(folder: StrPath) -> dict[str, Any]:
    """Return the manifest's ``format``, ``files`` and ``identity``.

    Raises:
        DataError: it is missing, not as its own digest says, or of another format.
    """
    path = Path(folder, MANIFEST)
    data = read_bytes(path, 2**26)
    try:
        body = json.loads(data)["manifest"]
        intact = _manifest_bytes(body) == data
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact or not _is_manifest(body):
        raise DataError(f"{printable(path)} is damaged: its content does not match its own digest")
    if body.get("format") != MANIFEST_FORMAT:
        raise DataError(
            f"{printable(path)} has format {body.get('format')}, and this version reads format"
            f" {MANIFEST_FORMAT}",
            fix="use the version of vitdistill that wrote it",
        )
    for name in body["files"]:  # a manifest may be anybody's: it must not lead out of its folder
        if Path(name).name != name or name in ("", ".", ".."):
            raise DataError(f"{printable(path)} names {printable(name)!r}, no plain file name")
    return dict(body)


def _is_manifest(body: Any) -> bool:
    if not isinstance(body, dict) or not isinstance(body.get("identity"), dict):
        return False
    files = body.get("files")
    return isinstance(files, dict) and all(
        isinstance(file, dict) and {"bytes", "sha256"} <= file.keys() for file in files.values()
    )


def check_sizes(folder: StrPath) -> dict[str, Any]:
    """Return the manifest if every file has the size it says; `DataError` names one that has not.

    It costs next to nothing and finds what a crash or a full disk leaves, but no flipped bits.
    """
    body = read_manifest(folder)
    for name, expected in body["files"].items():
        path = Path(folder, name)
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise _damaged(path)
    return body


def verify_dir(folder: StrPath) -> dict[str, Any]:
    """Read every file again, compare it with the manifest, and return that; `DataError` if not."""
    body = read_manifest(folder)
    for name in body["files"]:
        read_verified(folder, name, body)
    return body


def read_verified(folder: StrPath, name: str, body: Mapping[str, Any]) -> bytes:
    """Read a file once and compare it with its folder's manifest ``body``; `DataError` if not."""
    data = read_bytes(Path(folder, name))
    if body["files"].get(name, {}).get("sha256") != hashlib.sha256(data).hexdigest():
        raise _damaged(Path(folder, name))
    return data


def _damaged(path: Path) -> DataError:
    return DataError(f"{printable(path)} is missing or damaged: it is not what its manifest says")
