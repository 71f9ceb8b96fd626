"""Parquet and arrow: Hugging Face's layout, other layouts, and what is wrong with them."""

import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitdistill.data.sources import table as table_module
from vitdistill.data.sources.decode import DamagedImage
from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, DataError, UserError

NAMES = ["cat", "dog", "eel"]


@pytest.fixture
def rows(picture) -> Any:
    """``rows(count)``: encoded images and labels."""

    def encoded(i: int) -> bytes:
        buffer = io.BytesIO()
        picture(i).save(buffer, "PNG")
        return buffer.getvalue()

    return lambda count: ([encoded(i) for i in range(count)], [i % 3 for i in range(count)])


def hugging_face(images: list[bytes], labels: list[int]) -> pa.Table:
    """A table as the datasets library writes it."""
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    cells = pa.array([{"bytes": b, "path": None} for b in images])
    table = pa.table({"image": cells, "label": pa.array(labels)})
    text = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({b"huggingface": text.encode()})


def write(table: pa.Table, path: Path, stream: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
        return
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def check(source: Any, picture: Any, count: int, classes: tuple[str, ...] = tuple(NAMES)) -> None:
    assert len(source) == count and source.classes == classes
    assert source.labels.tolist() == [i % 3 for i in range(count)]
    assert source.labels.dtype == np.int64
    for i in range(count):
        assert source.load(i).tobytes() == picture(i).tobytes()
        assert source.image_size(i) == (32, 32)
    assert source.key(1) != source.key(2) and len(source.fingerprint()) == 64


def refused(location: str, words: str, kind: type[UserError] = DataError, split="train") -> None:
    with pytest.raises(kind, match=words):
        open_source(location, split)


def test_parquet_as_on_the_hub(tmp_path: Path, picture, rows) -> None:
    images, labels = rows(7)
    for part, span in enumerate((slice(0, 4), slice(4, 7))):
        path = tmp_path / "data" / f"train-0000{part}-of-00002.parquet"
        write(hugging_face(images[span], labels[span]), path)
    write(hugging_face(*rows(3)), tmp_path / "data" / "test-00000-of-00001.parquet")
    check(open_source(str(tmp_path), "train"), picture, 7)
    check(open_source(str(tmp_path), "val", classes=tuple(NAMES)), picture, 3)


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_as_saved_to_disk(tmp_path: Path, picture, rows, stream: bool) -> None:
    for split, count in (("train", 5), ("validation", 4), ("test", 3)):
        path = tmp_path / split / "data-00000-of-00001.arrow"
        write(hugging_face(*rows(count)), path, stream)
    check(open_source(str(tmp_path), "train"), picture, 5)
    check(open_source(str(tmp_path), "val"), picture, 4)


def test_folders_that_datasets_worked_in(tmp_path: Path, picture, rows) -> None:
    """What ``map`` and ``shuffle`` keep beside a saved set is none of its images."""
    state = json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    for split, count in (("train", 5), ("test", 3)):
        write(hugging_face(*rows(count)), tmp_path / split / "data-00000-of-00001.arrow")
        (tmp_path / split / "state.json").write_text(state)
        for name in ("cache-1a2b3c.arrow", "data-00001-of-00002.arrow"):
            write(hugging_face(*rows(count)), tmp_path / split / name)
        write(pa.table({"indices": [2, 1, 0]}), tmp_path / split / "cache-9f.arrow")
    for place, split, count in (("", "train", 5), ("", "val", 3), ("train", "train", 5)):
        check(open_source(str(tmp_path / place), split), picture, count)
    (tmp_path / "train" / "state.json").write_text("{")
    refused(str(tmp_path), "state.json is damaged")
    (tmp_path / "train" / "state.json").unlink()  # as in the library's cache
    (tmp_path / "train" / "data-00001-of-00002.arrow").unlink()
    check(open_source(str(tmp_path), "train"), picture, 5)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "eval", "test", "testing"])
