"""A store gives back what was sealed, for every id and order, and says what is missing."""

import gc
import os
import pickle
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from vitdistill.errors import ConfigError, DataError, DiskError
from vitdistill.labels.store import LabelStore, Status
from vitdistill.storage.atomic import staged_dir
from vitdistill.storage.manifest import write_manifest

RECORDED = Path(__file__).parent / "recorded"

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
        expected = [records(store.layout, int(v), [i]) for v, i in zip(at, ids, strict=True)]
        np.testing.assert_array_equal(found, np.concatenate(expected))
        assert store.manifest.part_range(store.num_parts - 1)[1] == samples
        assert list(store.missing_parts()) == [] and store.verify() == []


def test_records_are_targets_of_the_layout(made, tmp_path, records):
    store = made(tmp_path / "s")
    ids = [5, 36, 0, 5]
    expected = store.layout.targets(records(store.layout, 1, ids))
    for given_ids in (ids, torch.tensor(ids), np.array(ids, dtype=np.int32)):
        targets = store.records(1, given_ids)
        assert torch.equal(targets.pixels, expected.pixels)
        assert torch.equal(targets.logits(1.0), expected.logits(1.0))
    assert len(store.records(0, [])) == 0
    for wrong in ([0.5], [[1, 2]]):
        with pytest.raises(TypeError):
            store.records(0, np.array(wrong))
    for view, sample in ((0, 37), (0, -1), (2, 0), (-1, 5)):
        with pytest.raises(DataError):
            store.records(view, [3, sample, 4])


@pytest.mark.parametrize("kind", ["float32", "topk"])
def test_a_store_of_version_0_1_is_read(kind):
    """Recorded with version 0.1.0: 3 samples in 2 views, in parts of 2."""
    z = torch.arange(24).reshape(2, 3, 4).float() % 5 - torch.tensor([0.0, 0.5, 0.25, 1.0])
    store = LabelStore.open(RECORDED / kind)
    assert store.verify() == [] and store.manifest.about["versions"] == {"vitdistill": "0.1.0"}
    start = {"float32": "47d3b11092a4", "topk": "2f56f87a0bfe"}[kind]
    assert store.manifest.digest.startswith(start)
    for view in range(2):
        targets = store.records(view, [2, 0, 1])
        true = z[view, [2, 0, 1]]
        assert targets.pixels.tolist() == [100 * view + i for i in (2, 0, 1)]
        if kind == "float32":
            assert torch.equal(targets.logits(), true)
            continue
        assert torch.equal(targets.hidden[1][0], torch.arange(6.0).reshape(2, 3) + view)
        for t in (1.0, 4.0):
            found, expected = (targets.logits(t) / t).softmax(1), (true / t).softmax(1)
            best = expected.topk(2).indices
            torch.testing.assert_close(found.gather(1, best), expected.gather(1, best))


def test_a_store_of_version_0_1_is_written_on(tmp_path):
    shutil.copytree(RECORDED / "topk", tmp_path / "topk")
    store = LabelStore.open(tmp_path / "topk")
    part = store.part_path(1, 0)
    before = part.read_bytes()
    records, _ = store.read([1, 1], [0, 1])
    part.unlink()
    assert LabelStore.create(store.path, store.manifest).verify() == []
    assert store.seal(1, 0, records) and part.read_bytes() == before


def test_a_part_is_sealed_once_and_whole(made, tmp_path, records, tree):
    store = made(tmp_path / "s", without=[(1, 4)])
    before = tree(tmp_path)
    assert not store.seal(0, 0, records(store.layout, 1, range(8)))
    last = records(store.layout, 1, range(32, 37))
    places = ((1, 4, last[:4]), (1, 4, np.zeros(5)), (2, 0, last), (0, 5, last), (-1, 0, last))
    for view, part, rows in places:
        with pytest.raises(AssertionError):
            store.seal(view, part, rows)
    assert tree(tmp_path) == before
    assert store.seal(1, 4, last[::-1][::-1])
    assert set(tree(tmp_path)) == set(before) | {"s/view-00001/part-00004.bin"}


# -- what is not there ----------------------------------------------------------------------------


def test_missing_records_are_zeros_or_an_error(made, tmp_path, records):
    store = made(tmp_path / "s", without=[(1, 2), (0, 4)])
    at, ids = np.array([1, 0, 1, 1, 0]), np.array([17, 17, 3, 23, 36])
    found, present = store.read(at, ids)
    assert present.tolist() == [False, True, True, False, False]
    assert not found[~present].view(np.uint8).any()
    np.testing.assert_array_equal(found[1:2], records(store.layout, 0, [17]))
    with pytest.raises(DataError, match="sample 23 in view 1"):
        store.records(1, [3, 23, 17])
    assert store.missing_parts() == [(0, 4), (1, 2)]
    # It appears while the store is open.
    assert store.seal(1, 2, records(store.layout, 1, range(16, 24)))
    assert store.records(1, [3, 23, 17]).pixels.tolist() == [1_000_006, 1_000_026, 1_000_020]


