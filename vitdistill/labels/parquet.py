"""The logits of a label store as a Parquet file: one row for each (view, sample).

Columns: ``sample_id`` (number of the training image), ``view``, ``pixels`` (checksum of the view)
and ``logits``. Labels of topk have other columns in place of ``logits``: ``class_ids``, ``values``
(``z - max z``) and for each temperature T ``tail_T``, the log of what the other classes weigh
together: ``log(sum exp((z - max z) / T))``. The schema's metadata holds the names of the classes
(``classes``, a JSON list) and the encoding (``labels``).
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError, Give, UserError
from ..messages import plural, printable
from ..storage.atomic import require_free, write_first
from .layout import Targets
from .store import LabelStore

_CHUNK_BYTES = 2**25

Columns = dict[str, npt.NDArray[Any]]


def export_labels(
    store: LabelStore, path: str | os.PathLike[str], views: Sequence[int] | None = None
) -> tuple[int, int]:
    """Write the logits of a store as a new ``.parquet`` file; return its rows and its size.

    The store has to be complete in ``views``; None: all of its views.
    """
    file, manifest = Path(path), store.manifest
    if file.suffix.lower() != ".parquet":
        raise ConfigError(f"{printable(file)} is no .parquet file", Give("to"), field="to")
    if store.layout.logits is None:
        raise ConfigError(f"{printable(store.path)} holds no logits to export", field="store")
    chosen = list(range(manifest.num_views)) if views is None else sorted(set(views))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < manifest.num_views:
        raise ConfigError(
            f"the views of {printable(store.path)} are 0 to {manifest.num_views - 1}",
            Give("views"),
            field="views",
        )
    exists = ConfigError(f"{printable(file)} exists already", Give("to"), field="to")
    if os.path.lexists(file):
        raise exists
    missing = [place for place in store.missing_parts() if place[0] in chosen]
    if missing:
        raise DataError(
            f"{printable(store.path)} lacks {plural(len(missing), 'part')} of these views",
            "run the command that wrote it again, which writes what is missing",
        )
    arrow = _pyarrow()
    count = manifest.num_samples * len(chosen)
    require_free(file, count * sum(c.dtype.itemsize * c[0].size for c in _blank(store).values()))
    if not write_first(file, lambda opened: _write(arrow, opened, store, chosen)):
        raise exists
    return count, file.stat().st_size


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            ".parquet files need pyarrow", 'install it with pip install "vitdistill[data]"'
        ) from error
    return pyarrow


def _write(arrow: Any, file: BinaryIO, store: LabelStore, views: Sequence[int]) -> None:
    metadata = {"labels": json.dumps(store.layout.to_json()["logits"])}
    names = [str(name) for name in store.manifest.about.get("classes", ())]
    if names:
        metadata["classes"] = json.dumps(names)
    schema = _table(arrow, _blank(store)).schema.with_metadata(metadata)
    with arrow.parquet.ParquetWriter(file, schema, use_dictionary=["view"]) as writer:
        for chunk in _chunks(store, views):
            writer.write_table(_table(arrow, chunk).replace_schema_metadata(metadata))


def _chunks(store: LabelStore, views: Sequence[int]) -> Iterator[Columns]:
    """Yield all columns, some rows of one part at a time, in order."""
    assert store.layout.logits is not None
    step = max(1, min(_CHUNK_BYTES // (4 * store.layout.logits.num_classes), 65536))
    for view in views:
        for part in range(store.num_parts):
            records = store.load(view, part).read_all().view(store.layout.dtype)
            lo, hi = store.part_range(part)
            for first in range(lo, hi, step):
                targets = store.layout.targets(records[first - lo : first - lo + step])
                yield _columns(view, first, targets)


def _blank(store: LabelStore) -> Columns:
    """Return one row of the right types."""
    return _columns(0, 0, store.layout.targets(np.zeros(1, dtype=store.layout.dtype)))


def _columns(view: int, first: int, targets: Targets) -> Columns:
    encoding = targets.layout.logits
    assert encoding is not None
    columns: Columns = {
        "sample_id": np.arange(first, first + len(targets), dtype=np.int64),
        "view": np.full(len(targets), view, dtype=np.int32),
        "pixels": targets.pixels.numpy().astype(np.uint32),
    }
    if encoding.is_complete:
        return {**columns, "logits": targets.logits().numpy()}
    tails = targets.fields["tails"].numpy()
    return {
        **columns,
        "class_ids": targets.fields["ids"].numpy().astype(np.int32),
        "values": targets.fields["values"].float().numpy(),
        **{
            f"tail_{t!r}".removesuffix(".0"): tails[:, i]
            for i, t in enumerate(encoding.temperatures)
        },
    }


def _table(arrow: Any, columns: Columns) -> Any:
    made = {}
    for name, column in columns.items():
        made[name] = arrow.array(np.ascontiguousarray(column).reshape(-1))
        if column.ndim == 2:
            rows, width = column.shape
            offsets = np.arange(rows + 1, dtype=np.int32) * np.int32(width)
            made[name] = arrow.ListArray.from_arrays(arrow.array(offsets), made[name])
    return arrow.table(made)
