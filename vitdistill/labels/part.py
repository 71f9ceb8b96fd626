"""A part of a label store: the records of some samples in one view, in one file.

The file is the records, then a footer (JSON) with a crc32 of every block of records, then the
footer's length and crc32 and `_MAGIC`. The footer names the store, the view and the part.
"""

import json
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..keyed import I64
from ..storage.atomic import disk_errors, write_first
from .manifest import FORMAT, Manifest

_MAGIC = b"vitdpart"
_TRAILER = struct.Struct("<QI8s")  # length and crc32 of the footer, magic
_BLOCK_RECORDS, _BLOCK_BYTES = 4096, 2**20
_REMEDY = "delete it and label again"

Raw = npt.NDArray[Any]  # records as opaque items of a fixed size


class Part:
    """A part's file, mapped for each reading: a process may have few files open.

    The ``crcs`` of blocks are compared when they are first read.
    """

    def __init__(self, path: Path, manifest: Manifest, view: int, part: int) -> None:
        """Read the footer. Raises `FileNotFoundError`, or `DataError` for damage."""
        self._path = path
        data = self._map()
        footer, length = self._footer(data)
        if (footer["store"], footer["view"], footer["part"]) != (manifest.digest, view, part):
            raise self._damaged("it is another part, or of another store, under its name")
        lo, hi = manifest.part_range(part)
        item = manifest.layout.record_bytes
        if length != (hi - lo) * item:
            raise self._damaged(f"it does not hold samples {lo} to {hi - 1}")
        self._block: int = footer["block"]
        self.crcs: list[int] = footer["crc32"]
        self._dtype, self._count, self._size = np.dtype((np.void, item)), hi - lo, len(data)
        self._checked = np.zeros(len(self.crcs), dtype=bool)

    def _footer(self, data: mmap.mmap) -> tuple[dict[str, Any], int]:
        end = len(data) - _TRAILER.size
        length, crc, magic = _TRAILER.unpack(data[end:]) if end >= 0 else (0, 0, b"")
        start = end - length
        if magic != _MAGIC or start < 0 or zlib.crc32(text := data[start:end]) != crc:
            raise self._damaged("it was cut or overwritten")
        return json.loads(text), start

    def _damaged(self, how: str) -> DataError:
        return DataError(f"{self._path} is damaged: {how}", _REMEDY)

    def take(self, rows: I64) -> Raw:
        """Return the records at these places of the part; `DataError` for a damaged block."""
        records = self._records()
        self._check(records, np.unique(rows // self._block))
        return records.take(rows)

    def read_all(self) -> Raw:
        """Return all records, every block compared with its checksum now."""
        self._checked[:] = False
        records = self._records()
        self._check(records, np.arange(len(self.crcs)))
        return records

    def _records(self) -> Raw:
        data = self._map()
        if len(data) != self._size:
            raise self._damaged("it has changed")
        return np.frombuffer(data, self._dtype, self._count)

    def _map(self) -> mmap.mmap:
        if not self._path.is_file():
            raise FileNotFoundError(self._path)
        with disk_errors(self._path), open(self._path, "rb") as file:
            if not os.path.getsize(file.fileno()):  # an empty file cannot be mapped
                raise self._damaged("it is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _check(self, records: Raw, blocks: I64) -> None:
        for block in blocks[~self._checked[blocks]].tolist():
            content = records[block * self._block : (block + 1) * self._block]
            if zlib.crc32(content.data) != self.crcs[block]:
                raise self._damaged(f"block {block} does not match its checksum")
            self._checked[block] = True


def write_part(path: Path, manifest: Manifest, view: int, part: int, records: Raw) -> bool:
    """Write a part, whole and for good; return False if there is one, which stays."""
    item = manifest.layout.record_bytes
    raw = np.ascontiguousarray(records).view(np.dtype((np.void, item)))
    lo, hi = manifest.part_range(part)
    block = max(1, min(_BLOCK_RECORDS, _BLOCK_BYTES // item))
    footer = {
        "format": FORMAT,
        "store": manifest.digest,
        "view": view,
        "part": part,
        "lo": lo,
        "hi": hi,
        "item": item,
        "block": block,  # records
        "crc32": [zlib.crc32(raw[i : i + block].data) for i in range(0, hi - lo, block)],
    }
    text = json.dumps(footer, sort_keys=True, separators=(",", ":")).encode()
    trailer = _TRAILER.pack(len(text), zlib.crc32(text), _MAGIC)
    return write_first(path, lambda file: file.writelines([raw.data, text, trailer]))
