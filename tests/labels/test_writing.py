"""However many write, and whatever kills them, every part is written once and right."""

import os
import random
import signal
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from vitdistill.labels.store import LabelStore
from vitdistill.labels.writing import Unit, write_missing
from vitdistill.storage.lock import try_lock


@pytest.fixture
def make(records):
    """The right records of every store of a unit, as `write_missing` asks for them."""

    def call(unit: Unit) -> list[np.ndarray]:
        return [
            records(store.layout, unit.view, np.arange(unit.lo, unit.hi)) for store in unit.stores
        ]

    return call


def lock_of(store: LabelStore, view: int, part: int) -> Path:
    return store.view_path(view) / f".part-{part:05d}.lock"


def leftovers(folder: Path) -> list[str]:
    kept = (".bin", ".json", ".txt")
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix not in kept)


# -- several writers ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"num_samples": 41, "part_size": 1, "num_views": 1}])
def test_the_bytes_do_not_depend_on_who_writes(
    manifest, tmp_path, make, fork, join, tree, is_right, shape
):
    trees = []
    for writers in (1, 2, 3):
        store = LabelStore.create(tmp_path / str(writers), manifest(**shape))
        reader, writer = os.pipe()

        def write(store=store, writer=writer):
            own = LabelStore.open(store.path)
            os.write(writer, bytes([write_missing([own], make)]))

        pids = [fork(write) for _ in range(writers)]
        assert [join(pid) for pid in pids] == [0] * writers
        assert sum(os.read(reader, 100)) == store.status().sealed == store.status().parts
        os.close(reader)
        os.close(writer)
        assert is_right(store) == store.manifest.num_samples * store.manifest.num_views
        assert store.verify() == [] and leftovers(store.path) == []
        trees.append(tree(store.path))
        assert write_missing([store], make) == 0
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.whole
def test_kill_9_at_random_moments_leaves_whole_parts(
    made, manifest, tmp_path, make, fork, join, tree, is_right
):
    store = LabelStore.create(tmp_path / "s", manifest(num_samples=399, part_size=4))
    rng = random.Random(11)

    def write(writer):
        calls = count()

        def slow(unit: Unit) -> list[np.ndarray]:
            if next(calls) == 1:  # the first part is sealed
                os.write(writer, b".")
            time.sleep(0.004)
            return make(unit)

        write_missing([LabelStore.open(store.path)], slow)

    kills, left, counts = 0, 0, [0]
    until = time.monotonic() + 60
    while time.monotonic() < until and kills < 40 and any(store.missing_parts()):
        reader, writer = os.pipe()  # for these two alone
        pids = [fork(lambda writer=writer: write(writer)) for _ in range(2)]
        os.close(writer)
        os.read(reader, 1)  # somebody has sealed a part, however slow the disk, or both have ended
        for pid in pids:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            kills += join(pid) == -signal.SIGKILL
        os.close(reader)
        left += len(leftovers(store.path))
        counts.append(is_right(store))
    assert kills >= 10 and left > 0 and counts == sorted(set(counts))
    assert store.verify() == []
    for path in store.path.rglob(".tmp-*"):
        os.utime(path, (0, 0))
    before = {name: data for name, data in tree(store.path).items() if name.endswith(".bin")}
    missing = len(list(store.missing_parts()))
    asked = []

    def note(unit: Unit) -> list[np.ndarray]:
        asked.append((unit.view, unit.part))
        return make(unit)

    assert write_missing([store], note) == missing == len(set(asked)) == len(asked)
    after = tree(store.path)
    assert before.items() <= after.items()
    assert is_right(store) == 2 * 399 and store.verify() == [] and leftovers(store.path) == []
    assert tree(made(tmp_path / "fresh", num_samples=399, part_size=4).path) == after


def test_a_part_in_work_is_left_to_its_writer(manifest, tmp_path, make, fork, join, is_right):
    store = LabelStore.create(tmp_path / "s", manifest())
    working, worker = os.pipe()
    waiting, waiter = os.pipe()

    def write_first():
        def hold(unit: Unit) -> list[np.ndarray]:
            os.write(worker, b".")
            os.read(waiting, 1)
            return make(unit)

        assert write_missing([store], hold, stop=lambda: store.is_sealed(0, 0)) == 1

    pid = fork(write_first)
    os.read(working, 1)
    done = []

    def progress(now: int, total: int) -> None:
        # All but the one part are there: let the other go on.
        if now == total - 1 and (now, total) not in done:
            os.write(waiter, b".")
        done.append((now, total))

    assert write_missing([store], make, progress=progress) == 9
    assert join(pid) == 0
    assert done == sorted(done) and done[-1] == (10, 10)
    assert is_right(store) == 74 and leftovers(store.path) == []
    for end in (working, worker, waiting, waiter):
        os.close(end)


