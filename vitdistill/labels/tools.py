"""Stores made of other stores: several united, or one made smaller."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import ConfigError, DataError, Give
from ..messages import plural, printable
from ..storage.atomic import require_free
from .encoding import LogitEncoding
from .store import LabelStore, differences


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
    encoding: LogitEncoding | None = None,
    say: Callable[[str], None] | None = None,
) -> LabelStore:
    """Write a smaller store of the same answers: the first ``num_views`` views, and logits in
    another ``encoding``.

    Parts that the source lacks are missing in the target too. What is written stays when this is
    stopped; running again writes the rest.

    Raises:
        ConfigError: nothing would become smaller, or the source does not hold what is asked for.
        DataError: a part is damaged, or the target holds other labels.
        DiskError: there is no room.
    """
    store = LabelStore.open(source)
    manifest = store.manifest
    if num_views is None and encoding is None:
        raise ConfigError("nothing would become smaller", (Give("views"), Give("k")))
    views = manifest.num_views if num_views is None else num_views
    if not 1 <= views <= manifest.num_views:
        raise ConfigError(
            f"{printable(store.path)} has {plural(manifest.num_views, 'view')}, of which {views}"
            " cannot be kept",
            Give("views"),
            field="views",
        )
    layout = manifest.layout if encoding is None else manifest.layout.with_logits(encoding)
    was = {"num_views": manifest.num_views, "layout": manifest.layout.to_json()}
    about = {**manifest.about, "pruned_from": was}
    pruned = LabelStore.create(
        target, replace(manifest, layout=layout, num_views=views, about=about)
    )
    todo = [place for place in _sealed(store) if place[0] < views and not pruned.is_sealed(*place)]
    for number, (view, part) in enumerate(todo, 1):
        records = store.load(view, part).checked().view(manifest.layout.dtype)
        if encoding is not None:
            records = manifest.layout.convert(records, encoding)
        pruned.seal(view, part, records)
        if say is not None:
            say(f"{number} of {len(todo)} parts written: {printable(pruned.part_path(view, part))}")
    return pruned
