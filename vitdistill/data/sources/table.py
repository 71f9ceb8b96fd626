"""Images in tables: parquet and arrow files in Hugging Face's layout, from disk or from the hub.

An image column holds structs ``{bytes, path}`` or plain bytes; class names come from the
``ClassLabel`` feature that Hugging Face keeps in the schema. Arrow files are memory-mapped; parquet
has no random access and is read into memory.
"""

import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from ...errors import ConfigError, DataError, MissingSplit, UserError
from ...keyed import I64
from ...messages import listed, plural, printable, suggest
from .base import SPLIT_NAMES, ImageSource, Split, split_options
from .decode import decode_image, image_size

TABLE_SUFFIXES = frozenset((".parquet", ".arrow"))
"""File names that are read as tables."""

MAX_PARQUET_BYTES = 16 * 2**30
"""Parquet files of one split above this total are refused: they would be held in memory."""

_SPLIT_WORDS: dict[Split, tuple[tuple[str, ...], ...]] = {
    "train": (("train", "training"),),
    "val": (("val", "valid", "validation", "dev"), ("test", "testing")),
}
_OPTIONS = ("image", "label")


def open_table(location: str, split: Split) -> ImageSource | None:
    """Open the split of a table file or a folder of them; None where there is no table.

    ``?image=COLUMN&label=COLUMN`` behind the path chooses among several columns.
    """
    path, options = split_options(location)
    root = Path(path).expanduser()
    if not (_is_table(root) or _is_table_folder(root)):
        return None
    files = _files_of_split(root, split)
    name = f"{printable(root)} ({split})"
    parquet = sum(f.stat().st_size for f in files if f.suffix.lower() == ".parquet")
    if parquet > MAX_PARQUET_BYTES:
        raise DataError(
            f"{name} has {parquet >> 30} GiB of parquet, which would be held in memory",
            "save it as arrow with datasets.load_dataset(...).save_to_disk(...)",
        )
    arrow = _extra("pyarrow")
    tables = [_read_table(arrow, file) for file in files]
    columns = _columns(name, tables[0].schema, options)
    chosen = [column for column in columns if column is not None]
    try:
        table = arrow.concat_tables([table.select(chosen) for table in tables])
    except (arrow.ArrowInvalid, KeyError) as error:
        reason = printable(str(error))
        raise DataError(f"the tables of {name} have different columns ({reason})") from error
    return TableSource(name, table, *columns)


def open_hub(location: str, split: Split) -> ImageSource | None:
    """Open ``hfds/NAME`` of the Hugging Face hub through the ``datasets`` library and its cache.

    None for another location; ``hfds/FOLDER`` is read as a folder of tables.
    """
    path, options = split_options(location)
    kind, _, name = path.partition("/")
    if kind != "hfds":
        return None
    if Path(name).expanduser().exists():
        return open_table(location.partition("/")[2], split)
    datasets = _extra("datasets")
    try:
        found = datasets.get_dataset_split_names(name)
        chosen = next((s for words in _SPLIT_WORDS[split] for s in found if s in words), None)
        table = None if chosen is None else datasets.load_dataset(name, split=chosen).data.table
    except Exception as error:
        reason = printable(" ".join(str(error).split()))[:160]
        raise DataError(
            f"{printable(path)} could not be loaded ({reason})",
            "check its name and the network",
            field="data.dir",
        ) from error
    if table is None:
        raise MissingSplit(
            f"{printable(path)} has no {split} split, but {listed(found, 5)}", field="data.dir"
        )
    return TableSource(
        f"{printable(path)} ({chosen})", table, *_columns(path, table.schema, options)
    )


class TableSource(ImageSource):
    """The rows of a pyarrow table with an image column and, mostly, a label column."""

    def __init__(self, name: str, table: Any, image: str, label: str | None) -> None:
        """Read the labels. Raises `DataError` for rows without an image or a class."""
        arrow, compute = _extra("pyarrow"), _extra("pyarrow.compute")
        self.name = name
        column = table.column(image)
        self._bytes = (
            compute.struct_field(column, "bytes") if arrow.types.is_struct(column.type) else column
        )
        sizes = compute.fill_null(compute.binary_length(self._bytes), 0)
        self.sizes = np.asarray(sizes.to_numpy(), dtype=np.int64)
        if not self.sizes.all():
            raise DataError(
                f"{name}: the image of row {self.sizes.argmin()} has no bytes", "embed the images"
            )
        self.classes, self.labels = _labels(name, table, label)

    def key(self, i: int) -> str:
        """Return the row number."""
        return f"{i:08d}"

    def load(self, i: int) -> Image.Image:
        """Decode the image of row ``i``."""
        return decode_image(self._bytes[i].as_py(), f"{self.name}: row {i}")

    def image_size(self, i: int) -> tuple[int, int]:
        """Return (width, height) from the image's header."""
        return image_size(self._bytes[i].as_py(), f"{self.name}: row {i}")


