"""Answers as NPZ and Parquet: what is written is what is stored, bit for bit, and what cannot be
read is named in one sentence.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vitdistill.errors import ConfigError, DataError, UserError
from vitdistill.labels.encoding import Layout, LogitEncoding
from vitdistill.labels.exchange import AnswerFile, export_labels, open_answers, read_class_names
from vitdistill.labels.store import LabelStore, Manifest

COUNTER = itertools.count()
SUFFIXES = ("npz", "parquet")


def encoding(
    kind: str, classes: int, k: int = 2, temperatures: tuple[float, ...] = (2.0,)
) -> LogitEncoding:
    sparse: dict[str, Any] = (
        {"k": k, "temperatures": temperatures} if kind in ("topk", "sampled") else {}
    )
    return LogitEncoding(kind=kind, num_classes=classes, **sparse)  # type: ignore[arg-type]


def make_store(
    folder: Path,
    logits: LogitEncoding,
    samples: int = 7,
    views: int = 2,
    part_size: int = 3,
    without: Any = (),
    seed: int = 0,
) -> tuple[LabelStore, np.ndarray]:
    """A store, and the (V, N, C) logits that were put into it."""
    random = np.random.default_rng(seed)
    true = random.normal(0, 4, (views, samples, logits.num_classes)).astype(np.float32)
    true[0, 0, 0] = -0.0
    layout = Layout(logits=logits)
    names = [f"class é{i}" for i in range(logits.num_classes)]
    manifest = Manifest(
        identity={"seed": 0},
        layout=layout,
        num_samples=samples,
        num_views=views,
        part_size=part_size,
        about={"classes": names},
    )
    store = LabelStore.create(folder / f"store{next(COUNTER)}", manifest)
    for view, part in list(store.missing_parts()):
        if (view, part) not in without:
            rows = np.arange(*store.part_range(part))
            pixels = (view * 1000 + rows + 2**31).astype(np.uint32)
            store.seal(
                view,
                part,
                layout.encode(
                    torch.from_numpy(true[view, rows]), {}, None, pixels, rows.astype(np.uint64)
                ),
            )
    return store, true


def columns(path: Path) -> dict[str, np.ndarray]:
    """All columns of an exported file."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    table = pq.read_table(path)
    found = {name: np.array(table.column(name).to_pylist()) for name in table.column_names}
    metadata = table.schema.metadata or {}
    return {**found, "classes": np.array(json.loads(metadata[b"classes"]))}


