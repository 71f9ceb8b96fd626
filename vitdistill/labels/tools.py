"""Stores made of other stores: several united, or one made smaller."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import ConfigError, DataError, Give
from ..messages import plural, printable
from ..storage.atomic import require_free
from .encoding import LogitEncoding
from .store import LabelStore


def merge(
    sources: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    say: Callable[[str], None] = lambda text: None,
) -> LabelStore:
    """Unite the parts of stores of the same answers in ``target``, which may have parts already.

    Every part is compared with its checksums on the way. What is copied stays when this is stopped;
    running again copies the rest.

    Raises:
        ConfigError: no source is named.
        DataError: the stores are not of the same answers (the differing fields are named), a part
            is damaged, or two stores have different records in a part. Parts that differ are found
            before anything is written.
        DiskError: there is no room.
    """
    if not sources:
        raise ConfigError("there is nothing to merge", Give("from"), field="from")
    stores = [LabelStore.open(path) for path in sources]
    first, *others = stores
    for store in others:
        lines = store.manifest.differences(first.manifest, "in the former", "in the latter")
        if lines:
            raise DataError(
                f"{printable(store.path)} and {printable(first.path)} hold labels of different"
                f" things ({'; '.join(lines[:5])})",
                "leave one of them out",
                field="from",
            )
    num_views = max(store.manifest.num_views for store in stores)
    united = LabelStore.create(target, replace(first.manifest, num_views=num_views))
    origin: dict[tuple[int, int], LabelStore] = {}
    for store in [united, *stores]:
        for place in _sealed(store):
            other = origin.setdefault(place, store)
            if other is not store and other.load(*place).crcs != store.load(*place).crcs:
                raise _conflict(other, store, place)
    todo = [(place, store) for place, store in sorted(origin.items()) if store is not united]
    require_free(united.path, sum(s.part_path(*place).stat().st_size for place, s in todo))
    for number, (place, store) in enumerate(todo, 1):
        records = store.load(*place).read_all().view(store.layout.dtype)
        sealed_by_another = not united.seal(*place, records)  # which was faster
        if sealed_by_another and united.load(*place).crcs != store.load(*place).crcs:
            raise _conflict(united, store, place)
        say(f"{number} of {len(todo)} parts copied: {printable(store.part_path(*place))}")
    return united


def _conflict(first: LabelStore, second: LabelStore, place: tuple[int, int]) -> DataError:
    return DataError(
        f"{printable(first.part_path(*place))} and {printable(second.part_path(*place))} hold"
        " different records of the same samples",
        "delete the wrong one ('vitdistill label check' compares records with the teacher)",
    )


def _sealed(store: LabelStore) -> list[tuple[int, int]]:
    views = range(store.manifest.num_views)
    return [(view, part) for view in views for part in store.sealed_parts(view)]


def prune(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    num_views: int | None = None,
    encoding: LogitEncoding | None = None,
    say: Callable[[str], None] = lambda text: None,
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
        records = store.load(view, part).read_all().view(manifest.layout.dtype)
        if encoding is not None:
            records = manifest.layout.convert(records, encoding)
        pruned.seal(view, part, records)
        say(f"{number} of {len(todo)} parts written: {printable(pruned.part_path(view, part))}")
    return pruned
