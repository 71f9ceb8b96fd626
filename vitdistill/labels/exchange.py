"""Answers as files of other tools, NPZ and Parquet: one row for each (view, sample).

Columns: ``sample_id`` (the number of the training image, or its key as a string), ``view`` (from 0;
0 where there is no such column), ``logits`` (one number a class), ``pixels`` (checksum of the view,
may be absent). Class names are the array ``classes`` of an NPZ, a JSON list under ``classes`` in
the schema's metadata of a Parquet file. Labels that are not complete have other columns in place of
``logits``: ``class_ids``, and of top-k also ``values`` (``z - max z``) and for each temperature T
``tail_T``, the log of what the other classes weigh together: ``log(sum exp((z - max z) / T))``.
"""

import io
import json
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError, UserError
from ..messages import format_bytes, printable
from ..storage.atomic import Sink, disk_errors, read_bytes, require_free, write_atomic
from .encoding import Targets
from .store import LabelStore

I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

SUFFIXES = (".npz", ".parquet")
_READ = ("sample_id", "view", "logits", "pixels", "classes")
_CHUNK_BYTES = 2**25


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Some rows of a file, in its order.

    Attributes:
        first: number of the first one.
        samples: numbers, or keys, of the images.
        views: of each row.
        logits: float32 (B, C); not finite where the file's are not, or do not fit.
        pixels: checksum of each view; None: the file has none.
    """

    first: int
    samples: I64 | list[str]
    views: I64
    logits: F32
    pixels: U32 | None


class AnswerFile(ABC):
    """Answers made elsewhere.

    Attributes:
        path: the file.
        num_rows: its rows.
        num_classes: logits a row.
        precision: number format of the logits in the file.
        classes: names of the classes in the order of the logits; None: the file does not say.
    """

    path: Path
    num_rows: int
    num_classes: int
    precision: str
    classes: tuple[str, ...] | None

    @abstractmethod
    def rows(self) -> Iterator[Rows]:
        """All rows, some at a time. Raises `DataError` where they are damaged or of a wrong
        type.
        """

    def _error(self, what: str) -> DataError:
        return DataError(f"{printable(self.path)} {what}")


def open_answers(path: str | os.PathLike[str], memory: int | None = None) -> AnswerFile:
    """The answers in an ``.npz`` or ``.parquet`` file; ``memory``: bytes that are free, None: as
    the system says.

    Raises:
        ConfigError: the file is neither, or an NPZ that does not fit into memory.
        DataError: it is missing, damaged, or has not the columns.
        UserError: pyarrow is missing.
    """
    file = Path(path)
    suffix = _suffix(file)
    if not file.is_file():
        raise DataError(f"there is no file {printable(file)}: check the path")
    return _Npz(file, memory) if suffix == ".npz" else _Parquet(file)


def read_class_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Class names from a text file, one a line; raises `DataError` when it is missing, or no
    text.
    """
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(
            f"{printable(path)} is no text: write one class name a line, in UTF-8"
        ) from None
    while lines and not lines[-1].strip():
        lines.pop()
    return tuple(line.strip() for line in lines)


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(
            f"{printable(path)} is neither {' nor '.join(SUFFIXES)}: name a file with one of these"
            " endings"
        )
    return suffix