@pytest.mark.parametrize(
    "layout", ["data/{}-00000-of-00001.parquet", "{}/0.parquet", "x_{}.parquet"]
)
def test_names_of_splits(tmp_path: Path, picture, rows, name: str, layout: str) -> None:
    write(hugging_face(*rows(5)), tmp_path / layout.format("train"))
    write(hugging_face(*rows(3)), tmp_path / layout.format(name))
    check(open_source(str(tmp_path), "train"), picture, 5)
    val = open_source(str(tmp_path), "val")
    check(val, picture, 3)
    assert len(val.notes) == (name != "val") and all(repr(name) in note for note in val.notes)


IMAGE_TYPES = [pa.binary(), pa.large_binary(), pa.binary_view(), "struct", "dictionary", "fixed"]
LABEL_TYPES = [
    *(pa.int8(), pa.uint8(), pa.int32(), pa.uint64(), pa.float32()),
    *(pa.string(), pa.large_string(), pa.string_view(), "dictionary"),
]


@pytest.mark.parametrize("kind", IMAGE_TYPES, ids=str)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_types_of_images(tmp_path: Path, picture, rows, kind, suffix: str) -> None:
    images, labels = rows(6)
    if kind == "fixed":  # zeros behind an image are none of it
        size = max(map(len, images))
        kind, images = pa.binary(size), [image.ljust(size, b"\0") for image in images]
    if kind == "struct":
        cells = [{"bytes": image, "path": "x"} for image in images]
        column = pa.array(cells, pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))
    else:
        column = pa.array(images, pa.binary() if kind == "dictionary" else kind)
        column = column.dictionary_encode() if kind == "dictionary" else column
    write(pa.table({"image": column, "label": labels}), tmp_path / f"x.{suffix}")
    check(open_source(str(tmp_path / f"x.{suffix}"), "train"), picture, 6, ("0", "1", "2"))


@pytest.mark.parametrize("kind", LABEL_TYPES, ids=str)
def test_types_of_labels(tmp_path: Path, picture, rows, kind) -> None:
    images, labels = rows(6)
    is_text = kind == "dictionary" or "string" in str(kind)
    column = pa.array([NAMES[i] for i in labels] if is_text else labels)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    write(pa.table({"image": images, "label": column}), tmp_path / "x.arrow")
    classes = tuple(NAMES) if is_text else ("0", "1", "2")
    check(open_source(str(tmp_path / "x.arrow"), "train"), picture, 6, classes)


@pytest.mark.parametrize(
    "ids", [(1440764, 1443537, 2056570), (1, 2, 3), (0, 5, 7), (3, 20, 100), (0, 2**40, 2**62)]
)
def test_numbers_that_are_ids(tmp_path: Path, picture, rows, ids: tuple[int, ...]) -> None:
    """The distinct numbers are the classes, in their order as numbers."""
    images, labels = rows(6)
    write(pa.table({"image": images, "label": [ids[i] for i in labels]}), tmp_path / "x.parquet")
    check(open_source(str(tmp_path / "x.parquet"), "train"), picture, 6, tuple(map(str, ids)))


def named(names: list[object], rows: Any) -> pa.Table:
    table = hugging_face(*rows(6))
    text = json.loads(table.schema.metadata[b"huggingface"])
    text["info"]["features"]["label"]["names"] = names
    return table.replace_schema_metadata({b"huggingface": json.dumps(text).encode()})