def together(file: AnswerFile) -> dict[str, Any]:
    """All rows of a file."""
    parts = list(file.rows())
    assert [part.first for part in parts] == np.cumsum([0, *(len(part.views) for part in parts)])[
        :-1
    ].tolist()
    samples = [
        part.samples if isinstance(part.samples, list) else part.samples.tolist() for part in parts
    ]
    return {
        "samples": list(itertools.chain(*samples)),
        "views": np.concatenate([part.views for part in parts]),
        "logits": np.concatenate([part.logits for part in parts]),
        "pixels": (
            None
            if parts[0].pixels is None
            else np.concatenate([part.pixels for part in parts if part.pixels is not None])
        ),
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(kind="float32", suffix="npz", classes=1, samples=1, views=1, part_size=1, seed=0)
@given(
    kind=st.sampled_from(["float32", "float16", "uint8", "topk"]),
    suffix=st.sampled_from(SUFFIXES),
    classes=st.integers(1, 5),
    samples=st.integers(1, 9),
    views=st.integers(1, 3),
    part_size=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_complete_labels_come_back(
    kind: str,
    suffix: str,
    classes: int,
    samples: int,
    views: int,
    part_size: int,
    seed: int,
    tmp_path: Path,
) -> None:
    logits = encoding(kind, classes, k=classes)
    store, true = make_store(tmp_path, logits, samples, views, part_size, seed=seed)
    path = tmp_path / f"labels{next(COUNTER)}.{suffix}"
    assert export_labels(store, path) == (samples * views, path.stat().st_size)
    file = open_answers(path)
    assert (file.num_rows, file.num_classes, file.precision) == (
        samples * views,
        classes,
        "float32",
    )
    assert file.classes == tuple(f"class é{i}" for i in range(classes))
    read = together(file)
    assert read["samples"] == list(range(samples)) * views
    assert read["views"].tolist() == np.repeat(range(views), samples).tolist()
    for view in range(views):
        stored = store.records(view, range(samples))
        rows = slice(view * samples, (view + 1) * samples)
        assert read["logits"][rows].tobytes() == stored.logits().numpy().tobytes()
        assert read["pixels"][rows].tolist() == stored.pixels.tolist()
        if kind == "float32":
            assert read["logits"][rows].tobytes() == true[view].tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("temperatures", [(2.0,), (0.5, 1.0, 2.5)])
def test_topk_columns_give_the_stored_distribution(
    suffix: str, temperatures: tuple[float, ...], tmp_path: Path
) -> None:
    store, true = make_store(tmp_path, encoding("topk", 6, 2, temperatures))
    export_labels(store, tmp_path / f"labels.{suffix}")
    found = columns(tmp_path / f"labels.{suffix}")
    names = {0.5: "tail_0.5", 1.0: "tail_1", 2.0: "tail_2", 2.5: "tail_2.5"}
    assert set(found) == {
        "sample_id",
        "view",
        "pixels",
        "class_ids",
        "values",
        "classes",
        *(names[t] for t in temperatures),
    }
    flat = true.reshape(-1, 6).astype(np.float64)
    assert np.array_equal(found["class_ids"], np.argsort(-flat, axis=1)[:, :2])
    assert (found["values"][:, 0] == 0).all()
    for t in temperatures:
        shares = np.exp(flat / t) / np.exp(flat / t).sum(1, keepdims=True)
        head = np.exp(found["values"] / t)
        tail = np.exp(found[names[t]])
        total = head.sum(1) + tail
        np.testing.assert_allclose(
            tail / total, 1 - np.take_along_axis(shares, found["class_ids"], 1).sum(1), atol=1e-5
        )
        np.testing.assert_allclose(
            head / total[:, None], np.take_along_axis(shares, found["class_ids"], 1), atol=3e-3
        )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_draws_are_written_as_they_are(suffix: str, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, encoding("sampled", 6, 9))
    export_labels(store, tmp_path / f"labels.{suffix}")
    found = columns(tmp_path / f"labels.{suffix}")
    stored = np.concatenate(
        [store.records(view, range(7)).fields["ids"].numpy() for view in range(2)]
    )
    assert np.array_equal(found["class_ids"], stored)
    assert set(found) == {"sample_id", "view", "pixels", "class_ids", "classes"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_chosen_views_alone_are_written_and_have_to_be_there(suffix: str, tmp_path: Path) -> None:
    store, true = make_store(tmp_path, encoding("float32", 3), views=3, without={(1, 0), (1, 2)})
    path = tmp_path / f"labels.{suffix}"
    with pytest.raises(
        DataError, match=r"lacks 2 of 9 parts .the first: part 0 of view 1.*label status"
    ):
        export_labels(store, path)
    with pytest.raises(ConfigError, match="has no view 3: its views are 0 to 2"):
        export_labels(store, path, [0, 3])
    assert list(tmp_path.glob("labels*")) == []
    export_labels(store, path, [2, 0, 2])
    read = together(open_answers(path))
    assert read["views"].tolist() == [0] * 7 + [2] * 7
    assert np.array_equal(read["logits"], true[[0, 2]].reshape(-1, 3))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_labels_make_equal_files_and_nothing_is_replaced(suffix: str, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, encoding("float32", 3))
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    export_labels(store, first)
    export_labels(store, second)
    assert first.read_bytes() == second.read_bytes()
    first.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_labels(store, first)
    assert first.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_damaged_part_is_not_exported(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, encoding("float32", 3))
    part = store.part_path(1, 0)
    data = bytearray(part.read_bytes())
    data[10] ^= 1
    part.write_bytes(data)
    with pytest.raises(DataError, match=r"part-00000.bin is damaged"):
        export_labels(store, tmp_path / "labels.parquet")
    assert not (tmp_path / "labels.parquet").exists()
    assert not list(tmp_path.glob(".tmp*"))


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, encoding("float32", 3))
    with pytest.raises(ConfigError, match=r"labels.csv is neither .npz nor .parquet"):
        export_labels(store, tmp_path / "labels.csv")
    size = 14 * (8 + 4 + 4 + 3 * 4)
    export_labels(store, tmp_path / "enough.npz", memory=2 * size)
    with pytest.raises(ConfigError, match=r"use .parquet"):
        export_labels(store, tmp_path / "labels.npz", memory=2 * size - 2)
    export_labels(store, tmp_path / "labels.parquet", memory=0)
    with pytest.raises(ConfigError, match=r"use .parquet"):
        open_answers(tmp_path / "enough.npz", memory=size)
    hidden = Manifest(identity={}, layout=Layout(hidden=((0, 1, 2),)), num_samples=1, num_views=1)
    with pytest.raises(ConfigError, match="holds no logits"):
        export_labels(LabelStore.create(tmp_path / "hidden", hidden), tmp_path / "hidden.npz")


def write(
    path: Path,
    arrays: dict[str, Any],
    types: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A file of these columns, as another program would write it."""
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        made = {}
        for name, values in arrays.items():
            items = list(values) if isinstance(values, np.ndarray) and values.ndim == 2 else values
            made[name] = pa.array(items, type=(types or {}).get(name))
        pq.write_table(pa.table(made).replace_schema_metadata(metadata), path, row_group_size=2)
    return path


LOGITS = np.arange(12, dtype=np.float32).reshape(4, 3) / 8


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_other_number_formats_and_a_missing_view_are_read(
    suffix: str, dtype: str, tmp_path: Path
) -> None:
    arrays = {
        "sample_id": np.array([3, 1, 0, 2], dtype=np.uint16),
        "logits": LOGITS.astype(dtype),
        "more": np.zeros(4),
    }
    file = open_answers(write(tmp_path / f"a.{suffix}", arrays))
    read = together(file)
    assert (file.precision, file.classes) == (dtype, None)
    assert (
        read["samples"] == [3, 1, 0, 2]
        and read["views"].tolist() == [0] * 4
        and read["pixels"] is None
    )
    assert read["logits"].dtype == np.float32 and np.array_equal(read["logits"], LOGITS)


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32(), 3), pa.list_(pa.float64()), pa.large_list(pa.float32())]
)
def test_every_kind_of_list_and_of_text_is_read(kind: Any, tmp_path: Path) -> None:
    keys = ["cat/ä.png", "b", "c", "d"]
    for text in (pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())):
        arrays = {"sample_id": keys, "view": [0, 1, 2, 3], "logits": LOGITS}
        path = write(
            tmp_path / "a.parquet",
            arrays,
            {"logits": kind, "sample_id": text},
            {"classes": '["x", "y", "z"]'},
        )
        file = open_answers(path)
        read = together(file)
        assert (
            read["samples"] == keys
            and read["views"].tolist() == [0, 1, 2, 3]
            and file.classes == ("x", "y", "z")
        )
        assert np.array_equal(read["logits"], LOGITS)


def test_keys_and_names_of_an_npz_may_be_bytes(tmp_path: Path) -> None:
    arrays = {
        "sample_id": np.char.encode(np.array(["ä", "b", "c", "d"]), "utf-8"),
        "logits": LOGITS,
        "classes": np.array([b"x", b"y", b"z"]),
    }
    file = open_answers(write(tmp_path / "a.npz", arrays))
    assert together(file)["samples"] == ["ä", "b", "c", "d"]
    assert file.classes == ("x", "y", "z")


def good(**changes: Any) -> dict[str, Any]:
    arrays = {
        "sample_id": np.arange(4),
        "view": np.zeros(4, dtype=np.int64),
        "logits": LOGITS,
        **changes,
    }
    return {name: values for name, values in arrays.items() if values is not None}


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (good(sample_id=None), "has no array 'sample_id'"),
        (good(logits=None, class_ids=LOGITS), "has no array 'logits'"),
        (good(logits=LOGITS.astype(np.int64)), r"logits of type int64 and shape \(4, 3\)"),
        (good(logits=LOGITS[:, 0]), r"logits of type float32 and shape \(4,\)"),
        (good(logits=LOGITS[:0], sample_id=np.arange(0), view=np.arange(0)), r"shape \(0, 3\)"),
        (good(view=np.zeros(3, dtype=int)), r"view of shape \(3,\) for 4 rows"),
        (good(view=np.zeros(4)), "view of type float64: give whole numbers"),
        (good(sample_id=np.zeros(4)), "sample_id of type float64"),
        (good(classes=np.array([1, 2, 3])), "classes of type int64"),
        (
            good(sample_id=np.array(["a", 1, 2, None], dtype=object)),
            "no .npz file of plain arrays .Object arrays cannot be loaded",
        ),
    ],
)
def test_wrong_arrays_are_named(arrays: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=sentence):
        open_answers(write(tmp_path / "a.npz", arrays))


@pytest.mark.parametrize(
    ("arrays", "metadata", "sentence"),
    [
        (good(sample_id=None), {}, "has no column 'sample_id', only view, logits"),
        (
            good(logits=None, class_ids=LOGITS),
            {},
            "has no column 'logits', only sample_id, view, class_ids",
        ),
        (good(logits=[[1, 2, 3]] * 4), {}, "logits of type list<.*int64>"),
        (good(logits=[1.0] * 4), {}, "logits of type double"),
        (
            good(
                logits=pa.array([], pa.list_(pa.float32())),
                sample_id=np.arange(0),
                view=np.arange(0),
            ),
            {},
            "has no rows",
        ),
        (good(view=np.zeros(4)), {}, "view of type double"),
        (good(sample_id=np.zeros(4)), {}, "sample_id of type double"),
        (good(view=[0, 0, None, 0]), {}, "has no view in row 2"),
        (good(logits=[[1.0], [2.0], [3.0], None]), {}, "has no logits in row 3"),
        (
            good(logits=[[1.0, 2.0], [2.0, 2.0], [3.0], [3.0, 2.0]]),
            {},
            "has 1 logits in row 2 and 2 in row 0",
        ),
        (good(logits=[[], [], [], [1.0]]), {}, "has no logits in row 0"),
        (good(), {"classes": "cat, dog"}, "no JSON list of strings under 'classes'"),
        (good(), {"classes": "[1, 2, 3]"}, "no JSON list of strings under 'classes'"),
    ],
)
def test_wrong_columns_are_named(
    arrays: dict[str, Any], metadata: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=sentence):
        list(open_answers(write(tmp_path / "a.parquet", arrays, metadata=metadata)).rows())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_damage_ends_in_a_traceback(suffix: str, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, encoding("float32", 3))
    path = tmp_path / f"a.{suffix}"
    export_labels(store, path)
    intact, random = path.read_bytes(), np.random.default_rng(0)
    damages: list[Callable[[], bytes]] = [
        lambda: intact[: random.integers(len(intact))],
        lambda: b"",
        lambda: b"no such file" * 9,
    ]
    for damage in (*damages, *[None] * 60):
        flipped = bytearray(intact)
        flipped[random.integers(len(intact))] ^= 1 << random.integers(8)
        path.write_bytes(damage() if damage is not None else bytes(flipped))
        try:
            list(open_answers(path).rows())
        except UserError as error:
            assert suffix in str(error) and "\n" not in str(error)
        else:
            assert damage is None  # a flipped bit need not be seen: import checks what it finds


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        open_answers(tmp_path / "a.npz")
    (tmp_path / "a.pkl").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"neither .npz nor .parquet"):
        open_answers(tmp_path / "a.pkl")
    np.save(tmp_path / "b.npy", LOGITS)
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(DataError, match=r"b.npz is damaged"):
        open_answers(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", sample_id=np.arange(len(LOGITS)), logits=LOGITS)
    packed = bytearray((tmp_path / "c.npz").read_bytes())
    for mark, field in (
        (b"PK\x01\x02", 10),
        (b"PK\x03\x04", 8),
    ):  # an unknown compression, in both kinds of header
        for at in (i for i in range(len(packed)) if packed[i : i + 4] == mark):
            packed[at + field : at + field + 2] = (99).to_bytes(2, "little")
    (tmp_path / "c.npz").write_bytes(packed)
    with pytest.raises(
        DataError, match=r"c.npz is damaged, or no .npz file of plain arrays \(.*compression"
    ):
        open_answers(tmp_path / "c.npz")


def test_parquet_without_pyarrow_names_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = make_store(tmp_path, encoding("float32", 3))
    write(tmp_path / "a.parquet", good())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "vitdistill\[data\]"'):
        open_answers(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'pip install "vitdistill\[data\]"'):
        export_labels(store, tmp_path / "b.parquet")
    export_labels(store, tmp_path / "b.npz")


def test_class_names_are_read_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("ä b \r\ncat\n\n".encode("utf-8-sig"))
    assert read_class_names(path) == ("ä b", "cat")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no text"):
        read_class_names(path)
    with pytest.raises(DataError, match="is missing"):
        read_class_names(tmp_path / "none.txt")
