"""Writes that a crash cannot tear: the only code that writes a final file name.

A file is written to a temporary in the *same* folder (a rename across file systems is a copy, and
can tear), synced, and renamed, which is atomic: readers see the old content or the new. Then the
folder is synced, so that the rename is on the disk before the function returns. A folder of several
files is filled under a temporary name and renamed in the same way.
"""

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import DataError, DiskError, PermissionDenied, UserError
from ..messages import format_bytes

StrPath = str | os.PathLike[str]
Content = bytes | memoryview | Callable[[BinaryIO], object]
"""What a file is to hold, or a function that writes it into the open file."""


# -- errors ---------------------------------------------------------------------------------------


@contextmanager
def disk_errors(path: StrPath) -> Iterator[None]:
    """Turn an ``OSError`` about ``path`` into `DiskError` or `PermissionDenied`."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
                raise _full(path, reason) from error
            case errno.EACCES | errno.EPERM | errno.EROFS:
                what = f"{path} may not be read or written ({reason})"
                fix = "choose another folder, or change its permissions"
                raise PermissionDenied(what, fix) from error
        raise DiskError(f"{path} cannot be read or written ({reason})") from error


def require_free(path: StrPath, needed: int) -> None:
    """Raise `DiskError` if the volume that will hold ``path`` has less than ``needed`` bytes."""
    place = Path(path).absolute()
    with disk_errors(path):
        while not place.exists() and place != place.parent:
            place = place.parent
        total, _, free = shutil.disk_usage(place)
    if total and free < needed:  # some volumes in memory have no blocks and no limit
        raise _full(path, f"{format_bytes(needed)} needed, {format_bytes(free)} free")


def _full(path: StrPath, why: str) -> DiskError:
    what = f"{path} cannot be written: the disk is full ({why}); nothing has changed"
    return DiskError(what, "make room and run the same command again")


# -- files ----------------------------------------------------------------------------------------


def write_atomic(path: StrPath, content: Content) -> None:
    """Write a whole file, durably; missing folders are made, an old file is replaced as a whole."""
    _publish(Path(path), content, os.replace)


def write_first(path: StrPath, content: Content) -> bool:
    """Write a file as `write_atomic` does unless there is one; return whether this call wrote it.

    Of any number of writers exactly one wins, on network disks without locks too.
    """
    try:
        _publish(Path(path), content, os.link)
    except DiskError as error:
        if isinstance(error.__cause__, FileExistsError):
            return False
        raise
    return True


def _publish(final: Path, content: Content, put: Callable[[Path, Path], None]) -> None:
    make_dirs(final.parent)
    temporary = _temporary(final.parent)
    try:
        with disk_errors(final):
            _write_synced(temporary, content)
            put(temporary, final)
            fsync_dir(final.parent)
    finally:
        _remove(temporary)


def write_new(path: StrPath, content: Content) -> None:
    """Create a file in a folder that is not published yet, and fsync it."""
    with disk_errors(path):
        _write_synced(Path(path), content)


def _write_synced(path: Path, content: Content) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if callable(content):
            with open(fd, "wb", closefd=False) as file:
                content(file)
        else:
            write_all(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, content: bytes | memoryview) -> None:
    """Write all of ``content``: one call may write a part of it."""
    left = memoryview(content).cast("B")
    while left:
        left = left[os.write(fd, left) :]


def read_bytes(path: StrPath, most: int | None = None) -> bytes:
    """Read a whole file; ``DataError`` if there is no regular file or more than ``most`` bytes."""
    with disk_errors(path):
        if not Path(path).is_file():  # reading a pipe would block
            raise DataError(f"{path} is missing, or no file")
        if most is not None and Path(path).stat().st_size > most:
            raise DataError(f"{path} is larger than {format_bytes(most)}")
        return Path(path).read_bytes()


def sha256_file(path: StrPath) -> str:
    with disk_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- folders --------------------------------------------------------------------------------------


def make_dirs(path: StrPath) -> None:
    """Make a folder and its missing parents, each durable in its own parent."""
    folder = Path(path)
    missing = []
    with disk_errors(folder):
        while not folder.is_dir():
            missing.append(folder)
            if folder == folder.parent:
                break
            folder = folder.parent
        for folder in reversed(missing):
            # Another process may make it first; with a file of that name, the next step fails.
            with suppress(FileExistsError):
                os.mkdir(folder, 0o777)
            fsync_dir(folder.parent)


def fsync_dir(path: StrPath) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def staged_dir(final: StrPath, replaces: Collection[str] | None = None) -> Iterator[Path]:
    """Yield a temporary folder to fill with `write_new`; without an error it becomes ``final``.

    With ``replaces``, the names of its files, a non-empty ``final`` is replaced as a whole or not
    at all; other files in it stay beside it, in ``.replaced-*``. Without, it is a `DiskError`.
    After a kill half way, `settle_asides` finishes the work.
    """
    final = Path(final)
    make_dirs(final.parent)
    temporary = _temporary(final.parent)
    try:
        with disk_errors(final):
            os.mkdir(temporary, 0o777)
        yield temporary
        with disk_errors(final):
            fsync_dir(temporary)
            aside = None
            if replaces is not None and final.is_dir() and any(final.iterdir()):
                aside = final.with_name(f".replaced-{final.name}-{secrets.token_hex(4)}")
                os.rename(final, aside)
            try:
                os.rename(temporary, final)
                fsync_dir(final.parent)
            except BaseException:
                if aside is not None:
                    with suppress(OSError):
                        os.rename(aside, final)
                raise
        if aside is not None:
            _clear_aside(aside, final, replaces or ())
    finally:
        _remove(temporary)


def remove_dir(path: StrPath, known: Collection[str]) -> bool:
    """Remove a published folder if it holds only plain files named in ``known``, else return False.

    It is renamed to a temporary first: a crash half way leaves no damaged folder under its name.
    """
    folder = Path(path)
    with disk_errors(folder):
        entries = list(os.scandir(folder))
        if not all(e.name in known and e.is_file(follow_symlinks=False) for e in entries):
            return False
        temporary = _temporary(folder.parent)
        os.rename(folder, temporary)
        _remove(temporary)
        fsync_dir(folder.parent)
    return True


def settle_asides(folder: Path, known: Collection[str]) -> None:
    """Finish the work of a process that was killed in `staged_dir` while replacing a folder here.

    The old folder is restored if the new one did not arrive, and removed if it did.
    """
    with disk_errors(folder):
        for old in folder.glob(".replaced-*-*"):
            final = folder / old.name.removeprefix(".replaced-").rpartition("-")[0]
            if final.exists():
                _clear_aside(old, final, known)
            else:
                os.rename(old, final)


def _clear_aside(aside: Path, final: Path, known: Collection[str]) -> None:
    """Remove a folder that ``final`` has replaced, after moving hidden files (``.DS_Store``) over.

    What cannot be removed is left: the new folder is in place.
    """
    with suppress(OSError, UserError):
        for entry in aside.iterdir():
            if entry.name.startswith(".") and not (final / entry.name).exists():
                os.rename(entry, final / entry.name)
        remove_dir(aside, known)


def remove_temporaries(folder: StrPath, older_than: float = 0.0) -> None:
    """Remove what killed processes left half written in ``folder``: names that this module makes.

    Another process's unfinished files look the same. So either hold the folder's lock, or spare
    what was written in the last ``older_than`` seconds.
    """
    with disk_errors(folder):
        for path in Path(folder).glob(".tmp-" + "[0-9a-f]" * 12):
            if time.time() - path.lstat().st_mtime >= older_than:
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a temporary; `remove_temporaries` gets what a network disk keeps for a reader."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def _temporary(folder: Path) -> Path:
    return folder / f".tmp-{secrets.token_hex(6)}"
