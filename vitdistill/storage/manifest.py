"""Manifests: the sizes and sha256 digests of a folder's files, and of the manifest itself."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..messages import printable
from .atomic import disk_errors, read_bytes, sha256_file, write_atomic, write_new

MANIFEST = "manifest.json"


MANIFEST_FORMAT = 1


def write_manifest(
    folder: str | os.PathLike[str], files: Mapping[str, str], identity: Mapping[str, Any]
) -> None:
    """Write ``manifest.json`` into an unpublished folder: each file's size and sha256, what it is,
    its own digest.
    """
    write_new(Path(folder) / MANIFEST, _manifest_bytes(_manifest_body(folder, files, identity)))


def replace_manifest(
    folder: str | os.PathLike[str], files: Mapping[str, str], identity: Mapping[str, Any]
) -> None:
    """The same in a published folder, in place of the manifest that is there."""
    write_atomic(Path(folder) / MANIFEST, _manifest_bytes(_manifest_body(folder, files, identity)))


def _manifest_body(
    folder: str | os.PathLike[str], files: Mapping[str, str], identity: Mapping[str, Any]
) -> dict[str, Any]:
    sizes = {name: (Path(folder) / name).stat().st_size for name in files}
    return {
        "format": MANIFEST_FORMAT,
        "files": {name: {"bytes": sizes[name], "sha256": digest} for name, digest in files.items()},
        "identity": dict(identity),
    }


def _manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest; a reader compares whole files with it, so that every flipped
    bit shows.
    """
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return (
        json.dumps(
            {"manifest": body, "sha256": hashlib.sha256(text.encode()).hexdigest()},
            sort_keys=True,
            indent=1,
            ensure_ascii=True,
        ).encode()
        + b"\n"
    )


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest's body, checked against its own digest; ``DataError`` when missing, damaged or
    of another format.
    """
    path = Path(folder) / MANIFEST
    data = read_bytes(path)
    try:
        body = json.loads(data)["manifest"]
        intact = _manifest_bytes(body) == data
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DataError(f"{printable(path)} is damaged: its content does not match its own digest.")
    if body.get("format") != MANIFEST_FORMAT:
        raise DataError(
            f"{printable(path)} has format {body.get('format')}, this version reads format"
            f" {MANIFEST_FORMAT}; use the version of vitdistill that wrote it."
        )
    for name in body["files"]:
        if Path(name).name != name or name in ("", ".", ".."):
            raise DataError(
                f"{printable(path)} names {printable(name)!r}, which is not a plain file name."
            )
    return dict(body)


def verify_dir(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Re-read every file of a published folder against its manifest and return the manifest's body.

    Raises ``DataError`` naming the first missing, short or changed file.
    """
    body = read_manifest(folder)
    for name in body["files"]:
        path = Path(folder) / name
        _check_size(path, body)
        _check_digest(path, sha256_file(path), body)
    return body


def read_verified(folder: str | os.PathLike[str], name: str, body: Mapping[str, Any]) -> bytes:
    """A file's bytes, read once and checked against the body from ``read_manifest``; ``DataError``
    if they differ.
    """
    path = Path(folder) / name
    if name not in body["files"]:
        raise DataError(f"{printable(path)} is not named in the manifest beside it.")
    _check_size(path, body)
    data = read_bytes(path)
    _check_digest(path, hashlib.sha256(data).hexdigest(), body)
    return data


def _check_size(path: Path, body: Mapping[str, Any]) -> None:
    expected = body["files"][path.name]["bytes"]
    with disk_errors(path):
        try:
            found = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{printable(path)} is missing.") from error
    if found != expected:
        raise DataError(
            f"{printable(path)} is damaged: it has {found} bytes and its manifest says {expected}."
        )


def _check_digest(path: Path, found: str, body: Mapping[str, Any]) -> None:
    expected = body["files"][path.name]["sha256"]
    if found != expected:
        raise DataError(
            f"{printable(path)} is damaged: its sha256 is {found[:12]}... and its manifest says"
            f" {expected[:12]}...."
        )
