"""Stores made of other stores: several united, or one made smaller."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import ConfigError, DataError
from ..messages import printable
from ..storage.atomic import require_free
from .encoding import Layout
from .store import LabelStore, Manifest, differences


def merge(
    sources: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    say: Callable[[str], None] | None = None,
) -> LabelStore:
    """Unite the parts of stores of the same answers in ``target``, which is made, or has parts
    already.

    Every part is compared with its checksums on the way. What is copied stays when this is stopped;
    running again copies the rest.

    Raises:
        ConfigError: no source is named.
        DataError: the stores are not of the same answers (the differing fields are named), a part
            is damaged, or two stores have different records in a part. Then nothing of that part is
            written; parts that differ are found before anything is.
        DiskError: there is no room.
    """
    if not sources:
        raise ConfigError("there is nothing to merge: name the stores to unite")
    stores = [LabelStore.open(path) for path in sources]
    for store in stores[1:]:
        lines = differences(
            stores[0].manifest, store.manifest, here="in the latter", there="in the former"
        )
        if lines:
            both = f"{printable(store.path)} and {printable(stores[0].path)}"
            raise DataError(
                f"{both} hold labels of different things and cannot be merged"
                f" ({'; '.join(lines[:5])}); leave one of them out."
            )
    num_views = max(store.manifest.num_views for store in stores)
    united = LabelStore.create(target, replace(stores[0].manifest, num_views=num_views))
    origin: dict[tuple[int, int], LabelStore] = {}
    for store in [united, *stores]:
        for place in _sealed(store):
            first = origin.setdefault(place, store)
            if first is not store and first.load(*place).crcs != store.load(*place).crcs:
                raise _conflict(first, store, place)
    todo = {
        place: store
        for place, store in sorted(origin.items())
        if store is not united and not united.is_sealed(*place)
    }
    require_free(
        united.path, sum(store.part_path(*place).stat().st_size for place, store in todo.items())
    )
    for number, (place, store) in enumerate(todo.items(), 1):
        records = store.load(*place).checked()
        if (
            not united.seal(*place, records.view(store.layout.dtype))
            and united.load(*place).crcs != store.load(*place).crcs
        ):
            raise _conflict(united, store, place)
        if say is not None:
            say(f"{number} of {len(todo)} parts copied: {printable(store.part_path(*place))}")
    return united


def _conflict(first: LabelStore, second: LabelStore, place: tuple[int, int]) -> DataError:
    return DataError(
        f"{printable(first.part_path(*place))} and {printable(second.part_path(*place))} hold"
        " different records of the same samples: delete the wrong one ('vitdistill label check'"
        " compares records with the teacher's answers)."
    )


def _sealed(store: LabelStore) -> list[tuple[int, int]]:
    return [
        (view, part)
        for view in range(store.manifest.num_views)
        for part in store.part_files(view, "bin")
    ]


def prune(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    num_views: int | None = None,
    k: int | None = None,
    layout: Layout | None = None,
    say: Callable[[str], None] | None = None,
) -> LabelStore:
    """Write a smaller store of the same answers: the first ``num_views`` views, ``k`` classes a
    record, or another ``layout``.

    Parts that the source lacks are missing in the target too. What is written stays when this is
    stopped; running again writes the rest.

    Raises:
        ConfigError: nothing would become smaller, or the source does not hold what is asked for.
        DataError: a part is damaged, or the target holds other labels.
        DiskError: there is no room.
    """
    store = LabelStore.open(source)
    ours = store.manifest
    if k is not None and layout is not None:
        raise ConfigError("k and layout both say what a record shall hold: give one of them")
    if num_views is None and k is None and layout is None:
        raise ConfigError("nothing would become smaller: name a number of views, k or an encoding")
    views = ours.num_views if num_views is None else num_views
    if not 1 <= views <= ours.num_views:
        raise ConfigError(
            f"{printable(store.path)} has {ours.num_views} views, of which {views} cannot be kept:"
            f" choose 1 to {ours.num_views}"
        )
    smaller = layout if layout is not None else ours.layout if k is None else ours.layout.prune(k)
    ours.layout.check_convertible(smaller)
    about = {
        **ours.about,
        "pruned_from": {"num_views": ours.num_views, "layout": ours.layout.to_json()},
    }
    pruned = LabelStore.create(
        target,
        Manifest(
            identity=ours.identity,
            layout=smaller,
            num_samples=ours.num_samples,
            num_views=views,
            part_size=ours.part_size,
            about=about,
        ),
    )
    todo = [place for place in _sealed(store) if place[0] < views and not pruned.is_sealed(*place)]
    for number, (view, part) in enumerate(todo, 1):
        records = store.load(view, part).checked().view(ours.layout.dtype)
        pruned.seal(
            view, part, records if smaller == ours.layout else ours.layout.convert(records, smaller)
        )
        if say is not None:
            say(f"{number} of {len(todo)} parts written: {printable(pruned.part_path(view, part))}")
    return pruned
