"""Any number of processes on any number of hosts write the missing parts of stores together.

A writer claims a (view, part) by a lease file beside it, which it keeps changing while it works,
makes the records, seals them and removes the lease. Leases only save work that would be done twice:
sealing is first-wins, so every part is written once, whatever happens to them. No clock of another
host and no time of a file is ever looked at.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..errors import ConfigError, UserError
from ..messages import printable
from ..storage import processes
from ..storage.atomic import disk_errors, write_atomic, write_first
from ..storage.lock import LOCK, wait_lock
from .store import LabelStore

_POLL_S, _BEAT_S = (0.2, 2.0), 5.0  # from the shortest to the longest


@dataclass(frozen=True)
class Unit:
    """A part to be made.

    Attributes:
        view, part: which.
        lo, hi: its samples: ``lo`` to ``hi - 1``.
        stores: those that lack it, in the order of ``write_missing``'s.
        beat: to be called between the batches; it tells the other writers that this one is at work.
    """

    view: int
    part: int
    lo: int
    hi: int
    stores: tuple[LabelStore, ...]
    beat: Callable[[], None]


Make = Callable[[Unit], Sequence[npt.NDArray[Any]] | None]


def write_missing(
    stores: Sequence[LabelStore],
    make: Make,
    *,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
    patience_s: float = 60.0,
) -> int:
    """Write what is missing in these stores, together with whoever else does, and return how many
    parts this process sealed.

    ``make`` returns one array of records for each of the unit's stores, or None to give the unit up
    because it was asked to stop. ``stop`` is asked before every unit and while waiting; without it,
    the function ends when every part is there, whoever wrote it. ``progress`` is told how many of
    the (view, part) are there, and of how many. A claim of a dead process of this host is taken
    over at once, any other when it has not changed for ``patience_s`` seconds of this process's own
    watching.

    Raises:
        ConfigError: the stores are not equal in samples, views and part size.
        DiskError: a part cannot be written; what is sealed stays, and running again writes the
            rest.
    """
    if (
        len({(s.manifest.num_samples, s.manifest.num_views, s.manifest.part_size) for s in stores})
        > 1
    ):
        names = ", ".join(printable(store.path) for store in stores)
        raise ConfigError(
            f"the stores {names} differ in samples, views or part size and cannot be written"
            " together: label one at a time"
        )
    claims = _Claims(patience_s)
    total = stores[0].manifest.num_views * stores[0].num_parts if stores else 0
    pending = sorted({place for store in stores for place in store.missing_parts()})
    _clean(stores)
    sealed, waited = 0, 0.0
    while pending and not (stop is not None and stop()):
        if progress is not None:
            progress(total - len(pending), total)
        left: list[tuple[int, int]] = []
        worked = False
        for index, (view, part) in enumerate(pending):
            if stop is not None and stop():
                return sealed
            lacking = [store for store in stores if not store.is_sealed(view, part)]
            if lacking and claims.take([store.lease_path(view, part) for store in lacking]):
                try:
                    # Its last writer may have sealed it and gone since we looked.
                    lacking = [store for store in lacking if not store.is_sealed(view, part)]
                    if lacking:
                        lo, hi = lacking[0].part_range(part)
                        made = make(Unit(view, part, lo, hi, tuple(lacking), claims.beat))
                        if made is None:
                            return sealed
                        for store, records in zip(lacking, made, strict=True):
                            sealed += store.seal(view, part, records)
                        worked = True
                        if progress is not None:
                            progress(total - len(left) - len(pending) + index + 1, total)
                finally:
                    claims.release()
            elif lacking:
                left.append((view, part))
        pending = left
        waited = 0.0 if worked else min(max(2 * waited, _POLL_S[0]), _POLL_S[1])
        if pending and waited:
            time.sleep(waited)
    if not pending:
        _clean(stores)
        if progress is not None:
            progress(total, total)
    return sealed


def _clean(stores: Iterable[LabelStore]) -> None:
    """Remove what killed writers of this host left: unfinished files, and leases of parts that are
    there.
    """
    for store in stores:
        for view in range(store.manifest.num_views):
            # Nothing depends on it, and another writer may be doing the same.
            with suppress(UserError, OSError):
                for part, lease in store.part_files(view, "lease").items():
                    if store.is_sealed(view, part):
                        lease.unlink(missing_ok=True)


class _Claims:
    """The leases of the unit this process works on, and what it has seen of those of others."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._beat_s = min(_BEAT_S, patience_s / 4)
        self._held: dict[Path, bytes] = {}
        self._seen: dict[Path, tuple[bytes, float]] = {}
        self._count = 0
        self._last = 0.0

    def take(self, paths: Sequence[Path]) -> bool:
        """Claim all of these, or none and return False."""
        self._last = time.monotonic()
        for path in paths:
            mine = self._mine()
            if not self._claim(path, mine):
                self.release()
                return False
            self._held[path] = mine
        return True

    def _mine(self) -> bytes:
        self._count += 1
        return json.dumps(
            {**processes.this_process(), "beat": self._count, "token": secrets.token_hex(6)}
        ).encode()

    def _claim(self, path: Path, mine: bytes) -> bool:
        theirs = _content(path)
        if theirs is None:
            return write_first(path, mine)
        if not self._is_over(path, theirs):
            return False
        # One of those who see that it is over removes it: another may have taken it over already.
        with wait_lock(path.parent / LOCK), disk_errors(path):
            if _content(path) == theirs:
                path.unlink(missing_ok=True)
        return write_first(path, mine)

    def _is_over(self, path: Path, theirs: bytes) -> bool:
        now = time.monotonic()
        if path not in self._seen or self._seen[path][0] != theirs:
            self._seen[path] = (theirs, now)
        return _is_dead(theirs) or now - self._seen[path][1] >= self._patience_s

    def beat(self) -> None:
        """Change the leases, now and then, if they are still this process's."""
        if time.monotonic() - self._last < self._beat_s:
            return
        for path, content in list(self._held.items()):
            if _content(path) == content:
                self._held[path] = self._mine()
                write_atomic(path, self._held[path])
        self._last = time.monotonic()

    def release(self) -> None:
        """Remove the leases that are still this process's."""
        while self._held:
            path, content = self._held.popitem()
            with suppress(OSError):
                if path.read_bytes() == content:
                    path.unlink()


def _content(path: Path) -> bytes | None:
    with disk_errors(path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def _is_dead(lease: bytes) -> bool:
    """Whether a lease is of a process that is gone for certain."""
    try:
        return processes.is_dead(json.loads(lease))
    except (ValueError, KeyError, TypeError):
        return False
