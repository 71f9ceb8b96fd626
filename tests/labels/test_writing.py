"""However many write, and whatever kills them, every part is written once and right."""

import json
import os
import random
import resource
import signal
import socket
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vitdistill.errors import ConfigError, DiskError
from vitdistill.labels import writing
from vitdistill.labels.store import LabelStore, Lease
from vitdistill.labels.writing import Unit, write_missing
from vitdistill.storage import processes
from vitdistill.storage.atomic import write_atomic


@pytest.fixture
def make(records):
    """The right records of every store of a unit, as `write_missing` asks for them."""

    def call(unit: Unit) -> list[np.ndarray]:
        unit.beat()
        return [
            records(store.layout, unit.view, np.arange(unit.lo, unit.hi)) for store in unit.stores
        ]

    return call


def leftovers(folder: Path) -> list[str]:
    return sorted(
        path.name
        for path in folder.rglob("*")
        if path.suffix == ".lease" or path.name.startswith(".tmp-")
    )


def lease(**changes) -> bytes:
    """A lease as this process would write it."""
    return json.dumps(
        {**processes.this_process(), "beat": 1, "token": "0123456789ab", **changes}
    ).encode()


# -- several writers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [{}, {"num_samples": 5}, {"num_samples": 41, "part_size": 1, "num_views": 1}]
)
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
            time.sleep(0.001)
            return make(unit)

        write_missing([LabelStore.open(store.path)], slow)

    kills, left, counts = 0, 0, [0]
    until = time.monotonic() + 60
    while time.monotonic() < until and kills < 40 and any(store.missing_parts()):
        reader, writer = os.pipe()  # for these two alone
        pids = [fork(lambda writer=writer: write(writer)) for _ in range(2)]
        os.close(writer)
        os.read(
            reader, 1
        )  # somebody has sealed a part when the clock starts, however slow the disk; or both have ended
        for pid in pids:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            kills += join(pid) == -signal.SIGKILL
        os.close(reader)
        left += len(leftovers(store.path))
        counts.append(is_right(store))
    assert kills >= 10 and left > 0 and counts == sorted(set(counts))
    assert store.verify() == []
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
    assert store.status().writing == [Lease(0, 0, socket.gethostname(), pid)]
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


def test_reading_while_writing(manifest, tmp_path, make, fork, join, records):
    store = LabelStore.create(tmp_path / "s", manifest(num_samples=200))
    reads, read = os.pipe()

    def write():
        os.close(read)

        def slow(unit: Unit) -> list[np.ndarray]:
            os.read(reads, 1 << 16)
            os.read(reads, 1)  # a reading ends between two parts, however busy the machine
            return make(unit)

        write_missing([store], slow)

    reading = LabelStore.open(tmp_path / "s")
    pid = fork(write)
    ids, counts = np.random.default_rng(0).permutation(200), []
    until = time.monotonic() + 60
    while (not counts or counts[-1] < 200) and time.monotonic() < until:
        found, present = reading.read(np.ones(200, np.int64), ids)
        np.testing.assert_array_equal(found[present], records(store.layout, 1, ids[present]))
        counts.append(int(present.sum()))
        os.write(read, b".")
    os.close(read)
    assert join(pid) == 0
    os.close(reads)
    assert counts == sorted(counts) and counts[-1] == 200 and len(set(counts)) > 20


# -- leases ---------------------------------------------------------------------------------------


