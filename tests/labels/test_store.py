"""A store gives back what was sealed, for every id and order, and refuses by name what is damaged,
foreign or missing.
"""

import gc
import hashlib
import json
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

import vitdistill
from vitdistill.errors import ConfigError, DataError, DiskError
from vitdistill.labels.encoding import LogitEncoding
from vitdistill.labels.layout import Layout
from vitdistill.labels.store import LabelStore, Manifest, Status, differences
from vitdistill.storage.atomic import staged_dir
from vitdistill.storage.manifest import write_manifest

# -- what was sealed comes back -------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    samples=st.integers(1, 40),
    part_size=st.integers(1, 50),
    views=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_every_record_comes_back_in_any_order_and_number(
    made, records, samples, part_size, views, seed
):
    with tempfile.TemporaryDirectory() as folder:
        store = made(Path(folder) / "s", num_samples=samples, part_size=part_size, num_views=views)
        rng = np.random.default_rng(seed)
        at, ids = rng.integers(0, views, 30), rng.integers(0, samples, 30)
        found, present = store.read(at, ids)
        assert present.all() and found.dtype == store.layout.dtype
        expected = np.concatenate(
            [records(store.layout, int(view), [i]) for view, i in zip(at, ids, strict=True)]
        )
        np.testing.assert_array_equal(found, expected)
        assert sorted(store.part_range(p) for p in range(store.num_parts))[-1][1] == samples
        assert list(store.missing_parts()) == [] and store.verify() == []


def test_records_are_targets_of_the_layout(made, tmp_path, records):
    store = made(tmp_path / "s")
    for ids in (
        [5, 36, 0, 5],
        torch.tensor([5, 36, 0, 5]),
        np.array([5, 36, 0, 5], dtype=np.int32),
        range(4),
    ):
        targets = store.records(1, ids)
        expected = store.layout.targets(records(store.layout, 1, [int(i) for i in ids]))
        assert torch.equal(targets.pixels, expected.pixels)
        assert torch.equal(targets.logits(1.0), expected.logits(1.0))
    assert len(store.records(0, [])) == 0
    for wrong in ([0.5], [[1, 2]]):
        with pytest.raises(TypeError, match="whole numbers"):
            store.records(0, np.array(wrong))
    with pytest.raises(ValueError, match="2 views for 3 samples"):
        store.read([0, 0], [1, 2, 3])


def test_the_files_are_as_documented(made, tmp_path, records, tree):
    """Frozen: a store written today is read by every later version."""
    store = made(tmp_path / "s", num_samples=11)
    assert list(tree(tmp_path / "s")) == [
        "manifest.json",
        *(f"view-0000{v}/part-0000{p}.bin" for v in range(2) for p in range(2)),
    ]
    data = (tmp_path / "s" / "view-00001" / "part-00001.bin").read_bytes()
    body = records(store.layout, 1, [8, 9, 10]).tobytes()
    footer = {
        "block": 4096,
        "crc32": [zlib.crc32(body)],
        "format": 1,
        "hi": 11,
        "item": 20,
        "lo": 8,
        "part": 1,
        "store": store.digest,
        "view": 1,
    }
    text = json.dumps(footer, sort_keys=True, separators=(",", ":")).encode()
    assert (
        data
        == body
        + text
        + len(text).to_bytes(8, "little")
        + zlib.crc32(text).to_bytes(4, "little")
        + b"vitdpart"
    )
    assert (
        hashlib.sha256(body).hexdigest()
        == "c6c611f80eb9b74362fb8d14cd472697e0b062dae6f10287adddde2db158b081"
    )
    assert store.digest == "f1f8625f560161c4ad95ca445de235525553e58fef6a6bf76ad995d8d8d6ea3b"


