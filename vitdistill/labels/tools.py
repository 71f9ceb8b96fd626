"""Stores made of other stores: several united, or one made smaller."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import ConfigError, DataError, Give
from ..messages import plural
from ..storage.atomic import require_free
from .encoding import LogitEncoding
from .store import LabelStore


def merge(
    sources: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    say: Callable[[str], None] = lambda text: None,
) -> LabelStore:
    """Unite the parts of stores of the same answers in ``target``, which may have parts already.

    If it is stopped, running it again copies the rest. `DataError` if the stores or two records
    differ (found before anything is written), or a part is damaged.
    """
    if not sources:
        raise ConfigError("there is nothing to merge", Give("from"), field="from")
    stores = [LabelStore.open(path) for path in sources]
    first, *others = stores
    for store in others:
        given = (first.manifest, "in the former", "in the latter")
        if different := store.manifest.differences(*given):
            both = f"{store.path} and {first.path}"
            what = f"{both} hold labels of different things ({different})"
            raise DataError(what, "leave one of them out", field="from")
    num_views = max(store.manifest.num_views for store in stores)
    united = LabelStore.create(target, replace(first.manifest, num_views=num_views))
    origin: dict[tuple[int, int], LabelStore] = {}
    for store in [united, *stores]:
        for place in store.sealed_parts():
            other = origin.setdefault(place, store)
            if other is not store and other.load(*place).crcs != store.load(*place).crcs:
                raise _conflict(other, store, place)
    todo = [(place, store) for place, store in sorted(origin.items()) if store is not united]
    require_free(united.path, sum(s.part_path(*place).stat().st_size for place, s in todo))
    for number, (place, store) in enumerate(todo, 1):
        records = store.load(*place).read_all().view(store.layout.dtype)
        # Another process may have sealed it meanwhile.
        if not united.seal(*place, records) and united.load(*place).crcs != store.load(*place).crcs:
            raise _conflict(united, store, place)
        say(f"{number} of {len(todo)} parts copied: {store.part_path(*place)}")
    return united


def _conflict(first: LabelStore, second: LabelStore, place: tuple[int, int]) -> DataError:
    both = " and ".join(str(store.part_path(*place)) for store in (first, second))
    fix = "delete the wrong one ('vitdistill label check' compares records with the teacher)"
    return DataError(f"{both} hold different records of the same samples", fix)


def prune(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    num_views: int | None = None,
    encoding: LogitEncoding | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> LabelStore:
    """Write a smaller store of the same answers: fewer views, or logits in another encoding.

    The first ``num_views`` views are kept; parts that the source lacks are missing in the target
    too. If it is stopped, running it again writes the rest. `ConfigError` if nothing would become
    smaller or the source lacks what is asked for, `DataError` for damage.
    """
    store = LabelStore.open(source)
    manifest = store.manifest
    views = manifest.num_views if num_views is None else num_views
    if not 1 <= views <= manifest.num_views:
        there = plural(manifest.num_views, "view")
        what = f"{store.path} has {there}, of which {views} cannot be kept"
        raise ConfigError(what, Give("views"), field="views")
    layout = manifest.layout if encoding is None else manifest.layout.with_logits(encoding)
    sizes = layout.record_bytes * views, manifest.layout.record_bytes * manifest.num_views
    if sizes[0] >= sizes[1]:
        raise ConfigError("nothing would become smaller", (Give("views"), Give("k")))
    was = {"num_views": manifest.num_views, "layout": manifest.layout.to_json()}
    about = {**manifest.about, "pruned_from": was}
    pruned = LabelStore.create(
        target, replace(manifest, layout=layout, num_views=views, about=about)
    )
    todo = [at for at in store.sealed_parts() if at[0] < views and not pruned.is_sealed(*at)]
    for number, (view, part) in enumerate(todo, 1):
        records = store.load(view, part).read_all().view(manifest.layout.dtype)
        if encoding is not None:
            records = manifest.layout.convert(records, encoding)
        pruned.seal(view, part, records)
        say(f"{number} of {len(todo)} parts written: {pruned.part_path(view, part)}")
    return pruned