class _Npz(AnswerFile):
    """Arrays that are read whole."""

    def __init__(self, path: Path, memory: int | None) -> None:
        self.path = path
        with _damage(path):
            with zipfile.ZipFile(path) as archive:
                size = sum(
                    entry.file_size
                    for entry in archive.infolist()
                    if entry.filename.removesuffix(".npy") in _READ
                )
            _require_memory(path, size, memory)
            with np.load(path, allow_pickle=False) as loaded:
                found = {name: np.asarray(loaded[name]) for name in _READ if name in loaded.files}
        for name in ("sample_id", "logits"):
            if name not in found:
                raise self._error(f"has no array {name!r}: {_WANTED}")
        logits = found["logits"]
        if logits.ndim != 2 or logits.dtype.kind != "f" or not logits.size:
            raise self._error(
                f"has logits of type {logits.dtype} and shape {logits.shape}: {_WANTED}"
            )
        self.num_rows, self.num_classes = logits.shape
        self.precision = str(logits.dtype.newbyteorder("="))
        for name in ("sample_id", "view", "pixels"):
            if name in found and found[name].shape != (self.num_rows,):
                raise self._error(
                    f"has {name} of shape {found[name].shape} for {self.num_rows} rows of logits:"
                    " give one value a row"
                )
        self._samples = self._keys(found["sample_id"])
        self._views = self._whole(found, "view")
        self._pixels = self._whole(found, "pixels").astype(np.uint32) if "pixels" in found else None
        self._logits = logits
        names = found.get("classes")
        if names is not None and (names.ndim != 1 or names.dtype.kind not in "US"):
            raise self._error(
                f"has classes of type {names.dtype} and shape {names.shape}: give one string a"
                " class"
            )
        self.classes = None if names is None else tuple(_texts(names))

    def _keys(self, values: npt.NDArray[Any]) -> I64 | list[str]:
        if values.dtype.kind in "US":
            return _texts(values)
        if values.dtype.kind not in "iu":
            raise self._error(f"has sample_id of type {values.dtype}: {_WANTED}")
        return values.astype(np.int64)

    def _whole(self, found: dict[str, npt.NDArray[Any]], name: str) -> I64:
        values = found.get(name, np.zeros(self.num_rows, dtype=np.int64))
        if values.dtype.kind not in "iu":
            raise self._error(f"has {name} of type {values.dtype}: give whole numbers")
        return values.astype(np.int64)

    def rows(self) -> Iterator[Rows]:
        """All rows, some at a time."""
        step = _chunk(self.num_classes)
        for first in range(0, self.num_rows, step):
            part = slice(first, first + step)
            pixels = None if self._pixels is None else self._pixels[part]
            yield Rows(
                first, self._samples[part], self._views[part], _single(self._logits[part]), pixels
            )


class _Parquet(AnswerFile):
    """A table that is read a few rows at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrow = _pyarrow()
        import pyarrow.parquet

        with _damage(path), pyarrow.parquet.ParquetFile(path) as file:
            schema, self.num_rows = file.schema_arrow, file.metadata.num_rows
            for name in ("sample_id", "logits"):
                if name not in schema.names:
                    raise self._error(
                        f"has no column {name!r}, only {', '.join(schema.names)}: {_WANTED}"
                    )
            if not self.num_rows:
                raise self._error("has no rows: every training image needs one in every view")
            first = next(file.iter_batches(batch_size=1, columns=["logits"])).column(0)
        self._check_types(schema)
        self.num_classes = len(first[0].as_py() or ())
        if not self.num_classes:
            raise self._error(f"has no logits in row 0: {_WANTED}")
        self.precision = {"halffloat": "float16", "float": "float32", "double": "float64"}[
            str(schema.field("logits").type.value_type)
        ]
        self._columns = [
            name for name in ("sample_id", "view", "pixels", "logits") if name in schema.names
        ]
        self.classes = self._names((schema.metadata or {}).get(b"classes"))

    def _check_types(self, schema: Any) -> None:
        types = self._arrow.types
        for name in ("sample_id", "view", "pixels"):
            kind = schema.field(name).type if name in schema.names else self._arrow.int64()
            kind = kind.value_type if types.is_dictionary(kind) else kind
            text = types.is_string(kind) or types.is_large_string(kind)
            if not types.is_integer(kind) and not (text and name == "sample_id"):
                raise self._error(f"has {name} of type {kind}: {_WANTED}")
        kind = schema.field("logits").type
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        if not is_list or not types.is_floating(kind.value_type):
            raise self._error(f"has logits of type {kind}: {_WANTED}")

    def _names(self, text: bytes | None) -> tuple[str, ...] | None:
        if text is None:
            return None
        try:
            names = json.loads(text)
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._error(
                "has no JSON list of strings under 'classes' in its schema's metadata: write one,"
                " or use --classes FILE"
            )
        return tuple(names)

    def rows(self) -> Iterator[Rows]:
        """All rows, some at a time."""
        import pyarrow.parquet

        row = 0
        with _damage(self.path), pyarrow.parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(
                batch_size=_chunk(self.num_classes), columns=self._columns
            ):
                columns = {
                    name: batch.column(batch.schema.names.index(name)) for name in self._columns
                }
                for name, column in columns.items():
                    if column.null_count:
                        raise self._error(
                            f"has no {name} in row"
                            f" {row + int(np.flatnonzero(column.is_null())[0])}: fill it, or leave"
                            " it out"
                        )
                views = (
                    self._numbers(columns["view"])
                    if "view" in columns
                    else np.zeros(len(batch), dtype=np.int64)
                )
                pixels = (
                    self._numbers(columns["pixels"]).astype(np.uint32)
                    if "pixels" in columns
                    else None
                )
                samples = columns["sample_id"]
                is_number = self._arrow.types.is_integer(samples.type)
                keys = self._numbers(samples) if is_number else samples.to_pylist()
                yield Rows(row, keys, views, self._logits(columns["logits"], row), pixels)
                row += len(batch)

    def _numbers(self, column: Any) -> I64:
        plain = (
            column.dictionary_decode() if self._arrow.types.is_dictionary(column.type) else column
        )
        return plain.to_numpy(zero_copy_only=False).astype(np.int64)

    def _logits(self, column: Any, row: int) -> F32:
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != self.num_classes)
        if len(wrong):
            raise self._error(
                f"has {lengths[wrong[0]]} logits in row {row + wrong[0]} and {self.num_classes} in"
                " row 0: give one a class in every row"
            )
        return _single(
            column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.num_classes)
        )


_WANTED = (
    "it needs sample_id (whole numbers, the training images counted from 0, or their keys), logits"
    " (floating-point numbers, one a class) and, unless all are of view 0, view (whole numbers)"
)


def _single(logits: npt.NDArray[Any]) -> F32:
    with np.errstate(over="ignore"):
        return logits.astype(np.float32)


def _texts(values: npt.NDArray[Any]) -> list[str]:
    texts: list[str] = (
        np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
    ).tolist()
    return texts


def _chunk(num_classes: int) -> int:
    """Rows to hold at a time."""
    return max(1, min(_CHUNK_BYTES // (4 * num_classes), 65536))


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what the libraries say of a damaged file into `DataError`."""
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # the system's; pyarrow's have no number
            with disk_errors(path):
                raise
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"{printable(path)} is damaged, or no {path.suffix.lower()} file of plain arrays"
            f" ({reason}): write it again"
        ) from error


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            '.parquet files need pyarrow: install it with pip install "vitdistill[data]", or use'
            " .npz"
        ) from error
    return pyarrow