def test_large_records_have_blocks_of_a_mebibyte(tmp_path):
    layout = Layout(hidden=((3, 50, 400),), hidden_dtype="float32")
    store = LabelStore.create(
        tmp_path / "s", Manifest(identity={}, layout=layout, num_samples=30, num_views=1)
    )
    rows = np.zeros(30, dtype=layout.dtype)
    rows["hidden_3"] = np.random.default_rng(0).standard_normal((30, 50, 400))
    store.seal(0, 0, rows)
    path = store.part_path(0, 0)
    assert len(json.loads(path.read_bytes()[30 * layout.record_bytes : -20])["crc32"]) == 3
    flip(path, 15 * layout.record_bytes + 100)
    for ids, good in (([0, 12], True), ([26, 29], True), ([14], False)):
        if good:
            assert torch.equal(
                store.records(0, ids).hidden[3], torch.from_numpy(rows["hidden_3"][ids])
            )
        else:
            with pytest.raises(
                DataError, match=r"part-00000.bin is damaged: block 1 \(records 13 to 25"
            ):
                store.records(0, ids)


def test_a_part_is_sealed_once_and_whole(made, manifest, tmp_path, records, tree):
    store = made(tmp_path / "s", without=[(1, 4)])
    before = tree(tmp_path)
    assert not store.seal(0, 0, records(store.layout, 1, range(8)))
    last = records(store.layout, 1, range(32, 37))
    for view, part, rows in (
        (1, 4, last[:4]),
        (1, 4, np.zeros(5)),
        (2, 0, last),
        (0, 5, last),
        (-1, 0, last),
    ):
        with pytest.raises(ValueError):
            store.seal(view, part, rows)
    assert tree(tmp_path) == before
    assert store.seal(1, 4, last[::-1][::-1])
    assert not [name for name in tree(tmp_path) if ".tmp-" in name]


# -- what is not there ----------------------------------------------------------------------------


def test_a_missing_record_is_named_and_nothing_else_is_given(made, tmp_path, records):
    store = made(tmp_path / "s", without=[(1, 2), (0, 4)])
    at, ids = np.array([1, 0, 1, 1, 0]), np.array([17, 17, 3, 23, 36])
    found, present = store.read(at, ids)
    assert present.tolist() == [False, True, True, False, False]
    assert not found[~present].view(np.uint8).any()
    np.testing.assert_array_equal(found[1:2], records(store.layout, 0, [17]))
    np.testing.assert_array_equal(found[2:3], records(store.layout, 1, [3]))
    with pytest.raises(
        DataError,
        match=(
            r"/s has no record of sample 23 in view 1: view-00001/part-00002.bin is not written"
            r" yet; run 'vitdistill"
        ),
    ):
        store.records(1, [3, 23, 17])
    assert sorted(store.missing_parts()) == [(0, 4), (1, 2)]
    # It appears while the store is open.
    assert store.seal(1, 2, records(store.layout, 1, range(16, 24)))
    assert store.records(1, [3, 23, 17]).pixels.tolist() == [1_000_006, 1_000_026, 1_000_020]


@pytest.mark.parametrize(
    ("view", "sample", "sentence"),
    [
        (0, 37, "no sample 37: its samples are 0 to 36"),
        (0, -1, "no sample -1"),
        (2, 0, "no view 2: its views are 0 to 1"),
        (-1, 5, "no view -1"),
    ],
)
def test_ids_outside_of_the_store_are_refused(made, tmp_path, view, sample, sentence):
    store = made(tmp_path / "s")
    with pytest.raises(DataError, match=sentence):
        store.records(view, [3, sample, 4])


def test_status_counts_what_is_there(made, manifest, tmp_path):
    store = made(tmp_path / "s", without=[(0, 4), (1, 0), (1, 1)])
    size = sum(path.stat().st_size for path in (tmp_path / "s").glob("*/*.bin"))
    assert store.status() == Status(
        views=2, parts=10, sealed=7, records=32 + 21, bytes=size, writing=[]
    )
    assert LabelStore.create(tmp_path / "empty", manifest()).status() == Status(2, 10, 0, 0, 0, [])


# -- damage ---------------------------------------------------------------------------------------

NAME = "view-00001/part-00000.bin"


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def refused(store: LabelStore, view: int = 1) -> list[str]:
    """What reading this view says, opened anew, and every sentence of verify."""
    lines: list[str] = []
    opened = LabelStore.open(store.path)
    with pytest.raises(DataError) as caught:
        opened.records(view, range(store.manifest.num_samples))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    said = store.verify(lines.append)
    assert str(caught.value) in said
    assert re.fullmatch(
        rf"\d+ of {store.num_parts * store.manifest.num_views} parts are intact: \d+ of \d+"
        r" records",
        lines[-1],
    )
    return said


