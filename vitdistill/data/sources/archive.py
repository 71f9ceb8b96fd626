"""An image folder inside a tar archive, read in place: indexed once, never extracted.

Member names are keys, never paths on this machine.
"""

import gzip
import os
import shutil
import tarfile
import tempfile
import weakref
import zlib
from pathlib import Path
from typing import IO, Any

from ...errors import DataError
from ...messages import printable
from ...storage.atomic import disk_errors
from .base import (
    ALL_SPLIT_NAMES,
    FileSource,
    ImageSource,
    Split,
    choose_split,
    find_images,
    is_hidden,
)
from .decode import MAX_BYTES

_BLOCK = 512


def open_archive(location: str, split: Split) -> ImageSource | None:
    """Open a ``.tar``, ``.tar.gz`` or ``.tgz`` file; None for anything else."""
    path = Path(location).expanduser()
    is_tar = path.name.lower().endswith((".tar", ".tar.gz", ".tgz")) and path.is_file()
    return TarSource(path, split) if is_tar else None


class TarSource(FileSource):
    """The images of ``[root/]{train,val}/<class>/*``; or, for training, of one folder.

    A ``.tar.gz`` is decompressed into a temporary file without a name: gzip has no random access.
    """

    def __init__(self, path: Path, split: Split) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self.name = printable(path)
        self._members, folders = self._index()
        images, _ = find_images(self._members, self._head)
        prefix, self.notes = _split_prefix(self.name, images, split)
        members, start = self._members.items(), len(prefix)
        self._members = {key[start:]: at for key, at in members if key.startswith(prefix)}
        classes = {key[start:].split("/")[0] for key in folders if key.startswith(prefix)} - {""}
        name = f"{self.name}:{printable(prefix[:-1])}" if prefix else self.name
        self._arrange(name, split, self._members, classes)

    def content(self, i: int) -> bytes:
        return self._read(self._keys[i], MAX_BYTES + 1)

    def _head(self, path: str) -> bytes:
        return self._read(path, 16)

    def _size(self, path: str) -> int:
        size = self._members[path][1]
        if size < 0:
            what = f"{self.name} holds {path!r} as a link, a device or a sparse file"
            raise DataError(what, "make the archive again of plain files, with tar -h")
        return size

    def _read(self, path: str, most: int) -> bytes:
        # pread has no shared file position, so forked workers may use one descriptor. An archive
        # that was cut short meanwhile gives fewer bytes, which the decoder refuses.
        offset, size = self._members[path]
        return os.pread(self._open().fileno(), max(0, min(size, most)), offset)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open file: another process opens it for itself."""
        return {**self.__dict__, "_file": None}

    def _open(self) -> IO[bytes]:
        if self._file is None:
            with disk_errors(self._path):
                plain = open(self._path, "rb")  # noqa: SIM115 - stays open as long as the source
            self._file = _decompress(plain, self.name) if plain.read(2) == b"\x1f\x8b" else plain
            weakref.finalize(self, self._file.close)
        return self._file

    def _index(self) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """Read ``{member name: (offset, bytes)}`` of the files, and the names of the folders.

        Hidden members are left out; one that is not a plain file has -1 bytes.
        """
        file = self._open()
        length = os.fstat(file.fileno()).st_size
        members: dict[str, tuple[int, int]] = {}
        folders: list[str] = []
        try:
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    name = "/".join(p for p in member.name.split("/") if p not in ("", "."))
                    if is_hidden(name):
                        continue
                    if member.isdir():
                        folders.append(name)
                    else:
                        is_plain = member.isreg() and not member.issparse()
                        members[name] = (member.offset_data, member.size if is_plain else -1)
                end = os.pread(file.fileno(), _BLOCK, archive.offset)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            reason = str(error)
            raise DataError(f"{self.name} is not a readable tar archive ({reason})") from error
        if end != bytes(_BLOCK) or any(offset + size > length for offset, size in members.values()):
            raise DataError(f"{self.name} is cut short", "copy or download it again")
        return members, folders


def _split_prefix(name: str, members: list[str], split: Split) -> tuple[str, tuple[str, ...]]:
    """Do `choose_split`, in the one root if there is one; return the folder with a slash."""
    tops = {member.split("/", 1)[0] for member in members}
    nested = all("/" in member for member in members)
    is_split = ALL_SPLIT_NAMES & {top.lower() for top in tops}
    root = f"{next(iter(tops))}/" if len(tops) == 1 and nested and not is_split else ""
    paths = [member.removeprefix(root) for member in members]
    inside = {path.split("/", 1)[0] for path in paths if "/" in path}
    folder, notes = choose_split(name, split, inside)
    return (f"{root}{folder}/" if folder else root), notes


def _decompress(file: IO[bytes], name: str) -> IO[bytes]:
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - stays open as long as the source
    file.seek(0)
    try:
        with file, gzip.GzipFile(fileobj=file) as stream:
            shutil.copyfileobj(stream, plain, 2**22)
        plain.flush()
    except (EOFError, OSError, zlib.error) as error:
        plain.close()
        what = f"{name} is damaged, or has no room in {tempfile.gettempdir()} ({error})"
        fixes = "copy or download it again", "make room there", "gunzip it"
        raise DataError(what, fixes) from error
    return plain
