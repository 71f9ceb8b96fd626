"""Locks between processes of one machine."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .atomic import disk_errors


@contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Only one process of this host at a time is inside for this folder; a courtesy, which some
    network file systems do not have.
    """
    with disk_errors(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def try_lock(path: str | os.PathLike[str]) -> int | None:
    """Lock a file until the number that is returned is closed, or this process and its forks end;
    None: another process of this machine has it, whatever container it is in, or the disk has no
    locks.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd
