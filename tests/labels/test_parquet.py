"""Labels as Parquet: what is written is what is stored, bit for bit."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from vitdistill.errors import ConfigError, DataError, UserError
from vitdistill.labels.encoding import LogitEncoding
from vitdistill.labels.layout import Layout
from vitdistill.labels.manifest import Manifest
from vitdistill.labels.parquet import export_labels
from vitdistill.labels.store import LabelStore

CLASSES, SAMPLES, VIEWS = 6, 7, 3
NAMES = [f"class é{i}" for i in range(CLASSES)]


def make_store(
    folder: Path, kind: Any, without: Any = (), **settings: Any
) -> tuple[LabelStore, np.ndarray]:
    """A store in parts of 3, and the (V, N, C) logits that were put into it."""
    random = np.random.default_rng(0)
    true = random.normal(0, 4, (VIEWS, SAMPLES, CLASSES)).astype(np.float32)
    true[0, 0, 0] = -0.0
    layout = Layout(logits=LogitEncoding(kind=kind, num_classes=CLASSES, **settings))
    manifest = Manifest(
        identity={"seed": 0},
        layout=layout,
        num_samples=SAMPLES,
        num_views=VIEWS,
        part_size=3,
        about={"classes": NAMES},
    )
    store = LabelStore.create(folder / "store", manifest)
    for view, part in list(store.missing_parts()):
        if (view, part) not in without:
            rows = np.arange(*store.manifest.part_range(part))
            pixels = (view * 1000 + rows + 2**31).astype(np.uint32)
            logits = torch.from_numpy(true[view, rows])
            store.seal(view, part, layout.encode(logits, {}, None, pixels))
    return store, true


def columns(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    return {name: np.array(table.column(name).to_pylist()) for name in table.column_names}


def test_complete_labels_come_back(tmp_path: Path) -> None:
    store, true = make_store(tmp_path, "float32")
    path = tmp_path / "labels.parquet"
    assert export_labels(store, path) == (SAMPLES * VIEWS, path.stat().st_size)
    metadata = pq.read_schema(path).metadata
    assert json.loads(metadata[b"classes"]) == NAMES
    assert json.loads(metadata[b"labels"])["kind"] == "float32"
    found = columns(path)
    assert found["sample_id"].tolist() == list(range(SAMPLES)) * VIEWS
    assert found["view"].tolist() == np.repeat(range(VIEWS), SAMPLES).tolist()
    logits = found["logits"].astype(np.float32).reshape(VIEWS, SAMPLES, CLASSES)
    assert logits.tobytes() == true.tobytes()
    assert found["pixels"][SAMPLES:][:2].tolist() == store.records(1, [0, 1]).pixels.tolist()


def test_topk_columns_give_the_stored_distribution(tmp_path: Path) -> None:
    store, true = make_store(tmp_path, "topk", k=2, temperatures=(0.5, 1.0))
    export_labels(store, tmp_path / "labels.parquet")
    found = columns(tmp_path / "labels.parquet")
    names = ["sample_id", "view", "pixels", "class_ids", "values", "tail_0.5", "tail_1"]
    assert list(found) == names
    flat = true.reshape(-1, CLASSES).astype(np.float64)
    assert np.array_equal(found["class_ids"], np.argsort(-flat, axis=1)[:, :2])
    for t, name in ((0.5, "tail_0.5"), (1.0, "tail_1")):
        shares = np.exp(flat / t) / np.exp(flat / t).sum(1, keepdims=True)
        kept = np.take_along_axis(shares, found["class_ids"], 1)
        head, tail = np.exp(found["values"] / t), np.exp(found[name])
        total = head.sum(1) + tail
        np.testing.assert_allclose(tail / total, 1 - kept.sum(1), atol=1e-5)
        np.testing.assert_allclose(head / total[:, None], kept, atol=3e-3)


def test_chosen_views_alone_are_written_and_have_to_be_there(tmp_path: Path) -> None:
    store, true = make_store(tmp_path, "float32", without={(1, 0), (1, 2)})
    path = tmp_path / "labels.parquet"
    with pytest.raises(DataError):
        export_labels(store, path)
    with pytest.raises(ConfigError):
        export_labels(store, path, [0, 3])
    assert not path.exists()
    export_labels(store, path, [2, 0, 2])
    found = columns(path)
    assert found["view"].tolist() == [0] * SAMPLES + [2] * SAMPLES
    assert np.array_equal(found["logits"], true[[0, 2]].reshape(-1, CLASSES))


def test_damage_is_not_exported_and_nothing_replaced(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, "float32")
    part = store.part_path(1, 0)
    part.write_bytes(bytes(10) + part.read_bytes()[10:])
    with pytest.raises(DataError, match=r"part-00000.bin"):
        export_labels(store, tmp_path / "labels.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    (tmp_path / "a.parquet").write_bytes(b"mine")
    with pytest.raises(ConfigError):
        export_labels(store, tmp_path / "a.parquet", [0])
    assert (tmp_path / "a.parquet").read_bytes() == b"mine"


def test_other_files_are_not_written_and_without_pyarrow_none(tmp_path, monkeypatch):
    store, _ = make_store(tmp_path, "float32")
    with pytest.raises(ConfigError):
        export_labels(store, tmp_path / "labels.npz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"vitdistill\[data\]"):
        export_labels(store, tmp_path / "labels.parquet")
