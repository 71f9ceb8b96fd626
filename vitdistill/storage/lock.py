"""Locks the kernel holds: released by any death of the process, so no lock is ever stale.

A lock is an ``flock`` on a file that is made for it and removed on release; what a killed process
leaves is an unlocked file, which the next one takes over. On a network disk without locks every
process gets every lock: do not start two runs in one folder there.
"""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError, Give
from .atomic import disk_errors, make_dirs

LOCK = ".lock"


class InUse(ConfigError):
    """Another process has the folder."""


class Lock:
    """A lock that is held until `release`, the end of its block, or the end of this process."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd
        _held.add(self)

    def release(self) -> None:
        """Release the lock and remove its file; releasing it twice is fine."""
        if self in _held:
            _held.discard(self)
            # First the name: once the lock is released, the file may be another process's.
            with suppress(OSError):
                os.unlink(self._path)
            os.close(self._fd)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


_held: set[Lock] = set()


def _close_in_child() -> None:
    """A lock lasts until the last copy of its descriptor is closed: workers must not keep it."""
    for lock in _held:
        os.close(lock._fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def try_lock(path: str | os.PathLike[str]) -> Lock | None:
    """Lock the file ``path``, made if it is missing; None if it is locked already."""
    path = Path(path)
    while True:
        with disk_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:
            return Lock(path, fd)  # a disk without locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return Lock(path, fd)
        os.close(fd)  # its holder removed it before we got it


def lock_folder(folder: str | os.PathLike[str]) -> Lock:
    """Lock a folder, made if it is missing, for this process; `InUse` if another has it."""
    make_dirs(folder)
    path = Path(folder, LOCK)
    lock = try_lock(path)
    if lock is None:
        owner = "another process"
        with suppress(OSError):
            owner = path.read_text(errors="replace") or owner
        what = f"{folder} is in use by {owner}"
        raise InUse(what, ("wait for it", Give("output")), field="output")
    with disk_errors(path):
        os.ftruncate(lock._fd, 0)
        os.write(lock._fd, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock
