"""Images in tables: parquet and arrow files in Hugging Face's layout, from disk or from the hub.

An image column holds structs ``{bytes, path}`` or plain bytes; class names come from the
``ClassLabel`` feature that Hugging Face keeps in the schema. Arrow files are memory-mapped; parquet
has no random access and is read into memory.
"""

import importlib
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import ConfigError, DataError, MissingSplit, UserError
from ...keyed import I64
from ...messages import listed, plural, printable, suggest
from ...storage.hub import settle_network
from .base import (
    ALL_SPLIT_NAMES,
    EncodedSource,
    ImageSource,
    Split,
    choose_split,
    is_hidden,
    split_options,
)

MAX_PARQUET_BYTES = 16 * 2**30
"""Parquet files of one split above this total are refused: they would be held in memory."""

_OPTIONS = ("image", "label")


def open_table(location: str, split: Split) -> ImageSource | None:
    """Open the split of a table file or a folder of them; None where there is no table.

    ``?image=COLUMN&label=COLUMN`` behind the path chooses among several columns.
    """
    path, options = split_options(location)
    root = Path(path).expanduser()
    if not (_is_table(root) or _is_table_folder(root)):
        return None
    files, notes = _files_of_split(root, split)
    name = f"{printable(root)} ({split})"
    parquet = sum(f.stat().st_size for f in files if f.suffix.lower() == ".parquet")
    if parquet > MAX_PARQUET_BYTES:
        what = f"{name} has {parquet >> 30} GiB of parquet, which would be held in memory"
        raise DataError(what, "save it as arrow with datasets.load_dataset(...).save_to_disk(...)")
    arrow = import_extra("pyarrow")
    tables = [_read_table(arrow, file) for file in files]
    columns = [c for c in _columns(name, tables[0].schema, options) if c is not None]
    try:
        table = arrow.concat_tables([table.select(columns) for table in tables])
    except (arrow.ArrowInvalid, KeyError) as error:
        reason = str(error)
        raise DataError(f"the tables of {name} have different columns ({reason})") from error
    return TableSource(name, table, *columns, notes=notes)


def open_hub(location: str, split: Split) -> ImageSource | None:
    """Open ``hfds/NAME`` of the Hugging Face hub through the ``datasets`` library and its cache.

    None for another location.
    """
    path, options = split_options(location)
    kind, _, name = path.partition("/")
    if kind != "hfds":
        return None
    settle_network()
    datasets = import_extra("datasets")
    try:
        found = datasets.get_dataset_split_names(name)
        chosen, notes = choose_split(printable(path), split, found)
        everything = "+".join(found)
        table = datasets.load_dataset(name, split=chosen or everything).data.table
    except MissingSplit:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        what = f"{path} could not be loaded ({reason})"
        raise DataError(what, "check its name and the network", field="data.dir") from error
    columns = _columns(path, table.schema, options)
    return TableSource(f"{printable(path)} ({chosen})", table, *columns, notes=notes)


class TableSource(EncodedSource):
    """The rows of a pyarrow table with an image column and, mostly, a label column."""

    def __init__(
        self,
        name: str,
        table: Any,
        image: str,
        label: str | None = None,
        *,
        notes: tuple[str, ...] = (),
    ) -> None:
        arrow, compute = import_extra("pyarrow"), import_extra("pyarrow.compute")
        self.name, self.notes = name, notes
        column = table.column(image)
        if arrow.types.is_struct(column.type):
            column = compute.struct_field(column, "bytes")
        self._bytes = column.cast(arrow.large_binary())  # of whatever size, layout or dictionary
        sizes = compute.fill_null(compute.binary_length(self._bytes), 0)
        self.sizes = np.asarray(sizes.to_numpy(), dtype=np.int64)
        self.classes, self.labels = _labels(name, table, label)

    def key(self, i: int) -> str:
        return f"{i:08d}"

    def content(self, i: int) -> bytes:
        return self._bytes[i].as_py() or b""

    def title(self, i: int) -> str:
        return f"{self.name}: row {i}"


def import_extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"tables need {module.split('.')[0]}"
        raise UserError(what, 'pip install "vitdistill[data]"') from error


def _is_table(path: Path) -> bool:
    is_named = path.suffix.lower() in (".parquet", ".arrow") and not is_hidden(path.name)
    return is_named and path.is_file() and path.name in _files_in_use(path.parent, path.name)


