"""A teacher's answers on disk: one fixed-size record for every (view, sample id), in sample order.

    labels/conv/manifest.json               whose answers these are, their layout and number
    labels/conv/view-00000/part-00000.bin   the records of samples lo to hi - 1 of that view, then a
    footer labels/conv/view-00000/part-00000.lease while somebody writes that part

A part is written whole and put under its name at once, and the first writer wins: a part that can
be seen is complete. Its footer names the store, the view and the part, and holds a crc32 of every
block of records, so that a damaged part, or one of another store or place under this one's name, is
refused by name. Nothing is locked, so that any number of processes may write and read at once.
"""

import hashlib
import json
import mmap
import os
import re
import resource
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import ConfigError, DataError, DiskError
from ..messages import printable
from ..storage.atomic import disk_errors, staged_dir, write_first
from ..storage.lock import LOCK, wait_lock
from ..storage.manifest import MANIFEST, read_manifest, replace_manifest, write_manifest
from .layout import Layout, Targets

FORMAT = 1
_KIND = "label store"
_MAGIC = b"vitdpart"
_TRAILER = struct.Struct("<QI8s")  # length and crc32 of the footer, magic
_BLOCK_RECORDS, _BLOCK_BYTES = 4096, 2**20
_VIEW_NAME, _PART_NAME = (
    re.compile(r"view-([0-9]{5,})"),
    re.compile(r"part-([0-9]{5,})\.(bin|lease)"),
)
_REMEDY = (
    "delete it and run 'vitdistill label' again ('vitdistill label verify' lists all such files)"
)

Ids = Sequence[int] | npt.NDArray[Any] | Tensor


# -- manifest -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds.

    Attributes:
        identity: what the answers depend on, as plain JSON; compared field by field.
        layout: what a record holds.
        num_samples: samples of the data set; ids are 0 to ``num_samples - 1``.
        num_views: views of every sample; more may be added.
        part_size: samples of a part; the last part of a view may be shorter.
        about: versions and the like, for people; never compared.

    Raises:
        ConfigError: a number is less than 1.
    """

    identity: dict[str, Any]
    layout: Layout
    num_samples: int
    num_views: int
    part_size: int = 16384
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_views", "part_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"a label store needs {name} of at least 1, not {getattr(self, name)}"
                )
        # As it will be read again: tuples become lists, and what is not JSON fails here.
        for name in ("identity", "about"):
            object.__setattr__(
                self, name, json.loads(json.dumps(getattr(self, name), allow_nan=False))
            )

    @property
    def digest(self) -> str:
        """The sha256 (hex) of everything but ``num_views``, which may grow, and ``about``."""
        text = json.dumps(
            {**self._compared(), "format": FORMAT},
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _compared(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("num_samples", "part_size")}
        return {
            "identity": self.identity,
            "layout": json.loads(json.dumps(self.layout.to_json())),
            **sizes,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, `from_json` reads it."""
        return {
            "kind": _KIND,
            "format": FORMAT,
            **self._compared(),
            "num_views": self.num_views,
            "about": self.about,
        }

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "Manifest":
        """The manifest `to_json` made; ``DataError`` when a number is not possible, ``KeyError``
        when one is not there.
        """
        try:
            return cls(
                identity=dict(body["identity"]),
                layout=Layout.from_json(body["layout"]),
                num_samples=int(body["num_samples"]),
                num_views=int(body["num_views"]),
                part_size=int(body["part_size"]),
                about=dict(body["about"]),
            )
        except ConfigError as error:
            raise DataError(str(error)) from error


def differences(
    ours: Manifest, theirs: Manifest, *, here: str = "here", there: str = "in the store"
) -> list[str]:
    """One phrase for each field in which the store's manifest (``theirs``) is not as ``ours``;
    views and ``about`` are not compared.
    """
    mine, found = (_flat(manifest._compared()) for manifest in (ours, theirs))
    return [
        f"{name} is {_brief(found, name)} {there} and {_brief(mine, name)} {here}"
        for name in dict.fromkeys([*mine, *found])
        if (name in mine) != (name in found) or _text(mine[name]) != _text(found[name])
    ]


