"""A teacher's answers on disk: one fixed-size record for every (view, sample id), in sample order.

    labels/conv/manifest.json               whose answers these are, their layout and number
    labels/conv/view-00000/part-00000.bin   the records of some samples in that view

A part is written whole and put under its name at once, and the first writer wins: a part that can
be seen is complete. So any number of processes may write and read at once.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..data.augment import Augment
from ..errors import ConfigError, DataError, DiskError, Give
from ..keyed import I64
from ..messages import listed
from ..storage.atomic import disk_errors, staged_dir, write_atomic
from ..storage.manifest import MANIFEST, write_manifest
from .identity import augment_of
from .layout import Records, Targets
from .manifest import Manifest, read_store_manifest
from .part import Part, write_part

Ids = Sequence[int] | npt.NDArray[Any] | Tensor


@dataclass(frozen=True)
class Status:
    """How far a store is: the ``parts`` of all views, and those that are ``sealed``."""

    parts: int
    sealed: int
    records: int
    bytes: int


class LabelStore:
    """One teacher's answers in the folder ``path``; made by `create` and `open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.layout, self.num_parts = manifest.layout, manifest.num_parts
        self._parts: dict[tuple[int, int], Part] = {}  # those read from

    def __reduce__(self) -> tuple[Any, ...]:
        return LabelStore, (self.path, self.manifest)

    @classmethod
    def create(cls, path: str | os.PathLike[str], manifest: Manifest) -> "LabelStore":
        """Make an empty store, or open the existing one, with more views if ``manifest`` has more.

        `DataError` if it is damaged or of other labels, `ConfigError` if it is something else.
        """
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            with disk_errors(folder):
                found = sorted(os.listdir(folder)) if folder.is_dir() else []
            if found and MANIFEST not in found:  # another process may have made it since
                what = f"{folder} holds no labels, but {listed(found)}"
                raise ConfigError(what, Give("output"), field="output")
            if not found:
                _make(folder, manifest)
        there = read_store_manifest(folder)
        if different := there.differences(manifest, "in the store", "here"):
            what = f"{folder} holds labels of something else ({different})"
            fixes = Give("output"), "delete it, or give the very files that were labelled"
            raise DataError(what, fixes, field="output")
        if there.num_views < manifest.num_views:
            there = read_store_manifest(folder)  # another process may have been faster
            there = replace(there, num_views=max(there.num_views, manifest.num_views))
            write_manifest(folder, {}, there.to_json(), write_atomic)
        return cls(folder, there)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "LabelStore":
        """Open a teacher's folder, or a folder with exactly one teacher's folder in it."""
        folder = Path(path)
        if not (folder / MANIFEST).exists():
            with disk_errors(folder):
                inner = sorted(found.parent for found in folder.glob(f"[!.]*/{MANIFEST}"))
            if len(inner) > 1:
                what = f"{folder} holds the labels of several teachers"
                fix = f"name one of {', '.join(found.name for found in inner)}"
                raise ConfigError(what, fix, field="labels")
            if not inner:
                fix = "write them with 'vitdistill label', or name the folder they are in"
                what = f"there is no folder {folder}"
                if folder.is_dir():
                    what = f"{folder} holds no labels"
                raise DataError(what, fix, field="labels")
            folder = inner[0]
        return cls(folder, read_store_manifest(folder))

    # -- what is where --

    @property
    def augment(self) -> Augment:
        """How the labelled views were made."""
        return augment_of(self.manifest.identity)

    def view_path(self, view: int) -> Path:
        return self.path / f"view-{view:05d}"

    def part_path(self, view: int, part: int) -> Path:
        return self.view_path(view) / f"part-{part:05d}.bin"

    def is_sealed(self, view: int, part: int) -> bool:
        return self.part_path(view, part).exists()

    def sealed_parts(self) -> list[tuple[int, int]]:
        """Return the (view, part) that are there, in order."""
        places = []
        for view in range(self.manifest.num_views):
            names = set(self._names(view))  # list a folder once, not ask for each part
            parts = range(self.num_parts)
            places += [(view, i) for i in parts if self.part_path(view, i).name in names]
        return places

    def missing_parts(self) -> list[tuple[int, int]]:
        """Return the (view, part) that are not there, in order."""
        sealed, views = set(self.sealed_parts()), range(self.manifest.num_views)
        return [at for at in product(views, range(self.num_parts)) if at not in sealed]

    def _names(self, view: int) -> list[str]:
        folder = self.view_path(view)
        with disk_errors(folder):
            return sorted(os.listdir(folder)) if folder.is_dir() else []

    # -- reading --

    def records(self, view: int, sample_ids: Ids) -> Targets:
        """Return the answers about these samples in one view; `DataError` if one is missing."""
        ids = _whole(sample_ids)
        records, present = self.read(np.full_like(ids, view), ids)
        if not present.all():
            what = f"has no record of sample {ids[~present][0]} in view {view}"
            fix = "label again, which writes what is missing"
            raise DataError(f"{self.path} {what}", fix)
        return self.layout.targets(records)

    def read(self, views: Ids, sample_ids: Ids) -> tuple[Records, npt.NDArray[np.bool_]]:
        """Return the records of (view, sample) pairs, (B,), and which are there; others are zeros.

        `DataError` if an id or a view is outside of the store, or a part damaged or foreign.
        """
        at, ids = _whole(views), _whole(sample_ids)
        assert at.shape == ids.shape
        self._check_range("sample", ids, self.manifest.num_samples)
        self._check_range("view", at, self.manifest.num_views)
        raw = np.zeros(len(ids), dtype=np.dtype((np.void, self.layout.record_bytes)))
        present = np.zeros(len(ids), dtype=bool)
        parts, rows = np.divmod(ids, self.manifest.part_size)
        for place in sorted({*zip(at.tolist(), parts.tolist(), strict=True)}):
            asked = (at == place[0]) & (parts == place[1])
            with suppress(FileNotFoundError):
                if place not in self._parts:
                    self._parts[place] = self.load(*place)
                raw[asked] = self._parts[place].take(rows[asked])
                present[asked] = True
        return raw.view(self.layout.dtype), present

    def _check_range(self, what: str, values: I64, count: int) -> None:
        for wrong in values[(values < 0) | (values >= count)]:
            raise DataError(f"{self.path} has no {what} {wrong}, only 0 to {count - 1}")

    def load(self, view: int, part: int) -> Part:
        """Open a part anew and check its footer; `FileNotFoundError` if it is not there."""
        return Part(self.part_path(view, part), self.manifest, view, part)

    # -- writing and looking after --

    def seal(self, view: int, part: int, records: Records) -> bool:
        """Write a part, whole and for good; return False if another writer was first.

        After a `DiskError` the store is as it was.
        """
        lo, hi = self.manifest.part_range(part)
        assert 0 <= view < self.manifest.num_views and 0 <= lo < hi
        assert records.dtype == self.layout.dtype and records.shape == (hi - lo,)
        path = self.part_path(view, part)
        return not path.exists() and write_part(path, self.manifest, view, part, records)

    def status(self) -> Status:
        """Say how far the store is; reads names and sizes only."""
        sealed = self.sealed_parts()
        ranges = [self.manifest.part_range(part) for _, part in sealed]
        return Status(
            parts=self.manifest.num_views * self.num_parts,
            sealed=len(sealed),
            records=sum(hi - lo for lo, hi in ranges),
            bytes=sum(self.part_path(*place).stat().st_size for place in sealed),
        )

    def verify(self) -> list[str]:
        """Read every part anew and return a sentence for each file that is damaged or foreign.

        Missing parts are no damage. Hidden files are unfinished parts or the operating system's.
        """
        views = [self.view_path(view) for view in range(self.manifest.num_views)]
        with disk_errors(self.path):
            entries = sorted(entry for entry in self.path.iterdir() if entry.name[0] != ".")
        wrong = [_foreign(e) for e in entries if e not in views and e.name != MANIFEST]
        for view, folder in enumerate(views):
            parts = {self.part_path(view, part).name: part for part in range(self.num_parts)}
            for name in self._names(view):
                if name[0] == ".":
                    continue
                if name not in parts or not (folder / name).is_file():
                    wrong.append(_foreign(folder / name))
                    continue
                try:
                    self.load(view, parts[name]).read_all()
                except DataError as error:
                    wrong.append(str(error))
        return wrong


def _foreign(path: Path) -> str:
    return f"{path} is not a file of this store: move it elsewhere"


def _make(folder: Path, manifest: Manifest) -> None:
    try:
        with staged_dir(folder) as temp:
            write_manifest(temp, {}, manifest.to_json())
    except DiskError:
        if not (folder / MANIFEST).is_file():  # another process may have made it first
            raise


def _whole(values: Ids) -> I64:
    """Return whole numbers as an int64 array of shape (B,)."""
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise TypeError(f"{found.dtype} of shape {found.shape} are not whole numbers in a row")
    return found.astype(np.int64)