def free_memory() -> int:
    """Bytes that may be allocated now."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _require_memory(path: Path, size: int, memory: int | None) -> None:
    free = free_memory() if memory is None else memory
    if size > free // 2:
        raise ConfigError(
            f"{printable(path)} has {format_bytes(size)} of arrays, which are read and written as a"
            f" whole, and {format_bytes(free)} of memory are free: use .parquet"
        )


# -- writing --------------------------------------------------------------------------------------


def export_labels(
    store: LabelStore,
    path: str | os.PathLike[str],
    views: Sequence[int] | None = None,
    memory: int | None = None,
) -> tuple[int, int]:
    """Write the logits of a store as a new ``.npz`` or ``.parquet`` file; returns its rows and its
    size.

    Args:
        store: has to be complete in these views.
        path: of the file.
        views: those to write; None: all.
        memory: bytes that are free; None: as the system says.

    Raises:
        ConfigError: the file exists, is of another kind, or an NPZ that does not fit into memory;
            there is no such view, or no logits.
        DataError: parts of the store are missing or damaged.
        DiskError: there is no room.
    """
    file, manifest = Path(path), store.manifest
    suffix = _suffix(file)
    if store.layout.logits is None:
        raise ConfigError(
            f"{printable(store.path)} holds no logits, only hidden states, which cannot be exported"
        )
    chosen = list(range(manifest.num_views)) if views is None else sorted(set(views))
    wrong = [view for view in chosen if not 0 <= view < manifest.num_views]
    if wrong or not chosen:
        raise ConfigError(
            f"{printable(store.path)} has no view {wrong[0] if wrong else ''}: its views are 0 to"
            f" {manifest.num_views - 1}"
        )
    _refuse_existing(file)
    missing = [place for place in store.missing_parts() if place[0] in chosen]
    if missing:
        view, part = missing[0]
        raise DataError(
            f"{printable(store.path)} lacks {len(missing)} of {len(chosen) * store.num_parts} parts"
            f" (the first: part {part} of view {view}): run the command that writes it again, which"
            " writes what is missing ('vitdistill label status' says how much)"
        )
    count = manifest.num_samples * len(chosen)
    row_bytes = sum(
        column.dtype.itemsize * int(np.prod(column.shape[1:])) for column in _blank(store).values()
    )
    if suffix == ".npz":
        _require_memory(file, count * row_bytes, memory)
    else:
        _pyarrow()
    require_free(file, count * row_bytes)

    def write(sink: Sink) -> None:
        (_write_npz if suffix == ".npz" else _write_parquet)(_Stream(sink), store, chosen)

    try:
        write_atomic(file, write, replace=False)
    except FileExistsError:
        _refuse_existing(file)
    return count, file.stat().st_size


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{printable(path)} exists already: name another file, or delete it")


class _Stream(io.RawIOBase):
    """A sink as the libraries want it: a file that cannot go back."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._at = sink, 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: Any, /) -> int:
        done = self._sink.write(data)
        self._at += done
        return done