def test_the_lease_of_a_killed_writer_is_taken_over_at_once(
    manifest, tmp_path, make, fork, join, is_right
):
    store = LabelStore.create(tmp_path / "s", manifest())
    pid = fork(lambda: write_missing([store], lambda unit: os.kill(os.getpid(), signal.SIGKILL)))
    # Before it is waited for, a killed process is a zombie.
    while not leftovers(store.path) or processes.started(pid) is not None:
        time.sleep(0.001)
    assert leftovers(store.path) == ["part-00000.lease"]
    started = time.monotonic()
    assert write_missing([store], make, patience_s=1e6) == 10
    assert time.monotonic() - started < 60
    assert is_right(store) == 74 and leftovers(store.path) == []
    assert join(pid) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("content", "dead"),
    [
        (lambda: lease(started="1"), True),  # its number is used again, by this very process
        (lambda: lease(pid=2**22 + 1), True),
        (lambda: lease(), False),
        (lambda: lease(pid=os.getppid(), started=processes.started(os.getppid())), False),
        (lambda: lease(pid=2**22 + 1, host="elsewhere"), False),
        (lambda: lease(pid=2**22 + 1, space="another container"), False),
        (lambda: lease(pid=0), False),
        (lambda: lease(pid=-1), False),
        (lambda: b"", False),
        (lambda: b"\xff\x00", False),
        (lambda: b"[]", False),
        (lambda: b'{"host": 3}', False),
    ],
)
def test_only_the_dead_of_this_host_lose_a_lease_at_once(
    manifest, tmp_path, make, is_right, content, dead
):
    store = LabelStore.create(tmp_path / "s", manifest(num_views=1))
    write_atomic(store.lease_path(0, 2), content())
    rounds = iter(range(8))  # stop is asked before each of five parts, and once a round
    assert write_missing(
        [store], make, patience_s=1e6, stop=lambda: next(rounds, None) is None
    ) == (5 if dead else 4)
    assert store.is_sealed(0, 2) == dead
    assert leftovers(store.path) == ([] if dead else ["part-00002.lease"])
    assert write_missing([store], make, patience_s=0) == (0 if dead else 1)
    assert is_right(store) == 37 and leftovers(store.path) == []


def test_another_host_is_waited_for_while_its_lease_changes(
    manifest, tmp_path, make, is_right, monkeypatch
):
    store = LabelStore.create(tmp_path / "s", manifest())
    path = store.lease_path(1, 1)
    write_atomic(path, lease(host="elsewhere", pid=17))
    # Clocks mean nothing: neither a time far in the past nor one to come.
    os.utime(path, (0, 0))
    assert store.status().writing == [Lease(1, 1, "elsewhere", 17)]
    now, beats, taken = 0.0, [], []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if len(beats) < 8:
            write_atomic(path, lease(host="elsewhere", pid=17, beat=len(beats)))
            os.utime(path, (2**32, 2**32))
            beats.append(now)

    def note(unit: Unit) -> list[np.ndarray]:
        if (unit.view, unit.part) == (1, 1):
            taken.append(now)
        return make(unit)

    monkeypatch.setattr(writing, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    assert write_missing([store], note, patience_s=3.0) == 10
    assert len(beats) == 8 and beats[-1] > 2 * 3.0
    assert [at - beats[-1] for at in taken] == [
        pytest.approx(4.0)
    ]  # it looks every two seconds: the first time that three are over
    assert is_right(store) == 74 and leftovers(store.path) == []


def test_who_waits_looks_less_and_less_often_until_there_is_work(
    manifest, tmp_path, make, is_right, monkeypatch
):
    store = LabelStore.create(tmp_path / "s", manifest(num_views=1))
    held = [store.lease_path(0, part) for part in (1, 3)]
    for path in held:
        write_atomic(path, lease(host="elsewhere"))
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) in (6, 8):
            held.pop().unlink()

    monkeypatch.setattr(writing.time, "sleep", sleep)
    assert write_missing([store], make, patience_s=1e6) == 5
    assert waits == pytest.approx([0.2, 0.4, 0.8, 1.6, 2, 2, 0.2, 0.4])
    assert is_right(store) == 37


def test_beats_change_the_lease_until_it_is_lost(manifest, tmp_path, make):
    store = LabelStore.create(tmp_path / "s", manifest(num_views=1, num_samples=3))
    path = store.lease_path(0, 0)

    def work(unit: Unit) -> list[np.ndarray]:
        seen = []
        for _ in range(3):
            seen.append(path.read_bytes())
            assert json.loads(seen[-1])["pid"] == os.getpid()
            unit.beat()
        assert len(set(seen)) == 3
        write_atomic(path, b"another's")
        unit.beat()
        assert path.read_bytes() == b"another's"
        path.unlink()
        unit.beat()
        assert not path.exists()
        write_atomic(path, b"another's")
        return make(unit)

    # Nobody else's lease is removed, but for the one of a part that is there.
    assert write_missing([store], work, patience_s=0) == 1
    assert leftovers(store.path) == []