def _files_in_use(folder: Path, name: str) -> Collection[str]:
    """Return the files that ``datasets`` lists for a folder; without a list, ``name`` alone.

    Others are caches of ``map`` and ``shuffle``, and parts of earlier versions.
    """
    try:
        state = json.loads((folder / "state.json").read_bytes())
        return {file["filename"] for file in state["_data_files"]}
    except FileNotFoundError:
        return () if name.startswith(("cache-", "indices-")) else (name,)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{folder}/state.json is damaged"
        raise DataError(what, "save the set again") from error


def _is_table_folder(root: Path) -> bool:
    """Whether tables lie in ``root``, in its ``data`` folder or in the folder of a split."""
    names = (".", "data", *ALL_SPLIT_NAMES)
    return any(_is_table(path) for name in names for path in (root / name).glob("*"))


def _files_of_split(root: Path, split: Split) -> tuple[list[Path], tuple[str, ...]]:
    """Do `choose_split`, and return the files whose path names that split.

    If no path names any split, all files are training data.
    """
    files = sorted(p for p in root.rglob("*") if _is_table(p)) if root.is_dir() else [root]
    place = root if root.is_dir() else root.parent
    words: dict[Path, frozenset[str]] = {}
    for file in files:
        inside = str(file.relative_to(place))
        if not is_hidden(inside):
            words[file] = ALL_SPLIT_NAMES & {*re.split(r"[^a-z]+", inside.lower())}
    chosen, notes = choose_split(printable(root), split, set().union(*words.values()))
    return [file for file, said in words.items() if not chosen or chosen in said], notes


def _read_table(arrow: ModuleType, file: Path) -> Any:
    try:
        if file.suffix.lower() == ".parquet":
            return import_extra("pyarrow.parquet").read_table(file, partitioning=None)
        mapped = arrow.memory_map(str(file))
        try:
            return arrow.ipc.open_stream(mapped).read_all()
        except arrow.ArrowInvalid:
            mapped.seek(0)
            return arrow.ipc.open_file(mapped).read_all()
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0][:120]
        what = f"{file} is damaged or not a table ({reason})"
        raise DataError(what, "replace it") from error


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
        word, known = (column, schema.names) if option in _OPTIONS else (option, _OPTIONS)
        if word not in known:
            what = f"{name} cannot be read with {f'{option}={column}'!r}"
            raise ConfigError(what, suggest(word, known), field="data.dir")
    types = import_extra("pyarrow").types
    kinds = {column: feature.get("_type") for column, feature in _features(schema).items()}

    def holds_images(column: str) -> bool:
        kind = schema.field(column).type
        if types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return "binary" in str(kind)  # of whatever size, layout or dictionary

    images = [c for c in schema.names if holds_images(c)]
    images = [c for c in images if kinds.get(c) == "Image"] or images
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
    what = f"{name} has several {role} columns, {listed(found, 8)}"
    raise ConfigError(what, f"choose with ?{role}=COLUMN", field="data.dir")


def _labels(name: str, table: Any, label: str | None) -> tuple[tuple[str, ...], I64]:
    """Read class names and labels.

    Names come from the schema, or are the distinct values: texts, or numbers from 0 on.
    """
    arrow = import_extra("pyarrow")
    if label is None:
        return (), np.full(table.num_rows, -1, dtype=np.int64)
    column = table.column(label)
    if column.null_count:
        raise DataError(f"{name}: {label!r} is empty in {plural(column.null_count, 'row')}")
    is_text = "string" in str(column.type)
    try:
        values = column.cast(arrow.large_string() if is_text else arrow.int64()).to_pylist()
    except arrow.ArrowException as error:
        what = f"{name}: {label!r} has {column.type} values, not whole numbers or names"
        raise DataError(what) from error
    said = _features(table.schema).get(label, {}).get("names")
    names = said or sorted(v for v in set(values) if is_text or v >= 0)
    classes = tuple(map(str, names))
    # With names from the schema, numbers are indices into them.
    places = range(len(names)) if said and not is_text else names
    index = {value: i for i, value in enumerate(places)}
    labels = np.array([index.get(v, -1) for v in values], dtype=np.int64)
    if (labels < 0).any():
        value = printable(str(values[int(labels.argmin())]))
        raise DataError(f"{name}: label {value} is outside the {len(classes)} classes")
    return classes, labels