def _extra(module: str) -> ModuleType:
    """Import a module of the optional extra ``data``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"reading this data set needs {module.split('.')[0]}",
            'pip install "vitdistill[data]"',
            field="data.dir",
        ) from error


def _is_table(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return path.suffix.lower() in TABLE_SUFFIXES and not hidden and path.is_file()


def _is_table_folder(root: Path) -> bool:
    """Whether tables lie in ``root``, in its ``data`` folder or in the folder of a split."""
    splits = (root / name for names in SPLIT_NAMES.values() for name in names)
    places = (root, root / "data", *splits)
    return any(_is_table(path) for place in places if place.is_dir() for path in place.iterdir())


def _files_of_split(root: Path, split: Split) -> list[Path]:
    """Find the files whose name or folder says the split.

    Where no file says any split, all of them are training data.
    """
    files = sorted(p for p in root.rglob("*") if _is_table(p)) if root.is_dir() else [root]

    def words(file: Path) -> set[str]:
        path = str(file.relative_to(root)) if root.is_dir() else file.name
        return set(re.split(r"[^a-z]+", path.lower()))

    for group in _SPLIT_WORDS[split]:
        chosen = [f for f in files if words(f) & set(group)]
        if chosen:
            return chosen
    known = {word for groups in _SPLIT_WORDS.values() for group in groups for word in group}
    if split == "train" and not any(words(f) & known for f in files):
        return files
    found = listed((f.name for f in files), 5)
    raise MissingSplit(
        f"{printable(root)} has no table whose name says {split!r}, but {found}", field="data.dir"
    )


def _read_table(arrow: ModuleType, file: Path) -> Any:
    try:
        if file.suffix.lower() == ".parquet":
            return _extra("pyarrow.parquet").read_table(file, partitioning=None)
        mapped = arrow.memory_map(str(file))
        try:
            return arrow.ipc.open_stream(mapped).read_all()
        except arrow.ArrowInvalid:
            mapped.seek(0)
            return arrow.ipc.open_file(mapped).read_all()
    except (arrow.ArrowException, OSError) as error:
        reason = printable(str(error).split("\n")[0])[:120]
        raise DataError(
            f"{printable(file)} is damaged or not a table ({reason})", "replace it"
        ) from error


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Read Hugging Face's description of the columns; {} where there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _columns(name: str, schema: Any, options: dict[str, str]) -> tuple[str, str | None]:
    """Choose the image and the label column. Raises `ConfigError` where ``options`` must say."""
    for option, column in options.items():
        if option not in _OPTIONS:
            raise ConfigError(
                f"unknown option {printable(option)!r} behind {name}",
                suggest(option, _OPTIONS),
                field="data.dir",
            )
        if column not in schema.names:
            raise ConfigError(
                f"{name} has no column {printable(column)!r}",
                suggest(column, schema.names),
                field="data.dir",
            )
    types = _extra("pyarrow").types
    kinds = {column: feature.get("_type") for column, feature in _features(schema).items()}

    def holds_images(column: str) -> bool:
        kind = schema.field(column).type
        is_struct = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return kinds.get(column) == "Image" or is_struct or types.is_binary(kind)

    images = [c for c in schema.names if holds_images(c)]
    labels = [c for c in schema.names if kinds.get(c) == "ClassLabel"]
    labels = labels or [c for c in schema.names if c in ("label", "labels", "fine_label")]
    image = options.get("image") or _only(name, "image", images, ("image", "img"))
    if image is None:
        raise DataError(f"{name} has no image column, but {listed(schema.names, 8)}")
    return image, options.get("label") or _only(name, "label", labels, ("label", "labels"))


def _only(name: str, role: str, found: Sequence[str], preferred: Sequence[str]) -> str | None:
    if len(found) < 2:
        return found[0] if found else None
    best = [c for c in found if c in preferred]
    if len(best) == 1:
        return best[0]
    raise ConfigError(
        f"{name} has several {role} columns, {listed(found, 8)}",
        f"choose with ?{role}=COLUMN",
        field="data.dir",
    )


def _labels(name: str, table: Any, label: str | None) -> tuple[tuple[str, ...], I64]:
    """Read class names and labels.

    Names come from the schema, from string labels, or are the numbers themselves.
    """
    types = _extra("pyarrow").types
    if label is None:
        return (), np.full(table.num_rows, -1, dtype=np.int64)
    column = table.column(label)
    names = _features(table.schema).get(label, {}).get("names")
    if column.null_count:
        raise DataError(f"{name}: {label!r} is empty in {plural(column.null_count, 'row')}")
    if types.is_string(column.type) or types.is_large_string(column.type):
        values = column.to_pylist()
        classes = tuple(names or sorted(set(values)))
        index = {c: i for i, c in enumerate(classes)}
        labels = np.array([index.get(v, -1) for v in values], dtype=np.int64)
    elif types.is_integer(column.type):
        labels = np.asarray(column.to_numpy(), dtype=np.int64)
        classes = tuple(names or map(str, range(int(labels.max(initial=-1)) + 1)))
    else:
        raise DataError(f"{name}: {label!r} has {column.type} values, not whole numbers or names")
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(outside):
        value = printable(str(column[int(outside[0])].as_py()))
        raise DataError(f"{name}: label {value} is outside the {len(classes)} classes")
    return classes, labels
