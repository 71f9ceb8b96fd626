"""The file of a part: its bytes are frozen, and whatever is wrong with them is found."""

import json
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitdistill.errors import DataError
from vitdistill.labels.layout import Layout
from vitdistill.labels.manifest import Manifest
from vitdistill.labels.store import LabelStore

NAME = "view-00001/part-00000.bin"


def refused(store: LabelStore) -> list[str]:
    """What verify says, and reading says too."""
    with pytest.raises(DataError) as caught:
        LabelStore.open(store.path).records(1, range(store.manifest.num_samples))
    said = store.verify()
    assert str(caught.value) in said
    return said


@contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    """Give a file another content for a while."""
    good = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(good)


@pytest.fixture(scope="module")
def large(made, tmp_path_factory):
    """Three blocks a part."""
    return made(tmp_path_factory.mktemp("large") / "s", num_samples=10_000, part_size=10_000)


def test_the_bytes_of_a_part(made, tmp_path, records):
    """Frozen: a store written today is read by every later version."""
    store = made(tmp_path / "s", num_samples=11)
    data = store.part_path(1, 1).read_bytes()
    body = records(store.layout, 1, [8, 9, 10]).tobytes()
    footer = {
        "block": 4096,
        "crc32": [zlib.crc32(body)],
        "format": 1,
        "hi": 11,
        "item": 20,
        "lo": 8,
        "part": 1,
        "store": store.manifest.digest,
        "view": 1,
    }
    text = json.dumps(footer, sort_keys=True, separators=(",", ":")).encode()
    trailer = len(text).to_bytes(8, "little") + zlib.crc32(text).to_bytes(4, "little")
    assert data == body + text + trailer + b"vitdpart"


@settings(deadline=None, max_examples=120)
@given(position=st.integers(0, 10**9), bit=st.integers(0, 7), footer=st.booleans())
def test_every_flipped_bit_is_found(large, position, bit, footer):
    data = bytearray((large.path / NAME).read_bytes())
    data[-1 - position % 300 if footer else position % len(data)] ^= 1 << bit
    with replaced(large.path / NAME, data):
        (said,) = refused(large)
    assert NAME in said and large.verify() == []


def test_undamaged_blocks_are_read_beside_a_damaged_one(large, records):
    data = bytearray((large.path / NAME).read_bytes())
    data[5000 * 20] ^= 1
    with replaced(large.path / NAME, data):
        store = LabelStore.open(large.path)
        ids = np.r_[4095, 0, 8192, 9999]
        found, _ = store.read(np.ones_like(ids), ids)
        np.testing.assert_array_equal(found, records(store.layout, 1, ids))
        for _ in range(2):
            with pytest.raises(DataError, match=r"part-00000.bin is damaged: block 1"):
                store.records(1, [4096])


def test_large_records_have_blocks_of_a_mebibyte(tmp_path):
    layout = Layout(hidden=((3, 50, 400),), hidden_dtype="float32")
    manifest = Manifest(identity={}, layout=layout, num_samples=30, num_views=1)
    store = LabelStore.create(tmp_path / "s", manifest)
    store.seal(0, 0, np.zeros(30, dtype=layout.dtype))
    assert len(store.load(0, 0).crcs) == 3


def test_cut_grown_and_shuffled_parts_are_refused(large):
    path = large.path / NAME
    good = path.read_bytes()
    rng = random.Random(1)
    end = 10_000 * 20
    cuts = [0, 1, 19, 20, 21, end - 1, end, end + 1, len(good) - 20, len(good) - 1]
    bad = [good[:cut] for cut in [*cuts, *(rng.randrange(len(good)) for _ in range(20))]]
    bad += [good + b"\0", good + good, b"\0" + good, good[20:], bytes(len(good))]
    bad += [
        good[:end] + bytes(len(good) - end),
        good[20:40] + good[:20] + good[40:],
        good[4096 * 20 : 8192 * 20] + good[: 4096 * 20] + good[8192 * 20 :],
        good[:end] + (2**63).to_bytes(8, "little") + good[-12:],
    ]
    for data in bad:
        with replaced(path, data):
            (said,) = refused(large)
        assert said.startswith(str(path)) and "is damaged" in said


def test_parts_under_another_name_are_refused(made, tmp_path):
    store = made(tmp_path / "s")
    other = made(tmp_path / "other", identity={"teacher": "another"})
    parts = {(v, p): store.part_path(v, p).read_bytes() for v in range(2) for p in range(5)}
    for (view, part), data in (
        ((1, 3), parts[1, 2]),
        ((1, 3), parts[0, 3]),
        ((1, 4), parts[1, 3]),
        ((1, 3), other.part_path(1, 3).read_bytes()),
    ):
        store.part_path(view, part).write_bytes(data)
        (said,) = refused(store)
        assert said.startswith(str(store.part_path(view, part))) and "another part" in said
        store.part_path(view, part).write_bytes(parts[view, part])
