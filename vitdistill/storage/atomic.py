"""The only code that writes a final file name: atomic, synced, digested; nothing half-written is
ever visible.

The order of every write is: a uniquely named temporary in the *same* folder, written while it is
hashed, fsync of the file, rename onto the final name, fsync of the folder. A crash, kill or full
disk at any point leaves the old content or the new. Files are created with mode 0666 and folders
with 0777 less the umask, so that colleagues can read what a run wrote."""

import errno
import hashlib
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ..errors import DataError, DiskError, PermissionDenied, UserError
from ..messages import format_bytes, printable
from . import processes


def _place(host: str, space: str) -> str:
    """A host and container as a temporary's name has them: readable, with a hash of all of it that
    tells equal beginnings apart.
    """
    whole = "\0".join((host, space))
    readable = re.sub(r"[^A-Za-z0-9.]", "_", host)[:32] or "host"
    return f"{readable}.{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


_HOST = _place(socket.gethostname(), processes.space())


_TEMP_NAME = re.compile(r"\.tmp-(?P<host>[A-Za-z0-9._]+)-(?P<pid>[0-9]+)-(?P<token>[0-9a-f]{12})")


# Tokens of the temporaries this process is writing now: a leftover of an earlier process may carry
# our own pid.
_active: set[str] = set()


@runtime_checkable
class Sink(Protocol):
    """What a content writer is given: something with ``write``."""

    def write(self, data: Any, /) -> int:
        """Write all of a bytes-like object and return its length in bytes."""
        ...


class Content(NamedTuple):
    """A file's content: its size in bytes and a function that writes it, so that it is never in
    memory at once.
    """

    size: int
    write: Callable[[Sink], None]