def test_class_names_that_are_numbers_or_come_twice(tmp_path: Path, picture, rows) -> None:
    path = tmp_path / "x.parquet"
    write(named([10, 2.5, True], rows), path)
    check(open_source(str(path), "train"), picture, 6, ("10", "2.5", "True"))
    for names in (["cat", "dog", "cat"], [1, "1", 2]):
        write(named(names, rows), path)
        refused(str(path), "two classes of one name")


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (("train", "validation", "test"), "train", "validation"),
        (("train", "test"), "train", "test"),
        (("test", "train", "valid"), "train", "valid"),
        (("part1", "part2"), "part1+part2", None),
    ],
)
def test_splits_on_the_hub(monkeypatch, picture, rows, names, train, val) -> None:
    asked: list[str] = []

    def load(name: str, split: str) -> SimpleNamespace:
        asked.append(split)
        return SimpleNamespace(data=SimpleNamespace(table=hugging_face(*rows(4))))

    hub = ModuleType("datasets")
    vars(hub).update(get_dataset_split_names=lambda name: names, load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    check(open_source("hfds/some/name", "train"), picture, 4)
    if val is None:
        refused("hfds/some/name", "no 'val'", split="val")
        assert asked == [train]
    else:
        assert len(open_source("hfds/some/name", "val").notes) == 1 and asked == [train, val]


def test_one_file(tmp_path: Path, picture, rows) -> None:
    path = tmp_path / "flowers.parquet"
    write(hugging_face(*rows(4)), path)
    check(open_source(str(path), "train"), picture, 4)
    refused(str(path), "'val'", split="val")
    path = path.rename(tmp_path / "flowers-val.parquet")
    check(open_source(str(path), "val"), picture, 4)
    refused(str(path), "'train'")


def test_plain_columns(tmp_path: Path, picture, rows) -> None:
    images, labels = rows(6)
    path = tmp_path / "x.parquet"
    write(pa.table({"img": images, "label": labels}), path)
    check(open_source(str(path), "train"), picture, 6, ("0", "1", "2"))
    write(pa.table({"img": images, "label": [NAMES[i] for i in labels]}), path)
    check(open_source(str(path), "train"), picture, 6)
    write(pa.table({"img": images}), path)
    source = open_source(str(path), "train")
    assert source.classes == () and source.labels.tolist() == [-1] * 6


def test_columns_can_be_chosen(tmp_path: Path, picture, rows) -> None:
    images, labels = rows(6)
    path = tmp_path / "x.parquet"
    names = [NAMES[i] for i in labels]
    write(pa.table({"left": images, "right": images, "label": labels, "fine": names}), path)
    check(open_source(f"{path}?label=fine&image=right", "train"), picture, 6)
    for query, word in (("", "choose"), ("?label=nothing", "nothing"), ("?lable=fine", "lable")):
        refused(f"{path}{query}", word, ConfigError)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"x": [1, 2], "label": [0, 1]}, "no image column"),
        ({"image": [b"x", b"x"], "label": [0, None]}, "1 row"),
        ({"image": [b"x", b"x"], "label": [0.5, 1.0]}, "double"),
        ({"image": [b"x", b"x"], "label": [0, -1]}, "-1"),
    ],
)
def test_what_is_wrong_with_columns(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    write(pa.table(columns), tmp_path / "x.parquet")
    refused(str(tmp_path / "x.parquet"), words)


def test_damaged_and_large_files(tmp_path: Path, rows, monkeypatch) -> None:
    path = tmp_path / "train.parquet"
    write(hugging_face(*rows(4)), path)
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"x" * 1000):
        path.write_bytes(damaged)
        refused(str(path), "damaged")
    path.write_bytes(content)
    monkeypatch.setattr(table_module, "MAX_PARQUET_BYTES", 100)
    refused(str(path), "save_to_disk")


def test_what_is_wrong_with_rows_and_tables(tmp_path, rows):
    images, labels = rows(4)
    path = tmp_path / "train-0.parquet"
    for label in (3, -1):
        write(hugging_face(images, [0, label, 0, 0]), path)
        refused(str(path), f"label {label} ")
    for damaged in (images[1][:50], b"", None):
        write(hugging_face([images[0], damaged, *images[2:]], labels), path)
        with pytest.raises(DamagedImage, match=r"train-0\.parquet \(train\): row 1: "):
            open_source(str(path), "train").load(1)
    write(pa.table({"image": images, "other": labels}), tmp_path / "train-1.parquet")
    refused(str(tmp_path), "columns")


@pytest.mark.parametrize(
    ("module", "location"), [("pyarrow", "x.parquet"), ("datasets", "hfds/some/name")]
)
def test_a_missing_extra_is_answered_with_its_install_line(
    tmp_path, rows, monkeypatch, module, location
):
    write(hugging_face(*rows(3)), tmp_path / "x.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    refused(location, r'vitdistill\[data\]"', UserError)
