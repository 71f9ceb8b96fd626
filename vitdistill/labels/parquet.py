"""The logits of a label store as a Parquet file: one row for each (view, sample).

Columns: ``sample_id``, ``view``, ``pixels`` (checksum of the view) and ``logits``; for topk, in
place of these, ``class_ids``, ``values`` (``z - max z``) and for each temperature T ``tail_T``,
``log(sum exp((z - max z) / T))`` over the other classes. The schema's metadata holds the names of
the classes (``classes``, a JSON list) and the encoding (``labels``).
"""

import json
import os
from collections.abc import Sequence
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..data.sources.table import import_extra
from ..errors import ConfigError, DataError, Give
from ..messages import plural
from ..storage.atomic import write_first
from .store import LabelStore


def export_labels(
    store: LabelStore, path: str | os.PathLike[str], views: Sequence[int] | None = None
) -> tuple[int, int]:
    """Write the logits of a store as a new ``.parquet`` file; return its rows and its size.

    The store has to be complete in ``views``; None: all of its views.
    """
    file, manifest = Path(path), store.manifest
    if file.suffix.lower() != ".parquet":
        raise ConfigError(f"{file} is no .parquet file", Give("to"), field="to")
    if store.layout.logits is None:
        raise ConfigError(f"{store.path} holds no logits to export", field="store")
    chosen = list(range(manifest.num_views)) if views is None else sorted(set(views))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < manifest.num_views:
        what = f"the views of {store.path} are 0 to {manifest.num_views - 1}"
        raise ConfigError(what, Give("views"), field="views")
    missing = [place for place in store.missing_parts() if place[0] in chosen]
    if missing:
        what = f"{store.path} lacks {plural(len(missing), 'part')} of these views"
        raise DataError(what, "run the command that wrote it again, which writes what is missing")
    import_extra("pyarrow.parquet")
    write = partial(_write, import_extra("pyarrow"), store=store, views=chosen)
    if os.path.lexists(file) or not write_first(file, write):
        raise ConfigError(f"{file} exists already", Give("to"), field="to")
    return manifest.num_samples * len(chosen), file.stat().st_size


def _write(arrow: Any, file: BinaryIO, store: LabelStore, views: Sequence[int]) -> None:
    metadata = {"labels": json.dumps(store.layout.to_json()["logits"])}
    names = [str(name) for name in store.manifest.about.get("classes", ())]
    if names:
        metadata["classes"] = json.dumps(names)
    tables = (
        _table(arrow, store, view, part).replace_schema_metadata(metadata)
        for view, part in product(views, range(store.num_parts))
    )
    first = next(tables)
    with arrow.parquet.ParquetWriter(file, first.schema, use_dictionary=["view"]) as writer:
        for table in chain([first], tables):
            writer.write_table(table)


def _table(arrow: Any, store: LabelStore, view: int, part: int) -> Any:
    records = store.load(view, part).read_all().view(store.layout.dtype)
    targets, encoding = store.layout.targets(records), store.layout.logits
    assert encoding is not None
    columns: dict[str, npt.NDArray[Any]] = {
        "sample_id": np.arange(*store.manifest.part_range(part), dtype=np.int64),
        "view": np.full(len(targets), view, dtype=np.int32),
        "pixels": targets.pixels.numpy().astype(np.uint32),
    }
    if encoding.is_complete:
        columns["logits"] = targets.logits().numpy()
    else:
        columns["class_ids"] = targets.fields["ids"].numpy().astype(np.int32)
        columns["values"] = targets.fields["values"].float().numpy()
        for t, tail in zip(encoding.temperatures, targets.fields["tails"].T.numpy(), strict=True):
            columns[f"tail_{t!r}".removesuffix(".0")] = tail
    return arrow.table({k: arrow.array(list(c) if c.ndim == 2 else c) for k, c in columns.items()})
