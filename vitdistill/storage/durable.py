"""The only code that writes a final file name: atomic, synced, digested; nothing half-written is
ever visible.

The order of every write is: a uniquely named temporary in the *same* folder, written while it is
hashed, fsync of the file, rename onto the final name, fsync of the folder. A crash, kill or full
disk at any point leaves the old content or the new. Files are created with mode 0666 and folders
with 0777 less the umask, so that colleagues can read what a run wrote.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import DataError, DiskError, PermissionDenied, UserError
from ..messages import format_bytes, printable
from . import processes

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


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

# The names of safetensors' header, and nothing torch has that safetensors lacks (quantised and
# complex types).
_TENSOR_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


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


# -- sentences ------------------------------------------------------------------------------------


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


# -- files ----------------------------------------------------------------------------------------


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


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 (hex) of a file's content, read from the start."""
    with disk_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- folders --------------------------------------------------------------------------------------


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


# -- manifests ------------------------------------------------------------------------------------


def write_manifest(
    folder: str | os.PathLike[str], files: Mapping[str, str], identity: Mapping[str, Any]
) -> None:
    """Write ``manifest.json`` into an unpublished folder: each file's size and sha256, what it is,
    its own digest.
    """
    write_new(Path(folder) / MANIFEST, _manifest_bytes(_manifest_body(folder, files, identity)))


def replace_manifest(
    folder: str | os.PathLike[str], files: Mapping[str, str], identity: Mapping[str, Any]
) -> None:
    """The same in a published folder, in place of the manifest that is there."""
    write_atomic(Path(folder) / MANIFEST, _manifest_bytes(_manifest_body(folder, files, identity)))


def _manifest_body(
    folder: str | os.PathLike[str], files: Mapping[str, str], identity: Mapping[str, Any]
) -> dict[str, Any]:
    sizes = {name: (Path(folder) / name).stat().st_size for name in files}
    return {
        "format": MANIFEST_FORMAT,
        "files": {name: {"bytes": sizes[name], "sha256": digest} for name, digest in files.items()},
        "identity": dict(identity),
    }


def _manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest; a reader compares whole files with it, so that every flipped
    bit shows.
    """
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return (
        json.dumps(
            {"manifest": body, "sha256": hashlib.sha256(text.encode()).hexdigest()},
            sort_keys=True,
            indent=1,
            ensure_ascii=True,
        ).encode()
        + b"\n"
    )


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest's body, checked against its own digest; ``DataError`` when missing, damaged or
    of another format.
    """
    path = Path(folder) / MANIFEST
    data = read_bytes(path)
    try:
        body = json.loads(data)["manifest"]
        intact = _manifest_bytes(body) == data
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise DataError(f"{printable(path)} is damaged: its content does not match its own digest.")
    if body.get("format") != MANIFEST_FORMAT:
        raise DataError(
            f"{printable(path)} has format {body.get('format')}, this version reads format"
            f" {MANIFEST_FORMAT}; use the version of vitdistill that wrote it."
        )
    for name in body["files"]:
        if Path(name).name != name or name in ("", ".", ".."):
            raise DataError(
                f"{printable(path)} names {printable(name)!r}, which is not a plain file name."
            )
    return dict(body)