@pytest.fixture(scope="module")
def large(made, tmp_path_factory):
    """Three blocks a part."""
    return made(tmp_path_factory.mktemp("large") / "s", num_samples=10_000, part_size=10_000)


@settings(deadline=None, max_examples=120)
@given(position=st.integers(0, 10**9), bit=st.integers(0, 7), footer=st.booleans())
def test_every_flipped_bit_is_found(large, position, bit, footer):
    path = large.path / NAME
    good = path.read_bytes()
    flip(path, -1 - position % 300 if footer else position % len(good), bit)
    try:
        (said,) = refused(large)
        assert NAME in said and "vitdistill label" in said
    finally:
        path.write_bytes(good)
    assert large.verify() == []


def test_undamaged_blocks_are_read_beside_a_damaged_one(large, records):
    path = large.path / NAME
    good = path.read_bytes()
    flip(path, 5000 * 20)
    try:
        store = LabelStore.open(large.path)
        ids = np.r_[4095, 0, 8192, 9999]
        np.testing.assert_array_equal(
            store.read(np.ones_like(ids), ids)[0], records(store.layout, 1, ids)
        )
        for _ in range(2):
            with pytest.raises(
                DataError,
                match=(
                    r"part-00000.bin is damaged: block 1 \(records 4096 to 8191 of the"
                    r" part\).*delete it and run"
                ),
            ):
                store.records(1, [4096])
    finally:
        path.write_bytes(good)


def test_cut_grown_and_zeroed_parts_are_refused(large):
    path = large.path / NAME
    good = path.read_bytes()
    rng = random.Random(1)
    end = 10_000 * 20
    cuts = [
        0,
        1,
        19,
        20,
        21,
        end - 1,
        end,
        end + 1,
        len(good) - 20,
        len(good) - 1,
        *(rng.randrange(len(good)) for _ in range(20)),
    ]
    bad = [good[:cut] for cut in cuts]
    bad += [
        good + b"\0",
        good + good,
        b"\0" + good,
        good[20:],
        bytes(len(good)),
        bytes(4096 * 20) + good[4096 * 20 :],
    ]
    bad += [
        good[:end] + bytes(len(good) - end),
        good[20:40] + good[:20] + good[40:],
        good[4096 * 20 : 8192 * 20] + good[: 4096 * 20] + good[8192 * 20 :],
    ]
    bad += [b"\x80\x04\x95 not a part", good[:end] + (2**63).to_bytes(8, "little") + good[-12:]]
    try:
        for data in bad:
            path.write_bytes(data)
            (said,) = refused(large)
            assert said.startswith(str(path)) and "is damaged" in said
    finally:
        path.write_bytes(good)


def test_parts_under_another_name_are_refused(made, tmp_path):
    store = made(tmp_path / "s")
    other = made(tmp_path / "other", identity={"teacher": "another"})
    parts = {(v, p): store.part_path(v, p).read_bytes() for v in range(2) for p in range(5)}
    for (view, part), data, sentence in (
        ((1, 3), parts[1, 2], r"part-00003.bin is part 2 of view 1 under another name"),
        ((1, 3), parts[0, 3], r"part-00003.bin is part 3 of view 0 under another name"),
        ((1, 4), parts[1, 3], r"part-00004.bin is part 3 of view 1 under another name"),
        (
            (1, 3),
            other.part_path(1, 3).read_bytes(),
            r"view-00001/part-00003.bin is a part of another store",
        ),
    ):
        store.part_path(view, part).write_bytes(data)
        assert re.search(sentence, refused(store)[0])
        store.part_path(view, part).write_bytes(parts[view, part])
    # Two that changed places, and three more, all listed at once.
    store.part_path(0, 1).write_bytes(parts[0, 2])
    store.part_path(0, 2).write_bytes(parts[0, 1])
    store.part_path(0, 4).write_bytes(parts[0, 4][:50])
    store.part_path(1, 0).write_bytes(other.part_path(1, 0).read_bytes())
    flip(store.part_path(1, 4), 3)
    store.part_path(1, 2).unlink()
    lines: list[str] = []
    said = store.verify(lines.append)
    assert [re.search(r"view-0000\d/part-0000\d", line)[0] for line in said] == [
        f"view-0000{v}/part-0000{p}" for v, p in ((0, 1), (0, 2), (0, 4), (1, 0), (1, 4))
    ]
    assert lines == [
        "view 0: 2 of 5 parts are intact",
        "view 1: 2 of 5 parts are intact",
        "4 of 10 parts are intact: 32 of 74 records",
    ]


