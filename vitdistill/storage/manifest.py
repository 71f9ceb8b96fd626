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
        contents: what was written, by file name; digests are of this, not of what is on disk.
        identity: plain JSON that says what the folder is.
    """
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    body = {"format": MANIFEST_FORMAT, "files": files, "identity": dict(identity)}
    write(Path(folder, MANIFEST), _manifest_bytes(body))


def _manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """Return the only valid spelling of a manifest: a reader compares it byte for byte."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    whole = {"manifest": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(whole, sort_keys=True, indent=1).encode() + b"\n"


def read_manifest(folder: StrPath) -> dict[str, Any]:
    """Return the manifest's ``format``, ``files`` and ``identity``; `DataError` for damage."""
    path = Path(folder, MANIFEST)
    data = read_bytes(path, 2**26)
    try:
        body: dict[str, Any] = json.loads(data)["manifest"]
        intact = _manifest_bytes(body) == data and body["format"] == MANIFEST_FORMAT
        intact &= isinstance(body["identity"], dict)
        intact &= all({"bytes", "sha256"} <= file.keys() for file in body["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DataError(f"{path} is damaged, or of another version of vitdistill")
    return body


def check_sizes(folder: StrPath) -> None:
    """Raise `DataError` unless every file has the size that the manifest says.

    It costs next to nothing and finds what a crash or a full disk leaves, but no flipped bits.
    """
    for name, expected in read_manifest(folder)["files"].items():
        path = Path(folder, name)
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise _damaged(path)


def read_verified(folder: StrPath, name: str, body: Mapping[str, Any]) -> bytes:
    """Read a file once and compare it with its folder's manifest ``body``; `DataError` if not."""
    data = read_bytes(Path(folder, name))
    if body["files"].get(name, {}).get("sha256") != hashlib.sha256(data).hexdigest():
        raise _damaged(Path(folder, name))
    return data


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is missing or damaged: it is not what its manifest says")