def _flat(body: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names; ``identity`` is left out of them."""
    found: dict[str, Any] = {}
    for key, value in body.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, prefix if not prefix and key == "identity" else f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _brief(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        return "absent"
    text = _text(fields[name])
    return (
        text
        if len(text) <= 80
        else f"{text[:60]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
    )


# -- parts ----------------------------------------------------------------------------------------


class _Part:
    """A part's file, mapped into memory; a block's checksum is compared when it is first touched.

    Attributes:
        records: one opaque item a record; None while the file is not mapped.
        crcs: the crc32 of every block.
    """

    def __init__(self, path: Path, manifest: Manifest, digest: str, view: int, part: int) -> None:
        """Map the file and check its footer; ``FileNotFoundError`` when there is none,
        ``DataError`` when it is not that part.
        """
        self.path = path
        item = manifest.layout.record_bytes
        lo = part * manifest.part_size
        hi = min(lo + manifest.part_size, manifest.num_samples)
        data, self._file = _mapped(path)
        size = len(data)
        if size < _TRAILER.size:
            raise self._damaged(f"it has {size} bytes and no footer")
        length, crc, magic = _TRAILER.unpack(data[size - _TRAILER.size :])
        if magic != _MAGIC:
            raise self._damaged("it does not end as a part ends, so it was cut or overwritten")
        start = size - _TRAILER.size - length
        text = data[max(start, 0) : size - _TRAILER.size]
        if start < 0 or zlib.crc32(text) != crc:
            raise self._damaged("its footer does not match its checksum")
        footer = json.loads(text)
        if footer["format"] != FORMAT:
            raise DataError(
                f"{printable(path)} has format {footer['format']} and this version reads format"
                f" {FORMAT}; use the version of vitdistill that wrote it."
            )
        if footer["store"] != digest:
            raise DataError(
                f"{printable(path)} is a part of another store (with other labels, or of other"
                f" sizes); {_REMEDY}."
            )
        if (footer["view"], footer["part"]) != (view, part):
            raise DataError(
                f"{printable(path)} is part {footer['part']} of view {footer['view']} under another"
                f" name; {_REMEDY}."
            )
        self._block: int = footer["block"]
        self.crcs: list[int] = footer["crc32"]
        expected = (lo, hi, item, -(-(hi - lo) // self._block))
        if (footer["lo"], footer["hi"], footer["item"], len(self.crcs)) != expected or start != (
            hi - lo
        ) * item:
            raise self._damaged(
                f"it has {start} bytes of records and {(hi - lo) * item} belong to samples {lo} to"
                f" {hi - 1}"
            )
        self._shape = (hi - lo, item)
        self._map(data)
        self._checked = np.zeros(len(self.crcs), dtype=bool)
        self._unchecked = len(self.crcs)

    def _damaged(self, how: str) -> DataError:
        return DataError(f"{printable(self.path)} is damaged: {how}; {_REMEDY}.")

    def _map(self, data: mmap.mmap) -> None:
        count, item = self._shape
        self.records: npt.NDArray[Any] | None = np.frombuffer(
            data, dtype=np.dtype((np.void, item)), count=count
        )

    def unmap(self) -> None:
        """Let the file go; what was checked stays known."""
        self.records = None

    def mapped_again(self) -> bool:
        """Map the file if it is not; False when it is not the one that was checked."""
        if self.records is None:
            data, file = _mapped(self.path)
            if file != self._file:
                return False
            self._map(data)
        return True

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The records at these places of the part; ``DataError`` when a block of theirs is
        damaged.
        """
        records = self.records
        assert records is not None
        if self._unchecked:
            self._check(records, np.unique(rows // self._block))
        return records.take(rows)

    def _check(self, records: npt.NDArray[Any], blocks: npt.NDArray[np.int64]) -> None:
        for block in blocks[~self._checked[blocks]].tolist():
            if (
                zlib.crc32(records[block * self._block : (block + 1) * self._block].data)
                != self.crcs[block]
            ):
                first, last = block * self._block, min((block + 1) * self._block, len(records)) - 1
                raise self._damaged(
                    f"block {block} (records {first} to {last} of the part) does not match its"
                    " checksum"
                )
            self._checked[block] = True
        self._unchecked = int(len(self.crcs) - self._checked.sum())

    def checked(self) -> npt.NDArray[Any]:
        """All records, every block compared with its checksum now."""
        records = self.records
        assert records is not None
        self._checked[:] = False
        self._check(records, np.arange(len(self.crcs)))
        return records


def _mapped(path: Path) -> tuple[mmap.mmap, tuple[int, ...]]:
    """The file's memory map, and which file it is; its times too, as a new file may get the number
    of a deleted one.
    """
    with disk_errors(path):
        try:
            with open(path, "rb") as file:
                found = os.fstat(file.fileno())
                if not found.st_size:
                    raise DataError(f"{printable(path)} is damaged: it is empty; {_REMEDY}.")
                which = (
                    found.st_dev,
                    found.st_ino,
                    found.st_size,
                    found.st_mtime_ns,
                    found.st_ctime_ns,
                )
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), which
        except (FileNotFoundError, NotADirectoryError):
            pass
        except IsADirectoryError:
            raise DataError(f"{printable(path)} is damaged: it is a folder; {_REMEDY}.") from None
    raise FileNotFoundError(path)


def _footer(digest: str, view: int, part: int, lo: int, records: npt.NDArray[Any]) -> bytes:
    item = records.dtype.itemsize
    block = max(1, min(_BLOCK_RECORDS, _BLOCK_BYTES // item))
    body = {
        "format": FORMAT,
        "store": digest,
        "view": view,
        "part": part,
        "lo": lo,
        "hi": lo + len(records),
        "item": item,
        "block": block,
        "crc32": [
            zlib.crc32(records[start : start + block].data)
            for start in range(0, len(records), block)
        ],
    }
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return text + _TRAILER.pack(len(text), zlib.crc32(text), _MAGIC)


# -- store ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lease:
    """Who is writing a part, as its lease file says; empty and 0 when that cannot be read."""

    view: int
    part: int
    host: str
    pid: int


@dataclass(frozen=True)
class Status:
    """How far a store is.

    Attributes:
        views: views of every sample.
        parts: parts of all views.
        sealed: parts that are there.
        records: records in them.
        bytes: size of their files.
        writing: parts that somebody has claimed to write.
    """

    views: int
    parts: int
    sealed: int
    records: int
    bytes: int
    writing: list[Lease]


class LabelStore:
    """One teacher's answers; made by `create` and `open`.

    May be used in forked and spawned processes: each maps the files anew.

    Attributes:
        path: the teacher's folder.
        manifest: what the store holds.
        digest: of the manifest.
        layout: what a record holds.
        num_parts: parts of a view.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest, self.layout, self.digest = (
            path,
            manifest,
            manifest.layout,
            manifest.digest,
        )
        self.num_parts = -(-manifest.num_samples // manifest.part_size)
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._parts: dict[tuple[int, int], _Part] = {}
        self._maps: dict[tuple[int, int], _Part] = {}  # those whose file is open, oldest use first
        # A map holds a file descriptor, of which a process has few.
        self._most_maps = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"LabelStore({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | os.PathLike[str], manifest: Manifest) -> "LabelStore":
        """Make an empty store, or open the one that is there if its manifest is equal; one of fewer
        views is made to have as many.

        Raises:
            DataError: the store there has another manifest (the differing fields are named), or a
                damaged one.
            ConfigError: the folder holds something else.
            DiskError: it cannot be written.
        """
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            with disk_errors(folder):
                found = sorted(os.listdir(folder)) if folder.is_dir() else []
            if found and MANIFEST not in found:  # another process may have made it since
                raise ConfigError(
                    f"the output {printable(folder)} is not empty ({printable(found[0])} is in it)"
                    " and holds no labels: name another folder"
                )
            if not found:
                cls._make(folder, manifest)
        store = cls(folder, _read_manifest(folder))
        lines = differences(manifest, store.manifest)
        if lines:
            more = f", and {len(lines) - 5} more" if len(lines) > 5 else ""
            remedy = "name another folder, or delete this one"
            if any(line.startswith("images.fingerprint ") for line in lines):
                remedy = (
                    "give the very files that were labelled (one that was repaired or replaced is"
                    f" another), {remedy}"
                )
            raise DataError(
                f"{printable(folder)} holds labels of something else"
                f" ({'; '.join(lines[:5])}{more}): {remedy}."
            )
        return (
            store
            if store.manifest.num_views >= manifest.num_views
            else cls(folder, _grown(folder, manifest.num_views))
        )

    @staticmethod
    def _make(folder: Path, manifest: Manifest) -> None:
        try:
            with staged_dir(folder) as temp:
                write_manifest(temp, {}, manifest.to_json())
        except DiskError:
            # Another process may have made it first.
            if not (folder / MANIFEST).is_file():
                raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "LabelStore":
        """Open a teacher's folder, or a folder with exactly one teacher's folder in it; parts that
        appear later are found.

        Raises:
            DataError: there is no store, or its manifest is damaged or of another format.
            ConfigError: there are several teachers' folders.
        """
        folder = Path(path)
        if not (folder / MANIFEST).exists():
            with disk_errors(folder):
                inner = (
                    sorted(entry.parent for entry in folder.glob(f"[!.]*/{MANIFEST}"))
                    if folder.is_dir()
                    else []
                )
            if len(inner) > 1:
                names = ", ".join(printable(entry.name) for entry in inner)
                raise ConfigError(
                    f"{printable(folder)} holds the labels of several teachers ({names}): name one"
                    " of these folders"
                )
            if not inner:
                raise DataError(
                    f"{printable(folder)} holds no labels: write them with 'vitdistill label', or"
                    " name the folder they are in."
                )
            folder = inner[0]
        return cls(folder, _read_manifest(folder))

    # -- where what is --

    def part_range(self, part: int) -> tuple[int, int]:
        """The samples of a part: from the first, up to and without the second."""
        lo = part * self.manifest.part_size
        return lo, min(lo + self.manifest.part_size, self.manifest.num_samples)

    def view_path(self, view: int) -> Path:
        """The folder of a view."""
        return self.path / f"view-{view:05d}"

    def part_path(self, view: int, part: int) -> Path:
        """The file of a part."""
        return self.view_path(view) / f"part-{part:05d}.bin"

    def lease_path(self, view: int, part: int) -> Path:
        """The file that says who writes a part."""
        return self.view_path(view) / f"part-{part:05d}.lease"

    def is_sealed(self, view: int, part: int) -> bool:
        """Whether the part is there."""
        return self.part_path(view, part).exists()

    def missing_parts(self) -> Iterator[tuple[int, int]]:
        """The (view, part) that are not there, in order."""
        for view in range(self.manifest.num_views):
            sealed = self.part_files(view, "bin")
            yield from ((view, part) for part in range(self.num_parts) if part not in sealed)

    def part_files(self, view: int, suffix: Literal["bin", "lease"]) -> dict[int, Path]:
        """The parts of a view that are there (``bin``), or that somebody has claimed to write
        (``lease``), and their files.
        """
        folder = self.view_path(view)
        with disk_errors(folder):
            names = os.listdir(folder) if folder.is_dir() else []
        matches = [
            match for name in names if (match := _PART_NAME.fullmatch(name)) and match[2] == suffix
        ]
        found = {int(match[1]): folder / match[0] for match in matches}
        return {
            part: found[part]
            for part in sorted(found)
            if part < self.num_parts and found[part].name == f"part-{part:05d}.{suffix}"
        }

    # -- reading --

    def records(self, view: int, sample_ids: Ids) -> Targets:
        """The answers about these samples of one view; ``DataError`` for the first that is not
        there, or when a part is damaged.
        """
        ids = _whole(sample_ids)
        records, present = self.read(np.full(len(ids), view, dtype=np.int64), ids)
        if not present.all():
            raise self.missing(view, int(ids[~present][0]))
        return self.layout.targets(records)

    def missing(self, view: int, sample: int) -> DataError:
        """The error that says that this record is not there."""
        name = self.part_path(view, sample // self.manifest.part_size).relative_to(self.path)
        return DataError(
            f"{printable(self.path)} has no record of sample {sample} in view {view}: {name} is not"
            " written yet; run 'vitdistill label' again, which writes what is missing."
        )

    def read(self, views: Ids, sample_ids: Ids) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """The records of (view, sample) pairs, shape (B,), and which of them are there; the others
        are zeros.

        Raises:
            DataError: an id or a view is outside of the store; a part is damaged or foreign.
        """
        at, ids = _whole(views), _whole(sample_ids)
        if at.shape != ids.shape:
            raise ValueError(f"{len(at)} views for {len(ids)} samples")
        self._check_range("sample", ids, self.manifest.num_samples)
        self._check_range("view", at, self.manifest.num_views)
        raw = np.zeros(len(ids), dtype=np.dtype((np.void, self.layout.record_bytes)))
        present = np.zeros(len(ids), dtype=bool)
        places = at * self.num_parts + ids // self.manifest.part_size
        order = np.argsort(places, kind="stable")
        ranked = places[order]
        rows = ids[order] % self.manifest.part_size
        edges = np.flatnonzero(np.diff(ranked, prepend=-1, append=-1)).tolist()
        for start, end in pairwise(edges):
            part = self._part(*divmod(int(ranked[start]), self.num_parts))
            if part is not None:
                raw[order[start:end]] = part.take(rows[start:end])
                present[order[start:end]] = True
        return raw.view(self.layout.dtype), present

    def _check_range(self, what: str, values: npt.NDArray[np.int64], count: int) -> None:
        if len(values) and (values.min() < 0 or values.max() >= count):
            wrong = values[(values < 0) | (values >= count)][0]
            raise DataError(
                f"{printable(self.path)} has no {what} {wrong}: its {what}s are 0 to {count - 1}."
            )

    def _part(self, view: int, part: int) -> _Part | None:
        """The open part, or None when it is not there."""
        if self._pid != os.getpid():
            self._forget()
        key = (view, part)
        found = self._parts.get(key)
        if found is None or found.records is None:
            try:
                if found is None or not found.mapped_again():
                    found = self.load(view, part)
            except FileNotFoundError:
                self._parts.pop(key, None)
                return None
            self._parts[key] = found
            for old in list(self._maps)[: len(self._maps) + 1 - self._most_maps]:
                if (stale := self._maps.pop(old, None)) is not None:
                    stale.unmap()
            self._maps[key] = found
        elif len(self._maps) == self._most_maps:
            self._maps[key] = self._maps.pop(key, found)
        return found

    def load(self, view: int, part: int) -> _Part:
        """A part opened anew, its footer checked; ``FileNotFoundError`` when it is not there,
        ``DataError`` when it is damaged.
        """
        return _Part(self.part_path(view, part), self.manifest, self.digest, view, part)

    # -- writing --

    def seal(self, view: int, part: int, records: npt.NDArray[Any]) -> bool:
        """Write a part, whole and for good; False when another writer was first, whose part stays.

        Raises:
            ValueError: the records are not of the layout, or not as many as the part has samples.
            DiskError: there is no room; then the store is as it was.
        """
        if not (0 <= view < self.manifest.num_views and 0 <= part < self.num_parts):
            raise ValueError(f"{self.path} has no part {part} of view {view}")
        lo, hi = self.part_range(part)
        if records.dtype != self.layout.dtype or records.shape != (hi - lo,):
            raise ValueError(
                f"part {part} has {hi - lo} records of {self.layout.dtype}, not {records.shape} of"
                f" {records.dtype}"
            )
        path = self.part_path(view, part)
        if path.exists():
            return False
        raw = np.ascontiguousarray(records).view(np.dtype((np.void, self.layout.record_bytes)))
        footer = _footer(self.digest, view, part, lo, raw)
        return put(path, [raw.data, footer])

    # -- looking after it --

    def status(self) -> Status:
        """How far the store is; reads names and sizes only."""
        sealed = records = size = 0
        writing = []
        for view in range(self.manifest.num_views):
            done = self.part_files(view, "bin")
            for part, path in done.items():
                lo, hi = self.part_range(part)
                sealed, records, size = sealed + 1, records + hi - lo, size + path.stat().st_size
            writing += [
                _read_lease(view, part, path)
                for part, path in self.part_files(view, "lease").items()
                if part not in done
            ]
        return Status(
            self.manifest.num_views,
            self.manifest.num_views * self.num_parts,
            sealed,
            records,
            size,
            writing,
        )

    def verify(self, say: Callable[[str], None] | None = None) -> list[str]:
        """Read every part anew and return one sentence for each damaged or foreign file; what is
        not written yet is no damage.

        ``say`` is given a line for each view, and how much of the store is there at the end.
        """
        wrong: list[str] = []
        good = records = 0
        with disk_errors(self.path):
            entries = sorted(entry for entry in self.path.iterdir() if entry.name != MANIFEST)
        for entry in entries:
            match = _VIEW_NAME.fullmatch(entry.name)
            view = int(match[1]) if match else -1
            if (
                not 0 <= view < self.manifest.num_views
                or entry != self.view_path(view)
                or not entry.is_dir()
            ):
                wrong += _foreign(entry)
                continue
            before = good
            parts = {path: part for part, path in self.part_files(view, "bin").items()}
            leases = set(self.part_files(view, "lease").values())
            for path in sorted(entry.iterdir()):
                if path not in parts:
                    wrong += _foreign(path) if path not in leases else []
                    continue
                try:
                    records += len(self.load(view, parts[path]).checked())
                    good += 1
                except FileNotFoundError:
                    continue
                except DataError as error:
                    wrong.append(str(error))
            if say is not None:
                say(f"view {view}: {good - before} of {self.num_parts} parts are intact")
        if say is not None:
            total = self.manifest.num_views * self.manifest.num_samples
            say(
                f"{good} of {self.manifest.num_views * self.num_parts} parts are intact: {records}"
                f" of {total} records"
            )
        return wrong


def put(path: Path, pieces: Sequence[Any]) -> bool:
    """Write a file of these bytes-like pieces under a new name; False when the name is taken."""
    return write_first(path, lambda file: file.writelines(pieces))


def _foreign(path: Path) -> list[str]:
    """Hidden files are unfinished ones, or the operating system's."""
    return (
        []
        if path.name.startswith(".")
        else [f"{printable(path)} is not a file of this store; move it elsewhere."]
    )


def _read_manifest(folder: Path) -> Manifest:
    path = printable(folder / MANIFEST)
    try:
        body = read_manifest(folder)["identity"]
    except DataError as error:
        raise DataError(
            f"{str(error).rstrip('.')}; restore it, or delete {printable(folder)} and label again."
        ) from None
    if body.get("kind") != _KIND:
        raise DataError(
            f"{printable(folder)} holds no labels: {path} is the manifest of something else."
        )
    if body.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {body.get('format')} and this version reads format {FORMAT}; use"
            " the version of vitdistill that wrote it."
        )
    try:
        return Manifest.from_json(body)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not what this version writes ({error!r}); use the version of vitdistill"
            " that wrote it."
        ) from None


def _grown(folder: Path, num_views: int) -> Manifest:
    """The store's manifest with at least so many views, written."""
    with wait_lock(folder / LOCK):
        manifest = _read_manifest(folder)  # another process may have been faster
        if manifest.num_views < num_views:
            manifest = replace(manifest, num_views=num_views)
            replace_manifest(folder, {}, manifest.to_json())
    return manifest


def _read_lease(view: int, part: int, path: Path) -> Lease:
    try:
        body = json.loads(path.read_bytes())
        return Lease(view, part, str(body["host"]), int(body["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Lease(view, part, "", 0)


def _whole(values: Ids) -> npt.NDArray[np.int64]:
    """Whole numbers as an int64 array of shape (B,)."""
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise TypeError(
            f"whole numbers are needed in one dimension, not {found.dtype} of shape {found.shape}"
        )
    return found.astype(np.int64)