def test_other_files_are_listed_and_hidden_ones_are_not(made, tmp_path):
    store = made(tmp_path / "s", without=[(1, 1)])
    strange = [
        "notes.txt",
        "view-00000/part-00005.bin",
        "view-00000/part-0001.bin",
        "view-00002/part-00000.bin",
        "view-00001/part-000001.bin",
    ]
    fine = [".DS_Store", "view-00000/.tmp-host-1-0123456789ab", "view-00000/part-00001.lease"]
    for name in strange + fine:
        (store.path / name).parent.mkdir(exist_ok=True)
        (store.path / name).write_bytes(b"x")
    store.part_path(1, 1).mkdir()
    said = store.verify()
    assert len(said) == 6
    for name in ("notes.txt", *strange[1:3], "view-00002", strange[4]):
        assert any(
            line.startswith(f"{store.path / name} is not a file of this store") for line in said
        )
    assert any("view-00001/part-00001.bin is damaged: it is a folder" in line for line in said)


def test_a_part_of_a_later_format_is_refused(made, tmp_path):
    store = made(tmp_path / "s")
    data = store.part_path(1, 0).read_bytes()
    text = data[160:-20].replace(b'"format":1', b'"format":2')
    store.part_path(1, 0).write_bytes(
        data[:160]
        + text
        + len(text).to_bytes(8, "little")
        + zlib.crc32(text).to_bytes(4, "little")
        + data[-8:]
    )
    assert "has format 2 and this version reads format 1" in refused(store)[0]


# -- identity -------------------------------------------------------------------------------------