def _columns(targets: Targets) -> dict[str, npt.NDArray[Any]]:
    """The columns of these records, but for ``sample_id`` and ``view``."""
    encoding = targets.layout.logits
    assert encoding is not None
    columns: dict[str, npt.NDArray[Any]] = {"pixels": targets.pixels.numpy().astype(np.uint32)}
    if encoding.is_complete:
        return {**columns, "logits": targets.logits().numpy()}
    columns["class_ids"] = targets.fields["ids"].numpy().astype(np.int32)
    if encoding.kind == "topk":
        columns["values"] = targets.fields["values"].float().numpy()
        tails = targets.fields["tails"].numpy()
        columns |= {f"tail_{_number(t)}": tails[:, i] for i, t in enumerate(encoding.temperatures)}
    return columns


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _blank(store: LabelStore) -> dict[str, npt.NDArray[Any]]:
    """No rows, of the right types."""
    return _with_places(
        0, np.zeros(0, dtype=np.int64), store.layout.targets(np.zeros(0, dtype=store.layout.dtype))
    )


def _with_places(view: int, ids: I64, targets: Targets) -> dict[str, npt.NDArray[Any]]:
    return {"sample_id": ids, "view": np.full(len(ids), view, dtype=np.int32), **_columns(targets)}


def _chunks(store: LabelStore, views: Sequence[int]) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """All columns, some rows of one part at a time, in order."""
    assert store.layout.logits is not None
    step = _chunk(store.layout.logits.num_classes)
    for view in views:
        for part in range(store.num_parts):
            records = store.load(view, part).checked().view(store.layout.dtype)
            lo, hi = store.part_range(part)
            for first in range(0, hi - lo, step):
                some = records[first : first + step]
                ids = np.arange(lo + first, lo + first + len(some), dtype=np.int64)
                yield _with_places(view, ids, store.layout.targets(some))


def _class_names(store: LabelStore) -> list[str]:
    return [str(name) for name in store.manifest.about.get("classes", ())]


def _write_npz(stream: _Stream, store: LabelStore, views: Sequence[int]) -> None:
    count = store.manifest.num_samples * len(views)
    arrays = {
        name: np.empty((count, *column.shape[1:]), dtype=column.dtype)
        for name, column in _blank(store).items()
    }
    at = 0
    for chunk in _chunks(store, views):
        rows = len(chunk["sample_id"])
        for name, column in chunk.items():
            arrays[name][at : at + rows] = column
        at += rows
    names = _class_names(store)
    if names:
        arrays["classes"] = np.array(names, dtype=np.str_)
    with zipfile.ZipFile(stream, "w") as archive:  # equal labels make equal files: no dates
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _write_parquet(stream: _Stream, store: LabelStore, views: Sequence[int]) -> None:
    arrow = _pyarrow()
    import pyarrow.parquet

    metadata = {"labels": json.dumps(store.layout.to_json()["logits"])}
    names = _class_names(store)
    if names:
        metadata["classes"] = json.dumps(names)
    schema = _table(arrow, _blank(store)).schema.with_metadata(metadata)
    with pyarrow.parquet.ParquetWriter(stream, schema, use_dictionary=["view"]) as writer:
        for chunk in _chunks(store, views):
            writer.write_table(_table(arrow, chunk).replace_schema_metadata(metadata))


def _table(arrow: ModuleType, columns: dict[str, npt.NDArray[Any]]) -> Any:
    made = {}
    for name, column in columns.items():
        made[name] = arrow.array(np.ascontiguousarray(column).reshape(-1))
        if column.ndim == 2:
            rows, width = column.shape
            offsets = np.arange(rows + 1, dtype=np.int32) * np.int32(width)
            made[name] = arrow.ListArray.from_arrays(arrow.array(offsets), made[name])
    return arrow.table(made)
