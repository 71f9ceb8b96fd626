"""Locks end with the process that holds them, and with nothing else."""

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vitdistill.errors import ConfigError
from vitdistill.storage.lock import LOCK, lock_folder, try_lock


def held(path: Path) -> bool:
    lock = try_lock(path)
    if lock is not None:
        lock.release()
    return lock is None


@pytest.fixture
def hold() -> Iterator[Callable[[Callable[[], object]], int]]:
    """``hold(take)``: the pid of a process that ran ``take`` and waits until it is killed."""
    pids = []

    def start(take: Callable[[], object]) -> int:
        ready, tell = os.pipe()
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                kept = take()
                os.write(tell, b"x" if kept else b"-")
                signal.pause()
            finally:
                os._exit(1)
        os.close(tell)
        assert os.read(ready, 1) == b"x"
        os.close(ready)
        return pids[-1]

    yield start
    for pid in pids:
        with suppress(ProcessLookupError, ChildProcessError):
            kill(pid)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_one_at_a_time_and_no_file_stays(tmp_path):
    path = tmp_path / "lease"
    assert not held(path)
    with try_lock(path) as lock:
        assert held(path) and try_lock(path) is None
    lock.release()
    assert not held(path) and list(tmp_path.iterdir()) == []
    with try_lock(path):
        assert held(path)


def test_a_killed_holder_frees_the_lock(tmp_path, hold):
    holder = hold(lambda: lock_folder(tmp_path))
    with pytest.raises(ConfigError, match=f"in use by process {holder} on ") as caught:
        lock_folder(tmp_path)
    assert caught.value.field == "output"
    kill(holder)
    assert (tmp_path / LOCK).exists()
    with lock_folder(tmp_path):
        assert held(tmp_path / LOCK)
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_neither_keeps_nor_releases_the_lock(tmp_path, hold):
    path = tmp_path / "lease"
    lock = try_lock(path)
    hold(lambda: [lock.release(), "done"])
    assert held(path)
    lock.release()
    with try_lock(path):
        pass

    def parent_with_child():
        mine = try_lock(path)
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        return mine

    parent = hold(parent_with_child)
    assert held(path)
    kill(parent)
    assert not held(path), "its living child does not keep it"


def test_waiters_get_it_one_after_another(tmp_path, fork, join):
    """A waiter may be given the lock of a file that its holder has removed: that is no lock."""
    path, counter = tmp_path / "lease", tmp_path / "counter"
    counter.write_text("0")

    def count():
        for _ in range(25):
            while (lock := try_lock(path)) is None:
                time.sleep(0.001)
            with lock:
                counter.write_text(str(int(counter.read_text()) + 1))

    pids = [fork(count) for _ in range(8)]
    assert [join(pid) for pid in pids] == [0] * 8
    assert counter.read_text() == "200"


def test_a_disk_without_locks_refuses_nobody(tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder(tmp_path), lock_folder(tmp_path):
        assert not held(tmp_path / LOCK)
    assert list(tmp_path.iterdir()) == []
