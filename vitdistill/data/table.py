"""Images in tables: parquet and arrow files in the layout of Hugging Face datasets, from disk or
from the hub.

An image column holds structs ``{bytes, path}`` or plain bytes; class names come from the
``ClassLabel`` feature that Hugging Face keeps in the schema. Arrow files are memory-mapped; parquet
has no random access and is read into memory.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from ..errors import ConfigError, DataError, MissingSplit, UserError
from ..messages import listed, plural, printable
from .decode import decode_image, image_size
from .source import SPLIT_NAMES, ImageSource, Split

TABLE_SUFFIXES = frozenset((".parquet", ".arrow"))
"""File names that are read as tables."""

MAX_PARQUET_BYTES = 16 * 2**30
"""Parquet files of one split above this total are refused, because they would be held in memory."""

_SPLIT_WORDS: dict[Split, tuple[tuple[str, ...], ...]] = {
    "train": (("train", "training"),),
    "val": (("val", "valid", "validation", "dev"), ("test", "testing")),
}


def is_table_folder(root: Path) -> bool:
    """Whether tables lie in ``root``, in its ``data`` folder or in the folder of a split."""
    places = [
        root,
        root / "data",
        *(root / name for names in SPLIT_NAMES.values() for name in names),
    ]
    return any(_is_table(path) for place in places if place.is_dir() for path in place.iterdir())


def open_table(root: Path, split: Split, options: str = "") -> "TableSource":
    """The split of a table file or a folder of them; ``options`` are ``image=COLUMN&label=COLUMN``
    where unclear.
    """
    arrow = _pyarrow()
    files = _files_of_split(root, split)
    name = printable(str(root)) + f" ({split})"
    parquet = sum(f.stat().st_size for f in files if f.suffix.lower() == ".parquet")
    if parquet > MAX_PARQUET_BYTES:
        raise DataError(
            f"{name} has {parquet >> 30} GiB of parquet, which would be held in memory; save it as"
            " arrow with datasets.load_dataset(...).save_to_disk(...) or as an image folder."
        )
    tables = [_read_table(arrow, file) for file in files]
    columns = _columns(name, tables[0].schema, _parse_options(options))
    try:
        table = arrow.concat_tables([t.select([c for c in columns if c]) for t in tables])
    except (arrow.ArrowInvalid, KeyError) as error:
        raise DataError(
            f"the tables of {name} do not have the same columns ({printable(str(error))})."
        ) from error
    return TableSource(name, table, *columns)


def open_hub(location: str, split: Split) -> "TableSource":
    """A data set of the Hugging Face hub, or of a local folder, through the ``datasets`` library
    and its cache.
    """
    name, _, options = location.partition("?")
    local = Path(name).expanduser()
    if local.exists():
        return open_table(local, split, options)
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "reading from the hub needs the datasets library; install it with: pip install"
            ' "vitdistill[data]"'
        ) from error
    try:
        found = datasets.get_dataset_split_names(name)
        chosen = next((s for words in _SPLIT_WORDS[split] for s in found if s in words), None)
        table = None if chosen is None else datasets.load_dataset(name, split=chosen).data.table
    except Exception as error:
        reason = printable(" ".join(str(error).split()))[:160]
        raise DataError(
            f"hfds/{printable(name)} could not be loaded ({reason}); check its name and the"
            " network."
        ) from error
    if table is None:
        raise MissingSplit(
            f"hfds/{printable(name)} has no {split} split; found {listed(found, 5)}."
        )
    columns = _columns(name, table.schema, _parse_options(options))
    return TableSource(
        f"hfds/{printable(name)} ({chosen})", table.select([c for c in columns if c]), *columns
    )


class TableSource(ImageSource):
    """The rows of a pyarrow table with an image column and, mostly, a label column."""

    def __init__(self, name: str, table: Any, image: str, label: str | None) -> None:
        """Raises `DataError` for rows without an image or a class."""
        arrow = _pyarrow()
        import pyarrow.compute as compute

        self.name = name
        column = table.column(image)
        self._bytes = (
            compute.struct_field(column, "bytes") if arrow.types.is_struct(column.type) else column
        )
        sizes = compute.fill_null(compute.binary_length(self._bytes), 0)
        self.sizes = np.asarray(sizes.to_numpy(), dtype=np.int64)
        empty = np.flatnonzero(self.sizes == 0)
        if len(empty):
            raise DataError(
                f"{name}: the image of row {empty[0]} has no bytes"
                f" ({plural(len(empty), 'such row')}); embed the images."
            )
        self.classes, self.labels = _labels(name, table, label)

    def key(self, i: int) -> str:
        """The row number."""
        return f"{i:08d}"

    def load(self, i: int) -> Image.Image:
        """Decode the image of row ``i``."""
        return decode_image(self._bytes[i].as_py(), f"{self.name}: row {i}")

    def image_size(self, i: int) -> tuple[int, int]:
        """(width, height) from the image's header."""
        return image_size(self._bytes[i].as_py(), f"{self.name}: row {i}")


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            "reading parquet and arrow needs pyarrow; install it with: pip install"
            ' "vitdistill[data]"'
        ) from error
    return pyarrow


