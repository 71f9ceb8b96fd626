"""An image folder inside a tar archive, read in place: indexed once, never extracted, members
fetched by their offsets.

Member names are keys, never paths on this machine. Only regular files are read; links, devices,
absolute or climbing names and repeated names are refused.
"""

import gzip
import os
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from ..errors import DataError, DiskError, PermissionDenied
from ..messages import printable
from .decode import decode_image, image_size
from .source import SPLIT_NAMES, ImageSource, Split, arrange, is_image_name, no_split

_BLOCK = 512
_MAX_MEMBER = 2**30
_MAX_INFLATION = 20
_CHUNK = 2**22


class TarSource(ImageSource):
    """The images of ``[root/]{train,val}/<class>/*`` in a ``.tar`` or ``.tar.gz``; or, for
    training, of one folder.

    A ``.tar.gz`` is decompressed into a temporary file without a name, since gzip has no random
    access.
    """

    def __init__(self, path: Path, split: Split) -> None:
        """Index the archive. Raises `DataError` for an archive that is damaged, unsafe or without
        the split.
        """
        self._path = path
        self._file: IO[bytes] | None = None
        self.name = printable(str(path))
        members, folders = self._index()
        chosen, prefix = self._choose(members, split)
        files = [(name.removeprefix(prefix), members[name][1]) for name in chosen]
        self.name = f"{self.name}:{printable(prefix.rstrip('/'))}" if prefix else self.name
        self._check_empty_folders(folders, prefix, files)
        self.classes, self._keys, labels, sizes = arrange(self.name, files)
        self.labels = np.array(labels, dtype=np.int64)
        self.sizes = np.array(sizes, dtype=np.int64)
        self._offsets = [members[prefix + key][0] for key in self._keys]

    def key(self, i: int) -> str:
        """The member's name inside the split's folder."""
        return self._keys[i]

    def load(self, i: int) -> Image.Image:
        """Decode image ``i``."""
        return decode_image(self._read(i), self._title(i))

    def image_size(self, i: int) -> tuple[int, int]:
        """(width, height) from the image's header."""
        return image_size(self._read(i), self._title(i))

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, which another process opens for itself."""
        return {**self.__dict__, "_file": None}

    def _title(self, i: int) -> str:
        return f"{self.name}/{printable(self._keys[i])}"

    def _read(self, i: int) -> bytes:
        # pread has no shared file position, so forked workers may use one descriptor.
        size = int(self.sizes[i])
        content = os.pread(self._open().fileno(), size, self._offsets[i])
        if len(content) != size:
            raise DataError(
                f"{self._title(i)}: the archive has become shorter since it was opened; restore it."
            )
        return content

    def _open(self) -> IO[bytes]:
        if self._file is None:
            try:
                plain = open(self._path, "rb")  # noqa: SIM115 - stays open as long as the source
            except PermissionError as error:
                raise PermissionDenied(
                    f"no permission to read {printable(str(self._path))}."
                ) from error
            self._file = _decompressed(plain, self.name) if plain.read(2) == b"\x1f\x8b" else plain
            weakref.finalize(self, self._file.close)
        return self._file

    def _index(self) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """``{member name: (offset, bytes)}`` of the images, and the names of the folders."""
        file = self._open()
        length = os.fstat(file.fileno()).st_size
        members: dict[str, tuple[int, int]] = {}
        folders: list[str] = []
        try:
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    name = self._safe(member)
                    if member.isdir():
                        folders.append(name)
                    elif is_image_name(name.rsplit("/", 1)[-1]):
                        if name in members:
                            raise DataError(
                                f"{self.name} holds {printable(name)!r} twice; make the archive"
                                " again."
                            )
                        members[name] = (member.offset_data, member.size)
                end = os.pread(file.fileno(), _BLOCK, archive.offset)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise DataError(
                f"{self.name} is not a readable tar archive ({printable(str(error))})."
            ) from error
        if end != bytes(_BLOCK) or any(offset + size > length for offset, size in members.values()):
            raise DataError(
                f"{self.name} is cut short: its end is missing; copy or download it again."
            )
        return members, folders

    def _safe(self, member: tarfile.TarInfo) -> str:
        parts = [p for p in member.name.split("/") if p not in ("", ".")]
        if member.name.startswith("/") or ".." in parts:
            raise DataError(
                f"{self.name} holds the unsafe name {printable(member.name)!r}; make the archive"
                " again."
            )
        if (
            not (member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE))
            or member.issparse()
        ):
            raise DataError(
                f"{self.name} holds {printable(member.name)!r}, which is not a regular file; "
                "make the archive again with tar --dereference --hard-dereference."
            )
        if member.size > _MAX_MEMBER:
            raise DataError(
                f"{self.name} holds {printable(member.name)!r} of {member.size} bytes, too large"
                " for an image."
            )
        return "/".join(parts)

    def _choose(self, members: dict[str, tuple[int, int]], split: Split) -> tuple[list[str], str]:
        """The names of the split's images, and the prefix to take off them."""
        if not members:
            raise DataError(f"{self.name} has no images.")
        splits = {name for names in SPLIT_NAMES.values() for name in names}
        tops = {name.split("/", 1)[0] for name in members}
        only = next(iter(tops))
        root = (
            f"{only}/"
            if len(tops) == 1 and only not in splits and all("/" in name for name in members)
            else ""
        )
        inside = {
            name.removeprefix(root).split("/", 1)[0]
            for name in members
            if "/" in name.removeprefix(root)
        }
        for folder in SPLIT_NAMES[split]:
            if folder in inside:
                prefix = f"{root}{folder}/"
                return [name for name in members if name.startswith(prefix)], prefix
        if split == "train" and not inside:
            return list(members), root
        raise no_split(self.name, split, inside)

    def _check_empty_folders(
        self, folders: list[str], prefix: str, files: list[tuple[str, int]]
    ) -> None:
        filled = {path.split("/", 1)[0] for path, _ in files if "/" in path}
        if not filled:
            return
        for folder in folders:
            name = folder.removeprefix(prefix)
            if (
                folder.startswith(prefix)
                and "/" not in name
                and not name.startswith(".")
                and name not in filled
            ):
                raise DataError(
                    f"the class folder {printable(name)!r} of {self.name} has no images; fill or"
                    " remove it."
                )


def _decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    limit = _MAX_INFLATION * os.fstat(file.fileno()).st_size + _MAX_MEMBER
    file.seek(0)
    with ExitStack() as cleanup:
        plain = cleanup.enter_context(tempfile.TemporaryFile())
        try:
            with file, gzip.GzipFile(fileobj=file) as stream:
                for chunk in _chunks(stream):
                    plain.write(chunk)
                    if plain.tell() > limit:
                        raise DataError(
                            f"{name} grows to more than {limit >> 20} MiB; this is not an archive"
                            " of images."
                        )
            plain.flush()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{name} is damaged or cut short ({error}); copy or download it again."
            ) from error
        except OSError as error:
            place = tempfile.gettempdir()
            raise DiskError(
                f"{name} could not be decompressed into {place} ({error.strerror}); make room there"
                " or gunzip it."
            ) from error
        cleanup.pop_all()
    return plain


def _chunks(stream: gzip.GzipFile) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK):
        yield chunk