def test_a_writer_that_gives_up_leaves_the_lease_of_the_one_that_took_over(manifest, tmp_path):
    store = LabelStore.create(tmp_path / "s", manifest(num_views=1, num_samples=3))
    path = store.lease_path(0, 0)

    def taken_over(unit: Unit) -> None:
        write_atomic(path, b"another's")

    assert write_missing([store], taken_over) == 0
    assert path.read_bytes() == b"another's"


def test_beats_are_rare(manifest, tmp_path, make, tree):
    store = LabelStore.create(tmp_path / "s", manifest(num_views=1, num_samples=3))

    def work(unit: Unit) -> list[np.ndarray]:
        before = tree(store.path)
        for _ in range(100):
            unit.beat()
        assert tree(store.path) == before
        return make(unit)

    assert write_missing([store], work) == 1


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
    with pytest.raises(ValueError):
        write_missing([store], lambda unit: [])
    assert leftovers(store.path) == [] and store.status().sealed == 2
    assert write_missing([store], make) == 8


def test_stopping(manifest, tmp_path, make):
    store = LabelStore.create(tmp_path / "s", manifest())
    assert write_missing([store], make, stop=lambda: store.status().sealed == 3) == 3
    given_up: list[Unit] = []
    assert write_missing([store], given_up.append) == 0
    assert len(given_up) == 1 and leftovers(store.path) == [] and store.status().sealed == 3
    # While there is nothing to do but to wait.
    write_atomic(store.lease_path(1, 4), lease(host="elsewhere"))
    rounds = iter(range(2))
    assert (
        write_missing(
            [store], make, stop=lambda: store.status().sealed == 9 and next(rounds, None) is None
        )
        == 6
    )


def test_what_killed_writers_leave_is_removed_and_nothing_else(made, manifest, tmp_path, make):
    store = made(tmp_path / "s", without=[(1, 1)])
    folder = store.view_path(0)
    for name, dead in (
        ("part-00003.lease", True),
        ("notes.txt", False),
    ):
        (folder / name).write_bytes(b"x" if dead else b"keep")
    (store.path / "mine.lease").write_bytes(b"keep")
    assert write_missing([store], make) == 1
    others = [
        path
        for path in store.path.rglob("*")
        if path.is_file() and path.suffix != ".bin" and path.name != "manifest.json"
    ]
    assert len(others) == 2 and all(path.read_bytes() == b"keep" for path in others)


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
        assert (unit.lo, unit.hi) == conv.part_range(unit.part)
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


@pytest.mark.parametrize("change", [{"num_samples": 36}, {"num_views": 1}, {"part_size": 16}])
def test_unequal_stores_are_not_written_together(manifest, tmp_path, make, change):
    stores = [
        LabelStore.create(tmp_path / "a", manifest()),
        LabelStore.create(tmp_path / "b", manifest(**change)),
    ]
    with pytest.raises(ConfigError, match=r"/a, .*/b differ in samples, views or part size"):
        write_missing(stores, make)


def test_a_full_disk_keeps_what_is_sealed(manifest, tmp_path, make, fork, join, tree, is_right):
    store = LabelStore.create(tmp_path / "s", manifest(num_samples=2500, part_size=500))
    assert write_missing([store], make, stop=lambda: store.status().sealed == 3) == 3
    before = tree(store.path)

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        with pytest.raises(DiskError, match=r"part-00003.bin cannot be written"):
            write_missing([store], make)

    assert join(fork(write)) == 0
    assert tree(store.path) == before and store.verify() == []
    assert write_missing([store], make) == 7
    assert is_right(store) == 5000 and store.verify() == []