class _HashingSink:
    """Writes whole buffers to a descriptor and keeps their digest."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._digest = hashlib.sha256()
        self.written = 0

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done:])
        self.written += done
        return done

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def free_bytes(path: str | os.PathLike[str]) -> int | None:
    """Bytes an unprivileged process may still write on the volume that holds ``path`` (or will hold
    it).

    None: it does not say, as those in memory without a limit.
    """
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    volume = os.statvfs(place)
    return volume.f_bavail * volume.f_frsize if volume.f_blocks else None


def require_free(path: str | os.PathLike[str], needed: int) -> None:
    """Raise ``DiskError`` when the volume of ``path`` has less than ``needed`` bytes left: call it
    before any work.
    """
    with disk_errors(path):
        free = free_bytes(path)
    if free is not None and free < needed:
        raise DiskError(_full_sentence(path, needed, free))


def _full_sentence(path: str | os.PathLike[str], needed: int | None, free: int | None) -> str:
    need = f"{format_bytes(needed)} needed, " if needed is not None else ""
    have = f"{format_bytes(free)} free" if free is not None else "free space unknown"
    return (
        f"{printable(path)} cannot be written because the disk is full ({need}{have}); nothing that"
        " was there has changed: make room and run the same command again."
    )


@contextmanager
def disk_errors(path: str | os.PathLike[str], needed: int | None = None) -> Iterator[None]:
    """Turn an ``OSError`` about ``path`` into one sentence: ``DiskError``, or
    ``PermissionDenied``.
    """
    try:
        yield
    except OSError as error:
        raise _explained(error, path, needed) from error


def _explained(error: OSError, path: str | os.PathLike[str], needed: int | None) -> UserError:
    name = printable(path)
    reason = (error.strerror or str(error)).lower()
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            free = None
            with suppress(OSError):
                free = free_bytes(path)
            return DiskError(_full_sentence(path, needed, free))
        case errno.EFBIG:
            need = f" of {format_bytes(needed)}" if needed is not None else ""
            return DiskError(
                f"{name} cannot be written because a file{need} is larger than the limit here"
                " (ulimit -f, or the file system's own); raise the limit or write elsewhere."
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return PermissionDenied(
                f"{name} may not be read or written ({reason}); choose another folder or change its"
                " permissions."
            )
        case errno.EXDEV:
            return DiskError(
                f"{name} cannot be put in place because its folder spans two file systems; choose a"
                " folder on one."
            )
        case (
            errno.ENOTDIR
            | errno.EISDIR
            | errno.ENAMETOOLONG
            | errno.ELOOP
            | errno.ENOENT
            | errno.EEXIST
            | errno.ENOTEMPTY
        ):
            return DiskError(f"{name} cannot be written: {reason}; choose another path.")
        case _:
            return DiskError(
                f"{name} could not be read or written ({reason}); check the disk and run the same"
                " command again."
            )


def write_atomic(
    path: str | os.PathLike[str],
    content: bytes | Content | Callable[[Sink], None],
    *,
    replace: bool = True,
) -> str:
    """Write a whole file under its final name, durably, and return its sha256 (hex).

    ``content`` is the bytes, or a function that writes them to the file object it is given. The
    parent folder is made if missing. ``replace=False`` is first-wins: an existing file is left
    alone and ``FileExistsError`` raised. Raises ``DiskError`` or ``PermissionDenied``; then the old
    file is untouched and no temporary is left.
    """
    final = Path(path)
    make_dirs(final.parent)
    temp, token = _temporary(final.parent)
    try:
        digest = _write_new(temp, content, named=final)
        if replace:
            with disk_errors(final):
                os.replace(temp, final)
        else:
            try:
                os.link(temp, final)
            except FileExistsError:
                raise
            except OSError as error:
                raise _explained(error, final, None) from error
            with disk_errors(final):
                os.unlink(temp)
        with disk_errors(final):
            fsync_dir(final.parent)
        return digest
    finally:
        with suppress(OSError):
            os.unlink(temp)
        _active.discard(token)


def write_new(
    path: str | os.PathLike[str], content: bytes | Content | Callable[[Sink], None]
) -> str:
    """Create a file in a folder not published yet, fsync it, and return its sha256; an existing
    file is refused.
    """
    return _write_new(Path(path), content, named=Path(path))


def _write_new(path: Path, content: bytes | Content | Callable[[Sink], None], named: Path) -> str:
    size = (
        content.size
        if isinstance(content, Content)
        else len(content)
        if isinstance(content, bytes)
        else None
    )
    with disk_errors(named, size):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            sink = _HashingSink(fd)
            if isinstance(content, bytes):
                sink.write(content)
            else:
                (content.write if isinstance(content, Content) else content)(sink)
            if size is not None and sink.written != size:
                raise RuntimeError(f"{named}: announced {size} bytes and wrote {sink.written}")
            os.fsync(fd)
        finally:
            os.close(fd)
    return sink.hexdigest()


def make_dirs(path: str | os.PathLike[str]) -> None:
    """Make a folder and its missing parents, each one durable in its own parent."""
    folder = Path(path)
    missing = []
    with disk_errors(folder):
        while not folder.is_dir():
            missing.append(folder)
            if folder == folder.parent:
                break
            folder = folder.parent
        for folder in reversed(missing):
            # Another process may make it between the look and the call.
            with suppress(FileExistsError):
                os.mkdir(folder, 0o777)
            if not folder.is_dir():
                raise NotADirectoryError(
                    errno.ENOTDIR, "a file of that name is in the way", str(folder)
                )
            fsync_dir(folder.parent)


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 (hex) of a file's content, read from the start."""
    with disk_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def staged_dir(
    final: str | os.PathLike[str], aside: str | os.PathLike[str] | None = None
) -> Iterator[Path]:
    """A temporary folder beside ``final``: fill it with ``write_new``; it is published when the
    block ends without error.

    A non-empty ``final`` is first renamed to ``aside`` (and back if publishing fails); without
    ``aside`` it is a ``DiskError``. Any error removes the temporary.
    """
    final = Path(final)
    make_dirs(final.parent)
    temp, token = _temporary(final.parent)
    try:
        with disk_errors(final):
            os.mkdir(temp, 0o777)
        yield temp
        if aside is not None and final.is_dir() and any(final.iterdir()):
            _exchange(temp, final, Path(aside))
        else:
            publish_dir(temp, final)
    finally:
        with suppress(OSError):
            _remove(temp, known=None)
        _active.discard(token)


