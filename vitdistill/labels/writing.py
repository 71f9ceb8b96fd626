"""Any number of processes write the missing parts of stores together.

A writer locks a part, makes the records, seals the part and releases the lock. Locks only save work
that would be done twice: sealing is first-wins, on a disk without locks too.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain

from ..errors import UserError
from ..storage.atomic import make_dirs, remove_temporaries
from ..storage.lock import try_lock
from .layout import Records
from .store import LabelStore

_POLL_S = 0.2
# A temporary this old is a killed writer's. A younger one may be a live writer's, of a part sealed
# by now, on a disk without locks: removing it would fail that write.
_ABANDONED_S = 3600.0


@dataclass(frozen=True)
class Unit:
    """A part to be made, samples ``lo`` to ``hi - 1`` of a view, for the stores that lack it."""

    view: int
    part: int
    lo: int
    hi: int
    stores: tuple[LabelStore, ...]


Make = Callable[[Unit], Sequence[Records] | None]
"""Returns an array of records for each store of a unit; None to give the unit up."""


def write_missing(
    stores: Sequence[LabelStore],
    make: Make,
    *,
    rank: int = 0,
    world_size: int = 1,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write what is missing in these stores of equal shape; return how many parts were sealed.

    The processes of one run divide the parts by rank, and each helps the others when its own are
    done. A part that another process has locked is left to it. Returns when all exist, whoever
    wrote them, or when ``make`` returns None or ``stop`` True (asked before every part and while
    waiting for others). ``progress`` gets the number of (view, part) that exist, and the total.
    """
    places = sorted(set(chain.from_iterable(store.missing_parts() for store in stores)))
    pending = places[rank::world_size]
    pending += [place for place in places if place not in set(pending)]
    total = stores[0].manifest.num_views * stores[0].num_parts if stores else 0
    sealed = 0
    while pending:
        left: list[tuple[int, int]] = []
        for number, place in enumerate(pending):
            progress(total - len(left) - len(pending) + number, total)
            if stop():
                return sealed
            with _lacking(stores, place) as lacking:
                if lacking is None:
                    left.append(place)
                elif lacking:
                    unit = Unit(*place, *lacking[0].manifest.part_range(place[1]), tuple(lacking))
                    made = make(unit)
                    if made is None:
                        return sealed
                    for store, records in zip(lacking, made, strict=True):
                        sealed += store.seal(*place, records)
        if len(left) == len(pending):  # nothing to do but to wait for the others
            time.sleep(_POLL_S)
        pending = left
    _clean(stores)
    progress(total, total)
    return sealed


@contextmanager
def _lacking(
    stores: Sequence[LabelStore], place: tuple[int, int]
) -> Iterator[Sequence[LabelStore] | None]:
    """Yield the stores that lack a part, locked for this process; None if another has a lock."""
    with ExitStack() as locks:
        lacking = [store for store in stores if not store.is_sealed(*place)]
        # In one order, so that no two processes hold what the other one needs.
        for part in sorted(store.part_path(*place) for store in lacking):
            make_dirs(part.parent)
            lock = try_lock(part.with_name(f".{part.stem}.lock"))
            if lock is None:
                yield None
                return
            locks.enter_context(lock)
        # Another writer may have sealed the part and left since we looked.
        yield [store for store in lacking if not store.is_sealed(*place)]


def _clean(stores: Sequence[LabelStore]) -> None:
    """Remove what killed writers left in stores that are whole."""
    for store in stores:
        for view in range(store.manifest.num_views):
            folder = store.view_path(view)
            with suppress(UserError, OSError):  # nothing depends on it
                remove_temporaries(folder, _ABANDONED_S)
                for path in folder.glob(".part-*.lock"):
                    path.unlink(missing_ok=True)