def _is_table(path: Path) -> bool:
    return (
        path.suffix.lower() in TABLE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _words(path: str) -> set[str]:
    return set(re.split(r"[^a-z]+", path.lower()))


def _files_of_split(root: Path, split: Split) -> list[Path]:
    """The files whose name or folder says the split; without any such word all files are training
    data.
    """
    files = sorted(p for p in root.rglob("*") if _is_table(p)) if root.is_dir() else [root]
    words = {f: _words(str(f.relative_to(root)) if root.is_dir() else f.name) for f in files}
    for group in _SPLIT_WORDS[split]:
        chosen = [f for f in files if words[f] & set(group)]
        if chosen:
            return chosen
    known = {word for groups in _SPLIT_WORDS.values() for group in groups for word in group}
    if split == "train" and not any(words[f] & known for f in files):
        return files
    raise MissingSplit(
        f"{printable(str(root))} has no table whose name says {split!r}; found"
        f" {listed((f.name for f in files), 5)}."
    )


def _read_table(arrow: ModuleType, file: Path) -> Any:
    try:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file, partitioning=None)
        mapped = arrow.memory_map(str(file))
        try:
            return arrow.ipc.open_stream(mapped).read_all()
        except arrow.ArrowInvalid:
            mapped.seek(0)
            return arrow.ipc.open_file(mapped).read_all()
    except (arrow.ArrowException, OSError) as error:
        reason = printable(str(error).split("\n")[0])[:120]
        raise DataError(
            f"{printable(str(file))} is damaged or not a table ({reason}); replace it."
        ) from error


def _parse_options(options: str) -> dict[str, str]:
    parsed = dict(parse_qsl(options))
    unknown = set(parsed) - {"image", "label"}
    if unknown:
        raise ConfigError(
            f"unknown table options {listed(unknown)}; use ?image=COLUMN and &label=COLUMN."
        )
    return parsed


def _features(schema: Any) -> dict[str, Any]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(features: dict[str, Any], column: str) -> str | None:
    feature = features.get(column)
    return feature.get("_type") if isinstance(feature, dict) else None


def _columns(name: str, schema: Any, options: dict[str, str]) -> tuple[str, str | None]:
    """The names of the image and the label column."""
    arrow = _pyarrow()
    for column in options.values():
        if column not in schema.names:
            raise ConfigError(
                f"{name} has no column {printable(column)!r}; it has {listed(schema.names, 8)}."
            )
    features = _features(schema)

    def holds_images(column: str) -> bool:
        kind = schema.field(column).type
        is_struct = arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return _kind(features, column) == "Image" or is_struct or arrow.types.is_binary(kind)

    image = options.get("image") or _only(
        name, "image", [c for c in schema.names if holds_images(c)], ("image", "img")
    )
    if image is None:
        raise DataError(f"{name} has no image column; its columns are {listed(schema.names, 8)}.")
    labels = [c for c in schema.names if _kind(features, c) == "ClassLabel"]
    labels = labels or [c for c in schema.names if c in ("label", "labels", "fine_label")]
    return image, options.get("label") or _only(name, "label", labels, ("label", "labels"))


def _only(name: str, role: str, found: Sequence[str], preferred: Sequence[str]) -> str | None:
    if len(found) < 2:
        return found[0] if found else None
    best = [c for c in found if c in preferred]
    if len(best) == 1:
        return best[0]
    raise ConfigError(
        f"{name} has several {role} columns, {listed(found, 8)}; choose with ?{role}=COLUMN."
    )


def _labels(name: str, table: Any, label: str | None) -> tuple[tuple[str, ...], Any]:
    """Class names and int64 labels. Names come from the schema, from string labels, or are the
    numbers themselves.
    """
    arrow = _pyarrow()
    if label is None:
        return (), np.full(table.num_rows, -1, dtype=np.int64)
    column = table.column(label)
    if column.null_count:
        raise DataError(
            f"{name}: {label!r} is empty in {plural(column.null_count, 'row')}; fill or remove"
            " them."
        )
    feature = _features(table.schema).get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
        values = column.to_pylist()
        classes = tuple(names or sorted(set(values)))
        index = {c: i for i, c in enumerate(classes)}
        stray = sorted(set(values) - set(classes))
        if stray:
            raise DataError(
                f"{name}: the classes {listed(stray)} are not among the names in the schema."
            )
        return classes, np.array([index[v] for v in values], dtype=np.int64)
    if not arrow.types.is_integer(column.type):
        raise DataError(
            f"{name}: the column {label!r} has {column.type} values; labels must be whole numbers"
            " or names."
        )
    labels = np.asarray(column.to_numpy(), dtype=np.int64)
    classes = (
        tuple(names) if names else tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))
    )
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise DataError(
            f"{name}: label {outside[0]} is outside the {len(classes)} classes"
            f" ({plural(len(outside), 'such row')})."
        )
    return classes, labels
