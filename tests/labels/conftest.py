"""Small stores whose records say which sample and view they are of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitdistill.labels.encoding import LogitEncoding
from vitdistill.labels.layout import Layout
from vitdistill.labels.manifest import Manifest
from vitdistill.labels.store import LabelStore

IDENTITY = {
    "teacher.model": "vit_tiny_patch16_224",
    "teacher.weights": "sha256 0123",
    "data.classes": ["lily", "rose"],
    "augment.crop": [0.08, 1.0],
    "seed": 7,
    "mixed": False,
}


def _layout(k: int = 3) -> Layout:
    return Layout(logits=LogitEncoding(kind="topk", num_classes=100, k=k, temperatures=(1.0,)))


def _manifest(**changes: Any) -> Manifest:
    fields = {
        "identity": IDENTITY,
        "layout": _layout(),
        "num_samples": 37,
        "num_views": 2,
        "part_size": 8,
    }
    return Manifest(**{**fields, **changes})


def _records(layout: Layout, view: int, samples: Any) -> np.ndarray:
    """What these samples' records are: a function of view and sample alone, and different for all
    of them.
    """
    samples = np.asarray(samples, dtype=np.int64)
    records = np.zeros(len(samples), dtype=layout.dtype)
    k = layout.dtype["ids"].shape[0]
    records["pixels"] = view * 1_000_003 + samples
    records["ids"] = (samples[:, None] * 7 + np.arange(k) * 13 + view) % 100
    records["values"] = -np.arange(k) * (1 + samples[:, None] % 5) / 4
    records["tails"] = -np.log(2.0 + samples[:, None] + view)
    return records


@pytest.fixture(scope="session")
def layout() -> Callable[..., Layout]:
    """``layout(k)``."""
    return _layout


@pytest.fixture(scope="session")
def manifest() -> Callable[..., Manifest]:
    """``manifest(num_samples=..., ...)``: of 37 samples, 2 views and parts of 8, unless told
    otherwise.
    """
    return _manifest


@pytest.fixture(scope="session")
def records() -> Callable[..., np.ndarray]:
    """``records(layout, view, samples)``."""
    return _records


@pytest.fixture(scope="session")
def made() -> Callable[..., LabelStore]:
    """``made(path, without=..., **manifest)``: a store with every part but those (view, part)."""

    def make(path: Path, without: Any = (), **changes: Any) -> LabelStore:
        store = LabelStore.create(path, _manifest(**changes))
        for view in range(store.manifest.num_views):
            for part in range(store.num_parts):
                if (view, part) not in without:
                    assert store.seal(
                        view,
                        part,
                        _records(store.layout, view, np.arange(*store.manifest.part_range(part))),
                    )
        return store

    return make


@pytest.fixture(scope="session")
def is_right() -> Callable[[LabelStore], int]:
    """``is_right(store)``: asserts that every record there is the right one, opened anew, and
    returns how many there are.
    """

    def check(store: LabelStore) -> int:
        store = LabelStore.open(store.path)
        count = 0
        for view in range(store.manifest.num_views):
            ids = np.random.default_rng(view).permutation(store.manifest.num_samples)
            found, present = store.read(np.full(len(ids), view), ids)
            np.testing.assert_array_equal(
                found[present], _records(store.layout, view, ids[present])
            )
            assert not found[~present].view(np.uint8).any()
            count += int(present.sum())
        return count

    return check
