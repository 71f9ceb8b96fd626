"""Parquet and arrow: Hugging Face's layout, other layouts, and what is wrong with them."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitdistill.data.sources import table as table_module
from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, DataError, UserError

NAMES = ["cat", "dog", "eel"]


@pytest.fixture
def rows(picture) -> Any:
    """``rows(count)``: encoded images and labels."""

    def make(count: int) -> tuple[list[bytes], list[int]]:
        images = []
        for i in range(count):
            buffer = io.BytesIO()
            picture(i).save(buffer, "PNG")
            images.append(buffer.getvalue())
        return images, [i % 3 for i in range(count)]

    return make


def hugging_face(images: list[bytes], labels: list[int], **more: list[int]) -> pa.Table:
    """A table as the datasets library writes it."""
    kind = {"names": NAMES, "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": kind, **dict.fromkeys(more, kind)}
    cells = pa.array([{"bytes": b, "path": None} for b in images])
    table = pa.table({"image": cells, "label": pa.array(labels), **more})
    text = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({b"huggingface": text.encode()})


def write_arrow(table: pa.Table, path: Path, stream: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
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


def test_parquet_as_on_the_hub(tmp_path: Path, picture, rows) -> None:
    (tmp_path / "data").mkdir()
    images, labels = rows(7)
    for part, span in enumerate((slice(0, 4), slice(4, 7))):
        path = tmp_path / "data" / f"train-0000{part}-of-00002.parquet"
        pq.write_table(hugging_face(images[span], labels[span]), path, row_group_size=2)
    pq.write_table(hugging_face(*rows(3)), tmp_path / "data" / "test-00000-of-00001.parquet")
    for location in (str(tmp_path), f"hfds/{tmp_path}"):
        check(open_source(location, "train"), picture, 7)
        check(open_source(location, "val", classes=tuple(NAMES)), picture, 3)


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_as_saved_to_disk(tmp_path: Path, picture, rows, stream: bool) -> None:
    write_arrow(hugging_face(*rows(5)), tmp_path / "train" / "data-00000-of-00001.arrow", stream)
    write_arrow(
        hugging_face(*rows(4)), tmp_path / "validation" / "data-00000-of-00001.arrow", stream
    )
    write_arrow(hugging_face(*rows(3)), tmp_path / "test" / "data-00000-of-00001.arrow", stream)
    check(open_source(str(tmp_path), "train"), picture, 5)
    check(open_source(str(tmp_path), "val"), picture, 4)


def test_one_file(tmp_path: Path, picture, rows) -> None:
    path = tmp_path / "flowers.parquet"
    pq.write_table(hugging_face(*rows(4)), path)
    check(open_source(str(path), "train"), picture, 4)
    with pytest.raises(DataError, match="'val'"):
        open_source(str(path), "val")
    path.rename(tmp_path / "flowers-val.parquet")
    check(open_source(str(tmp_path / "flowers-val.parquet"), "val"), picture, 4)
    with pytest.raises(DataError, match="'train'"):
        open_source(str(tmp_path / "flowers-val.parquet"), "train")


def test_plain_columns(tmp_path: Path, picture, rows) -> None:
    images, labels = rows(6)
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"img": images, "label": labels}), path)
    check(open_source(str(path), "train"), picture, 6, ("0", "1", "2"))
    pq.write_table(pa.table({"img": images, "label": [NAMES[i] for i in labels]}), path)
    check(open_source(str(path), "train"), picture, 6)
    pq.write_table(pa.table({"img": images}), path)
    source = open_source(str(path), "train")
    assert source.classes == () and source.labels.tolist() == [-1] * 6


def test_columns_can_be_chosen(tmp_path, picture, rows):
    images, labels = rows(6)
    path, table = tmp_path / "x.parquet", hugging_face(images, [0] * 6, fine=labels)
    text = table.schema.metadata[b"huggingface"].replace(b'"label"', b'"coarse"')
    table = table.rename_columns(["image", "coarse", "fine"])
    pq.write_table(table.replace_schema_metadata({b"huggingface": text}), path)
    check(open_source(f"{path}?label=fine", "train"), picture, 6)
    for query, word in (("", "choose"), ("?label=nothing", "nothing"), ("?lable=fine", "lable")):
        with pytest.raises(ConfigError, match=word):
            open_source(f"{path}{query}", "train")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"x": [1, 2], "label": [0, 1]}, "no image column"),
        ({"image": [b"x", b""], "label": [0, 1]}, "row 1"),
        ({"image": pa.array([None, b"x"], pa.binary()), "label": [0, 1]}, "row 0"),
        ({"image": [b"x", b"x"], "label": [0, None]}, "1 row"),
        ({"image": [b"x", b"x"], "label": [0.5, 1.0]}, "double"),
        ({"image": [b"x", b"x"], "label": [0, -1]}, "-1"),
    ],
)
def test_what_is_wrong_with_columns(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=words):
        open_source(str(tmp_path / "x.parquet"), "train")


def test_damaged_and_large_files(tmp_path: Path, rows, monkeypatch) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(hugging_face(*rows(4)), path)
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"x" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            open_source(str(path), "train")
    path.write_bytes(content)
    monkeypatch.setattr(table_module, "MAX_PARQUET_BYTES", 100)
    with pytest.raises(DataError, match="save_to_disk"):
        open_source(str(path), "train")


def test_what_is_wrong_with_rows_and_tables(tmp_path, rows):
    images, labels = rows(4)
    path = tmp_path / "train-0.parquet"
    for label in (3, -1):
        pq.write_table(hugging_face(images, [0, label, 0, 0]), path)
        with pytest.raises(DataError, match=f"label {label} "):
            open_source(str(path), "train")
    pq.write_table(hugging_face([images[0], images[1][:50], *images[2:]], labels), path)
    with pytest.raises(DataError, match=r"train-0\.parquet \(train\): row 1: "):
        open_source(str(path), "train").load(1)
    pq.write_table(pa.table({"image": images, "other": labels}), tmp_path / "train-1.parquet")
    with pytest.raises(DataError, match="columns"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("module", "location"), [("pyarrow", "x.parquet"), ("datasets", "hfds/some/name")]
)
def test_a_missing_extra_is_answered_with_its_install_line(
    tmp_path, rows, monkeypatch, module, location
):
    pq.write_table(hugging_face(*rows(3)), tmp_path / "x.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r'vitdistill\[data\]"'):
        open_source(location, "train")