def test_the_first_of_two_that_made_one_part_wins(manifest, tmp_path, make, records, tree):
    store = LabelStore.create(tmp_path / "s", manifest(num_views=1))

    def overtaken(unit: Unit) -> list[np.ndarray]:
        if unit.part % 2:
            assert store.seal(
                unit.view, unit.part, records(store.layout, 1, np.arange(unit.lo, unit.hi))
            )
        return make(unit)

    assert write_missing([store], overtaken) == 3
    assert store.read([0] * 4, [0, 8, 16, 36])[0]["pixels"].tolist() == [0, 1_000_003 + 8, 16, 36]
    assert store.verify() == []


# -- locks ----------------------------------------------------------------------------------------


def test_the_part_of_a_killed_writer_is_taken_over(manifest, tmp_path, make, fork, join, is_right):
    store = LabelStore.create(tmp_path / "s", manifest())
    pid = fork(lambda: write_missing([store], lambda unit: os.kill(os.getpid(), signal.SIGKILL)))
    assert join(pid) == -signal.SIGKILL
    assert leftovers(store.path) == [".part-00000.lock"]
    assert write_missing([store], make) == 10
    assert is_right(store) == 74 and leftovers(store.path) == []


def test_the_processes_of_one_run_begin_with_parts_of_their_own(manifest, tmp_path, make):
    store = LabelStore.create(tmp_path / "s", manifest())
    places, asked = store.missing_parts(), []

    def note(unit: Unit) -> list[np.ndarray]:
        asked.append((unit.view, unit.part))
        return make(unit)

    assert write_missing([store], note, rank=1, world_size=3) == 10
    share = places[1::3]
    assert asked == share + [place for place in places if place not in share]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_an_error_frees_the_part(manifest, tmp_path, make, error):
    store = LabelStore.create(tmp_path / "s", manifest())

    def fail(unit: Unit) -> list[np.ndarray]:
        if unit.part == 2:
            raise error
        return make(unit)

    with pytest.raises(type(error)):
        write_missing([store], fail)
    assert leftovers(store.path) == [] and store.status().sealed == 2
    assert write_missing([store], make) == 8


def test_stopping(manifest, tmp_path, make):
    store = LabelStore.create(tmp_path / "s", manifest())
    assert write_missing([store], make, stop=lambda: store.status().sealed == 3) == 3
    given_up: list[Unit] = []
    assert write_missing([store], given_up.append) == 0
    assert len(given_up) == 1 and leftovers(store.path) == [] and store.status().sealed == 3
    store.view_path(1).mkdir()
    with try_lock(lock_of(store, 1, 4)):  # and while there is nothing to do but to wait
        rounds = iter(range(2))
        asked = lambda: store.status().sealed == 9 and next(rounds, None) is None
        assert write_missing([store], make, stop=asked) == 6


def test_what_killed_writers_leave_is_removed_and_nothing_else(made, tmp_path, make):
    """A young temporary may be a writer's who is at work on a disk without locks."""
    store = made(tmp_path / "s", without=[(1, 1)])
    folder = store.view_path(0)
    young, mine = ".tmp-ba9876543210", "mine.lease"
    for name in (".tmp-0123456789ab", ".part-00002.lock", young, mine):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, None if name == young else (0, 0))
    assert write_missing([store], make) == 1
    assert leftovers(store.path) == [young, mine]


# -- several stores, full disks -------------------------------------------------------------------


def test_stores_are_written_together_and_only_what_each_lacks(
    made, manifest, layout, tmp_path, make, is_right
):
    conv = made(tmp_path / "conv", without=[(0, 1), (1, 0)])
    other = made(
        tmp_path / "inv",
        without=[(0, 1), (0, 3)],
        layout=layout(5),
        identity={"teacher": "another"},
    )
    asked = {}

    def note(unit: Unit) -> list[np.ndarray]:
        asked[unit.view, unit.part] = [store.path.name for store in unit.stores]
        assert (unit.lo, unit.hi) == conv.manifest.part_range(unit.part)
        return make(unit)

    assert write_missing([conv, other], note) == 4
    assert asked == {(0, 1): ["conv", "inv"], (0, 3): ["inv"], (1, 0): ["conv"]}
    assert is_right(conv) == is_right(other) == 74
    assert conv.verify() == other.verify() == leftovers(tmp_path) == []
    assert write_missing([], make) == 0


def test_two_writers_of_two_stores_in_opposite_order(
    manifest, layout, tmp_path, make, fork, join, is_right
):
    stores = [
        LabelStore.create(tmp_path / str(k), manifest(layout=layout(k), part_size=2))
        for k in (2, 5)
    ]
    pids = [fork(lambda order=order: write_missing(stores[::order], make)) for order in (1, -1, 1)]
    assert [join(pid) for pid in pids] == [0, 0, 0]
    assert is_right(stores[0]) == is_right(stores[1]) == 74 and leftovers(tmp_path) == []