def publish_dir(temp: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Rename a folder of synced files onto its final name, durably; ``final`` must be absent or an
    empty folder.
    """
    with disk_errors(final):
        fsync_dir(temp)
        os.rename(temp, final)
        fsync_dir(Path(final).parent)


def _exchange(temp: Path, final: Path, aside: Path) -> None:
    with disk_errors(final):
        os.rename(final, aside)
    try:
        publish_dir(temp, final)
    except BaseException:
        with suppress(OSError):
            os.rename(aside, final)
        raise


def remove_dir(path: str | os.PathLike[str], known: Iterable[str]) -> bool:
    """Remove a published folder if all its entries are plain files named in ``known``; otherwise
    leave it and return False.

    It is renamed to a temporary first, so that a crash half way leaves no damaged folder under the
    old name.
    """
    folder = Path(path)
    names = frozenset(known)
    with disk_errors(folder):
        if not _holds_only(folder, names):
            return False
        temp, token = _temporary(folder.parent)
        try:
            os.rename(folder, temp)
            _remove(temp, known=names)
            fsync_dir(folder.parent)
        finally:
            _active.discard(token)
    return True


def clear_aside(
    aside: str | os.PathLike[str], final: str | os.PathLike[str], known: Iterable[str]
) -> None:
    """Remove a published folder that ``final`` has taken the place of; hidden files of the system's
    (``.DS_Store``) move to ``final``.

    What cannot go now is left where it is: the folder that counts is in place.
    """
    with suppress(OSError, UserError):
        for entry in Path(aside).iterdir():
            if entry.name.startswith(".") and not (Path(final) / entry.name).exists():
                os.rename(entry, Path(final) / entry.name)
        remove_dir(aside, known)


def remove_stale_temporaries(
    folder: str | os.PathLike[str], known: Iterable[str], *, alone: bool = False
) -> list[Path]:
    """Remove what killed processes of this host and container left behind in ``folder``, and return
    it.

    Only names this module makes, whose process is gone, and, for a folder, only with plain files
    named in ``known`` inside. ``alone``: nobody else may write here (a claimed run folder), so that
    those of other hosts, and of this one before it was started again, are left over too.
    """
    removed = []
    names = frozenset(known)
    with disk_errors(folder):
        entries = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
        for entry in entries:
            match = _TEMP_NAME.fullmatch(entry.name)
            if match is None or match["token"] in _active:
                continue
            if _is_alive_elsewhere(int(match["pid"])) if match["host"] == _HOST else not alone:
                continue
            if stat.S_ISDIR(entry.lstat().st_mode) and not _holds_only(entry, names):
                continue
            _remove(entry, known=names)
            removed.append(entry)
    return removed


def _temporary(folder: Path) -> tuple[Path, str]:
    token = secrets.token_hex(6)
    _active.add(token)
    return folder / f".tmp-{_HOST}-{os.getpid()}-{token}", token


def _is_alive_elsewhere(pid: int) -> bool:
    """Whether a number of this host and container is another living process's: an earlier one may
    have had our own.
    """
    return pid != os.getpid() and processes.started(pid) is not None


def _holds_only(folder: Path, names: frozenset[str]) -> bool:
    with os.scandir(folder) as entries:
        return all(
            entry.name in names and entry.is_file(follow_symlinks=False) for entry in entries
        )


def _remove(path: Path, known: frozenset[str] | None) -> None:
    """Unlink a file, or a folder of plain files (never a tree).

    Where a network disk keeps files that somebody still reads, the folder stays for
    `remove_stale_temporaries` to take later.
    """
    if not stat.S_ISDIR(path.lstat().st_mode):
        os.unlink(path)
        return
    for entry in list(os.scandir(path)):
        if known is None or entry.name in known:
            os.unlink(entry.path)
    try:
        os.rmdir(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A whole file; ``DataError`` when it is missing."""
    with disk_errors(path):
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise DataError(f"{printable(path)} is missing.") from error