def test_status_counts_what_is_there(made, manifest, tmp_path):
    store = made(tmp_path / "s", without=[(0, 4), (1, 0), (1, 1)])
    size = sum(path.stat().st_size for path in (tmp_path / "s").glob("*/*.bin"))
    assert store.status() == Status(parts=10, sealed=7, records=32 + 21, bytes=size)
    assert LabelStore.create(tmp_path / "empty", manifest()).status() == Status(10, 0, 0, 0)


def test_foreign_files_are_listed_and_hidden_ones_are_not(made, tmp_path):
    store = made(tmp_path / "s", without=[(1, 1)])
    inside = ("view-00000/part-00005.bin", "view-00000/part-0001.bin", "view-00001/part-000001.bin")
    for name in ("notes.txt", "view-00002/x", *inside, ".DS_Store", "view-00000/.part-00001.lock"):
        (store.path / name).parent.mkdir(exist_ok=True)
        (store.path / name).write_bytes(b"x")
    store.part_path(1, 1).mkdir()
    said = store.verify()
    named = ["notes.txt", "view-00002", *inside, "view-00001/part-00001.bin"]
    for name in named:
        assert any(line.startswith(f"{store.path / name} is not a file") for line in said)
    assert len(said) == len(named)


# -- making and opening ---------------------------------------------------------------------------


def test_views_may_be_added_and_what_was_written_stays(made, manifest, tree, tmp_path):
    small = made(tmp_path / "s")
    before = {name: data for name, data in tree(tmp_path).items() if "manifest" not in name}
    grown = LabelStore.create(tmp_path / "s", manifest(num_views=4))
    assert (grown.manifest.num_views, grown.manifest.digest) == (4, small.manifest.digest)
    assert {view for view, _ in grown.missing_parts()} == {2, 3} and not grown.verify()
    after = tree(tmp_path)
    assert {name: data for name, data in after.items() if "manifest" not in name} == before
    again = LabelStore.create(tmp_path / "s", manifest(num_views=1))  # nothing is taken away
    assert again.manifest.num_views == LabelStore.open(tmp_path / "s").manifest.num_views == 4


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
    for name, kind in (("mine", ConfigError), ("checkpoint", DataError), ("file", DiskError)):
        with pytest.raises(kind):
            LabelStore.create(tmp_path / name, manifest())
    for name in ("mine", "file", "nothing", "empty", "checkpoint"):
        with pytest.raises(DataError):
            LabelStore.open(tmp_path / name)
    with pytest.raises(ConfigError, match="conv, inv"):
        LabelStore.open(tmp_path / "labels")
    assert tree(tmp_path) == before
    assert LabelStore.create(tmp_path / "empty", manifest()).status().sealed == 0
    made(tmp_path / "one" / "conv")
    assert LabelStore.open(tmp_path / "one").path.name == "conv"


# -- disks and processes --------------------------------------------------------------------------


class Rows(Dataset):
    """What a loader's worker would do."""

    def __init__(self, store: LabelStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return self.store.manifest.num_samples

    def __getitem__(self, i: int) -> int:
        return int(self.store.records(1, [i]).pixels[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than processors
def test_an_open_store_is_read_by_workers_and_pickled_small(made, tmp_path):
    store = made(tmp_path / "s")
    assert len(store.records(1, range(37))) == 37
    loader = DataLoader(
        Rows(store), batch_size=5, num_workers=2, multiprocessing_context="fork", collate_fn=list
    )
    assert [pixels for batch in loader for pixels in batch] == [1_000_003 + i for i in range(37)]
    data = pickle.dumps(store)
    assert len(data) < 5000
    assert pickle.loads(data).records(1, [36, 2]).pixels.tolist() == [1_000_039, 1_000_005]


def test_many_parts_need_few_open_files_and_one_that_is_cut_meanwhile_is_noticed(
    made, tmp_path, fork, join
):
    made(tmp_path / "s", num_samples=300, part_size=2)

    def read():
        resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
        store = LabelStore.open(tmp_path / "s")
        rng = np.random.default_rng(0)
        at, ids = rng.integers(0, 2, 900), rng.integers(0, 300, 900)
        found, present = store.read(at, ids)
        assert present.all() and (found["pixels"] == at * 1_000_003 + ids).all()
        path = store.part_path(0, 0)
        path.write_bytes(path.read_bytes()[:30])
        with pytest.raises(DataError, match=r"view-00000/part-00000.bin"):
            store.records(0, [0])
        path.unlink()
        assert not store.read([0], [0])[1].any()

    gc.collect()  # parts that earlier tests left mapped would count
    assert join(fork(read)) == 0