CHANGES = {
    "teacher.model": (
        {"teacher": {"model": "vit_small", "weights": "sha256 0123", "precision": "float32"}},
        '"vit_tiny_patch16_224"',
        '"vit_small"',
    ),
    "teacher.weights": (
        {"teacher": {"model": "vit_tiny_patch16_224", "precision": "float32"}},
        '"sha256 0123"',
        "absent",
    ),
    "data.classes": (
        {"data": {"name": "flowers", "train": 37, "classes": ["rose", "lily"]}},
        '["lily", "rose"]',
        '["rose", "lily"]',
    ),
    "augment.crop": ({"augment.crop": [0.08, 0.9]}, "[0.08, 1.0]", "[0.08, 0.9]"),
    "seed": ({"seed": 8}, "7", "8"),
    "mixed": ({"mixed": 0}, "false", "0"),
    "erasing": ({"erasing": 0.25}, "absent", "0.25"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_each_field_of_the_identity_is_compared(manifest, tmp_path, tree, field):
    change, theirs, ours = CHANGES[field]
    store = LabelStore.create(tmp_path / "s", manifest())
    before = tree(tmp_path)
    wanted = manifest(identity={**manifest().identity, **change})
    assert wanted.digest != store.digest
    assert differences(wanted, store.manifest) == [
        f"{field} is {theirs} in the store and {ours} here"
    ]
    with pytest.raises(
        DataError,
        match=re.escape(
            f"{tmp_path}/s holds labels of something else ({field} is {theirs} in the store and"
            f" {ours} here)"
        ),
    ):
        LabelStore.create(tmp_path / "s", wanted)
    assert tree(tmp_path) == before


def test_what_to_do_about_other_images(manifest, tmp_path):
    LabelStore.create(tmp_path / "s", manifest(identity={"images.fingerprint": "a"}))
    with pytest.raises(
        DataError,
        match=(
            r"give the very files that were labelled .one that was repaired .*, name another"
            r" folder, or delete"
        ),
    ):
        LabelStore.create(tmp_path / "s", manifest(identity={"images.fingerprint": "b"}))


@pytest.mark.parametrize(
    ("field", "value"), [("num_samples", 38), ("part_size", 16), ("layout", None)]
)
def test_sizes_and_layout_are_compared(manifest, layout, tmp_path, field, value):
    LabelStore.create(tmp_path / "s", manifest())
    wanted = manifest(**{field: layout(4) if field == "layout" else value})
    name, theirs, ours = (
        ("layout.logits.k", 3, 4)
        if field == "layout"
        else (field, getattr(manifest(), field), value)
    )
    with pytest.raises(DataError, match=rf"\({name} is {theirs} in the store and {ours} here\)"):
        LabelStore.create(tmp_path / "s", wanted)


def test_views_may_be_added_and_what_was_written_stays(made, manifest, tree, tmp_path):
    small = made(tmp_path / "s")
    before = tree(tmp_path)
    digest = small.digest
    grown = LabelStore.create(tmp_path / "s", manifest(num_views=4))
    assert (grown.manifest.num_views, grown.digest) == (
        4,
        digest,
    ) and grown.status().sealed == small.status().sealed
    assert sorted({view for view, _ in grown.missing_parts()}) == [2, 3] and not grown.verify()
    assert {name: data for name, data in tree(tmp_path).items() if "manifest" not in name} == {
        name: data for name, data in before.items() if "manifest" not in name
    }
    again = LabelStore.create(tmp_path / "s", manifest(num_views=1))  # nothing is taken away
    assert again.manifest.num_views == LabelStore.open(tmp_path / "s").manifest.num_views == 4
    assert again.manifest.about == small.manifest.about


def test_many_differences_are_shortened(manifest, tmp_path):
    LabelStore.create(
        tmp_path / "s", manifest(identity={"names": [f"class {i}" for i in range(1000)]})
    )
    other = manifest(
        identity={"names": [f"class {i}" for i in range(999)], **{f"a{i}": i for i in range(20)}}
    )
    with pytest.raises(
        DataError,
        match=r"names is \[.*\.\.\. \(sha256 [0-9a-f]{12}\) in the store and .*, and 16 more\)",
    ) as caught:
        LabelStore.create(tmp_path / "s", other)
    assert len(str(caught.value)) < 800


def test_an_equal_store_is_opened_whatever_is_told_about_it(manifest, tmp_path):
    first = LabelStore.create(tmp_path / "a" / "s", manifest(about={"versions": {"torch": "2.6"}}))
    # The order of keys, and tuples for lists, make no difference.
    identity = {**dict(reversed(manifest().identity.items())), "augment.crop": (0.08, 1.0)}
    second = LabelStore.create(
        tmp_path / "a" / "s", manifest(identity=identity, about={"versions": {"torch": "2.7"}})
    )
    assert second.digest == first.digest == LabelStore.open(tmp_path / "a" / "s").digest
    assert second.manifest.about == {"versions": {"torch": "2.6"}}
    assert LabelStore.open(tmp_path / "a").manifest == first.manifest
    for name in ("num_samples", "num_views", "part_size"):
        with pytest.raises(ConfigError, match=f"{name} of at least 1, not 0"):
            manifest(**{name: 0})


def test_many_create_one_store_at_once(manifest, tmp_path, fork, join):
    reader, writer = os.pipe()

    def create():
        os.close(writer)
        os.read(reader, 1)
        LabelStore.create(tmp_path / "s", manifest(about={"pid": os.getpid()}))

    pids = [fork(create) for _ in range(6)]
    os.close(writer)
    os.close(reader)
    assert [join(pid) for pid in pids] == [0] * 6
    assert LabelStore.open(tmp_path / "s").manifest.about["pid"] in pids
    assert [path.name for path in tmp_path.rglob("*")] == ["s", "manifest.json"]


def test_a_store_that_another_process_makes_meanwhile_is_opened(manifest, tmp_path, monkeypatch):
    listdir = os.listdir

    def slow(folder):
        monkeypatch.setattr(os, "listdir", listdir)
        LabelStore.create(folder, manifest(about={"pid": 1}))
        return listdir(folder)

    (tmp_path / "s").mkdir()
    monkeypatch.setattr(os, "listdir", slow)
    assert LabelStore.create(tmp_path / "s", manifest(about={"pid": 2})).manifest.about["pid"] == 1


def test_folders_of_something_else_are_told_apart(made, manifest, tmp_path, tree):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    with staged_dir(tmp_path / "checkpoint") as temp:
        write_manifest(temp, {}, {"kind": "checkpoint"})
    made(tmp_path / "labels" / "conv")
    made(tmp_path / "labels" / "inv")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for name, kind, sentence in (
        ("mine", ConfigError, r"mine is not empty \(thesis.doc is in it\)"),
        (
            "checkpoint",
            DataError,
            r"checkpoint holds no labels: .*manifest.json is the manifest of something else",
        ),
        ("file", DiskError, "file cannot be"),
    ):
        with pytest.raises(kind, match=sentence):
            LabelStore.create(tmp_path / name, manifest())
    for name, kind, sentence in (
        ("mine", DataError, "mine holds no labels: write them with 'vitdistill label'"),
        ("file", DataError, "file holds no labels"),
        ("nothing", DataError, "nothing holds no labels"),
        ("empty", DataError, "empty holds no labels"),
        ("checkpoint", DataError, "something else"),
        ("labels", ConfigError, r"labels holds the labels of several teachers \(conv, inv\)"),
    ):
        with pytest.raises(kind, match=sentence):
            LabelStore.open(tmp_path / name)
    assert tree(tmp_path) == before
    assert LabelStore.create(tmp_path / "empty", manifest()).status().sealed == 0


def test_damaged_and_later_manifests_are_refused(made, manifest, tmp_path):
    store = made(tmp_path / "s")
    path = store.path / "manifest.json"
    good = path.read_bytes()
    rng = random.Random(5)
    for position in rng.sample(range(len(good)), 60):
        flip(path, position, rng.randrange(8))
        for use in (
            lambda: LabelStore.open(tmp_path / "s"),
            lambda: LabelStore.create(tmp_path / "s", manifest()),
        ):
            with pytest.raises(DataError, match=r"manifest.json.*(restore it|use the version)"):
                use()
        path.write_bytes(good)
    body = manifest().to_json()
    cases = (
        ({**body, "format": 2}, "has format 2"),
        ({**body, "num_samples": 0}, "num_samples"),
        ({**body, "layout": {}}, "logits"),
    )
    for changed, sentence in cases:
        path.unlink()
        write_manifest(store.path, {}, changed)
        with pytest.raises(DataError, match=sentence):
            LabelStore.open(tmp_path / "s")


# -- disks and processes --------------------------------------------------------------------------


def test_a_full_disk_leaves_the_store_valid(large, manifest, tmp_path, fork, join, records, tree):
    store = LabelStore.create(tmp_path / "s", manifest(num_samples=10_000, part_size=5_000))
    rows = [records(store.layout, 0, np.arange(*store.part_range(part))) for part in range(2)]
    store.seal(0, 0, rows[0])
    before = tree(tmp_path)

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        with pytest.raises(DiskError, match=r"part-00001.bin cannot be written: the disk is full"):
            store.seal(0, 1, rows[1])

    assert join(fork(write)) == 0
    assert tree(tmp_path) == before and store.verify() == []
    assert store.seal(0, 1, rows[1]) and store.verify() == []


@pytest.mark.parametrize(
    ("umask", "file_mode", "dir_mode"),
    [(0o002, 0o664, 0o775), (0o022, 0o644, 0o755), (0o077, 0o600, 0o700)],
)
def test_umask_is_honoured(made, tmp_path, umask, file_mode, dir_mode):
    before = os.umask(umask)
    try:
        made(tmp_path / "labels" / "conv")
    finally:
        os.umask(before)
    for path in (tmp_path / "labels").rglob("*"):
        assert path.stat().st_mode & 0o777 == (dir_mode if path.is_dir() else file_mode)


class Rows(Dataset):
    """What a loader's worker would do."""

    def __init__(self, store: LabelStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return self.store.manifest.num_samples

    def __getitem__(self, i: int) -> tuple[int, int]:
        return os.getpid(), int(self.store.records(1, [i]).pixels[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than processors
def test_workers_of_a_loader_read_an_open_store(made, tmp_path):
    store = made(tmp_path / "s")
    assert len(store.records(1, range(37))) == 37
    loader = DataLoader(
        Rows(store), batch_size=5, num_workers=2, multiprocessing_context="fork", collate_fn=list
    )
    rows = [row for batch in loader for row in batch]
    assert [pixels for _, pixels in rows] == [1_000_003 + i for i in range(37)]
    assert len({pid for pid, _ in rows} - {os.getpid()}) == 2


def test_a_forked_process_looks_at_the_files_itself(made, tmp_path, fork, join):
    store = made(tmp_path / "s")
    assert len(store.records(0, range(37))) == 37
    store.part_path(0, 1).unlink()
    store.records(0, range(37))  # this process has it open

    def read():
        with pytest.raises(DataError, match="no record of sample 8 in view 0"):
            store.records(0, range(37))

    assert join(fork(read)) == 0


def test_a_spawned_process_reads_a_pickled_store(made, tmp_path):
    store = made(tmp_path / "s")
    store.records(1, range(37))
    script = (
        "import pickle, sys; print(pickle.load(sys.stdin.buffer).records(1, [36,"
        " 2]).pixels.tolist())"
    )
    root = str(Path(vitdistill.__file__).parents[1])
    data = pickle.dumps(store)
    assert len(data) < 5000
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=data,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": root},
        check=True,
    )
    assert done.stdout.strip() == b"[1000039, 1000005]"


def test_many_parts_need_few_open_files(made, tmp_path, fork, join, records):
    made(tmp_path / "s", num_samples=300, part_size=2)

    def read():
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        store = LabelStore.open(tmp_path / "s")
        rng = np.random.default_rng(0)
        for _ in range(4):
            at, ids = rng.integers(0, 2, 400), rng.integers(0, 300, 400)
            found, present = store.read(at, ids)
            assert present.all() and (found["pixels"] == at * 1_000_003 + ids).all()
            assert len(os.listdir("/proc/self/fd")) < 70

    gc.collect()  # parts that earlier tests left mapped would count
    assert join(fork(read)) == 0


@pytest.mark.parametrize("same", ["number", "times"])
def test_a_part_replaced_while_it_was_unmapped_is_checked_anew(made, tmp_path, fork, join, same):
    made(tmp_path / "s", num_samples=300, part_size=2)

    def read():
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        store = LabelStore.open(tmp_path / "s")
        path = store.part_path(0, 0)
        assert len(store.records(0, [0, 1])) == 2
        store.records(1, range(300))  # more parts than may be mapped at once
        before = path.stat()
        if same == "number":  # written in place, or a new file that got the deleted one's number
            flip(path, 0)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
            assert path.stat().st_ino == before.st_ino
        else:
            path.rename(tmp_path / "keeps its number in use")
            path.write_bytes((tmp_path / "keeps its number in use").read_bytes())
            flip(path, 0)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert path.stat().st_ino != before.st_ino
        with pytest.raises(DataError, match=r"view-00000/part-00000.bin is damaged"):
            store.records(0, [0])

    gc.collect()  # parts that earlier tests left mapped would count
    assert join(fork(read)) == 0


def test_encodings_of_every_kind_come_back(tmp_path):
    torch.manual_seed(0)
    logits = torch.randn(12, 50) * 4
    pixels = np.arange(12, dtype=np.uint32)
    for kind, extra in (
        ("float32", {}),
        ("float16", {}),
        ("topk", {"k": 5, "temperatures": (1.0, 4.0)}),
    ):
        layout = Layout(logits=LogitEncoding(kind=kind, num_classes=50, **extra), features=(5, 7))
        rows = layout.encode(logits, {}, torch.randn(12, 5, 7), pixels)
        store = LabelStore.create(
            tmp_path / kind,
            Manifest(identity={}, layout=layout, num_samples=12, num_views=1, part_size=5),
        )
        for part in range(3):
            store.seal(0, part, rows[slice(*store.part_range(part))])
        order = np.random.default_rng(1).permutation(12)
        found, expected = (
            LabelStore.open(tmp_path / kind).records(0, order),
            layout.targets(rows[order]),
        )
        temperature = extra.get("temperatures", (1.0,))[-1]
        assert torch.equal(found.logits(temperature), expected.logits(temperature))
        assert torch.equal(found.features, expected.features)