def verify_dir(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Re-read every file of a published folder against its manifest and return the manifest's body.

    Raises ``DataError`` naming the first missing, short or changed file.
    """
    body = read_manifest(folder)
    for name in body["files"]:
        path = Path(folder) / name
        _check_size(path, body)
        _check_digest(path, sha256_file(path), body)
    return body


def read_verified(folder: str | os.PathLike[str], name: str, body: Mapping[str, Any]) -> bytes:
    """A file's bytes, read once and checked against the body from ``read_manifest``; ``DataError``
    if they differ.
    """
    path = Path(folder) / name
    if name not in body["files"]:
        raise DataError(f"{printable(path)} is not named in the manifest beside it.")
    _check_size(path, body)
    data = read_bytes(path)
    _check_digest(path, hashlib.sha256(data).hexdigest(), body)
    return data


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A whole file; ``DataError`` when it is missing."""
    with disk_errors(path):
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise DataError(f"{printable(path)} is missing.") from error


def _check_size(path: Path, body: Mapping[str, Any]) -> None:
    expected = body["files"][path.name]["bytes"]
    with disk_errors(path):
        try:
            found = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{printable(path)} is missing.") from error
    if found != expected:
        raise DataError(
            f"{printable(path)} is damaged: it has {found} bytes and its manifest says {expected}."
        )


def _check_digest(path: Path, found: str, body: Mapping[str, Any]) -> None:
    expected = body["files"][path.name]["sha256"]
    if found != expected:
        raise DataError(
            f"{printable(path)} is damaged: its sha256 is {found[:12]}... and its manifest says"
            f" {expected[:12]}...."
        )


# -- tensors --------------------------------------------------------------------------------------


def tensors_content(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Content:
    """Tensors as the content of a safetensors file, streamed one tensor at a time; equal tensors
    give equal bytes.

    The library's own writer is not used: it neither syncs nor honours the umask, and needs a second
    copy in memory. Raises ``DataError`` for a type safetensors has no name for.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _TENSOR_TYPES or tensor.layout is not torch.strided:
            raise DataError(
                f"Tensor {name!r} is {tensor.dtype} ({tensor.layout}), which a safetensors file"
                " cannot hold; convert it to a dense real type first."
            )
    # Wide types first keeps every tensor aligned to its own width, as the format asks.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TENSOR_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)

    def write(sink: Sink) -> None:
        sink.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if tensors[name].numel():
                flat = tensors[name].detach().cpu().contiguous().reshape(-1)
                sink.write(flat.view(torch.uint8).numpy().data)

    return Content(8 + len(text) + offset, write)


# -- logs -----------------------------------------------------------------------------------------


class AppendLog:
    """A text file that only grows by whole lines, for metrics: a resumed run cuts it back to where
    its checkpoint was.

    ``offset=None`` opens it at its end (a last line torn by a crash is cut off); an ``offset`` from
    an earlier ``.offset`` cuts everything after it. Raises ``DataError`` when the file is shorter
    than ``offset`` or ``offset`` is inside a line.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int | None = None) -> None:
        self.path = Path(path)
        make_dirs(self.path.parent)
        with disk_errors(self.path):
            self._fd = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
        try:
            with disk_errors(self.path):
                size = os.fstat(self._fd).st_size
                keep = self._end_of_last_line(size) if offset is None else offset
                if keep > size:
                    raise DataError(
                        f"{printable(self.path)} has {size} bytes and the run's state expects at"
                        f" least {keep}; it was cut or replaced: restore it, or start a new run in"
                        " another folder."
                    )
                if keep != self._end_of_last_line(keep):
                    raise DataError(
                        f"{printable(self.path)} is not the log this run wrote: byte {keep} is"
                        " inside a line; restore it, or start a new run in another folder."
                    )
                if keep != size:
                    os.ftruncate(self._fd, keep)
                os.fsync(self._fd)
                fsync_dir(self.path.parent)
            self.offset = keep
        except BaseException:
            os.close(self._fd)
            raise

    def _end_of_last_line(self, size: int) -> int:
        while size > 0:
            start = max(0, size - 65536)
            found = os.pread(self._fd, size - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            size = start
        return 0

    def append(self, line: str) -> None:
        """Append one line (a newline is added); after ``DiskError`` the file is as it was
        before.
        """
        if "\n" in line:
            raise ValueError("a log line holds no newline")
        view = memoryview(line.encode() + b"\n")
        with disk_errors(self.path, len(view)):
            try:
                done = 0
                while done < len(view):
                    done += os.write(self._fd, view[done:])
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._fd, self.offset)
                raise
        self.offset += len(view)

    def sync(self) -> int:
        """Make all lines durable and return ``.offset``, the number to put in a checkpoint."""
        with disk_errors(self.path):
            os.fsync(self._fd)
        return self.offset

    def close(self) -> None:
        """Sync and close; closing twice is fine."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with disk_errors(self.path):
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def __enter__(self) -> "AppendLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
