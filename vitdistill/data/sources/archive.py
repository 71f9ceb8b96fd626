"""An image folder inside a tar archive, read in place: indexed once, never extracted.

Member names are keys, never paths on this machine. Only regular files are read; links, devices,
absolute or climbing names and repeated names are refused.
"""

import gzip
import os
import tarfile
import tempfile
import weakref
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from PIL import Image

from ...errors import DataError, DiskError, PermissionDenied
from ...messages import printable
from .base import SPLIT_NAMES, ImageSource, Split, arrange, is_image, no_split
from .decode import decode_image, image_size

_BLOCK = 512
_MAX_MEMBER = 2**30
_MAX_INFLATION = 20
_CHUNK = 2**22


def open_archive(location: str, split: Split) -> ImageSource | None:
    """Open a ``.tar``, ``.tar.gz`` or ``.tgz`` file; None for anything else."""
    path = Path(location).expanduser()
    is_tar = path.name.lower().endswith((".tar", ".tar.gz", ".tgz")) and path.is_file()
    return TarSource(path, split) if is_tar else None


class TarSource(ImageSource):
    """The images of ``[root/]{train,val}/<class>/*``; or, for training, of one folder.

    A ``.tar.gz`` is decompressed into a temporary file without a name: gzip has no random access.
    """

    def __init__(self, path: Path, split: Split) -> None:
        """Index the archive.

        Raises `DataError` for an archive that is damaged or unsafe, `MissingSplit` for one without
        the split.
        """
        self._path = path
        self._file: IO[bytes] | None = None
        self.name = printable(path)
        members, folders = self._index()
        prefix = _split_prefix(self.name, members, split)
        if prefix:
            self.name += f":{printable(prefix.rstrip('/'))}"
        inside = {
            name[len(prefix) :]: place for name, place in members.items() if name.startswith(prefix)
        }
        classes = {name[len(prefix) :].split("/")[0] for name in folders if name.startswith(prefix)}
        self.classes, self._keys, self.labels, self.sizes = arrange(
            self.name,
            [(key, size) for key, (_, size) in inside.items()],
            {name for name in classes if name and not name.startswith(".")},
        )
        self._offsets = [inside[key][0] for key in self._keys]

    def key(self, i: int) -> str:
        """Return the member's name inside the split's folder."""
        return self._keys[i]

    def load(self, i: int) -> Image.Image:
        """Decode image ``i``."""
        return decode_image(self._read(i), self._title(i))

    def image_size(self, i: int) -> tuple[int, int]:
        """Return (width, height) from the image's header."""
        return image_size(self._read(i), self._title(i))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open file: another process opens it for itself."""
        return {**self.__dict__, "_file": None}

    def _title(self, i: int) -> str:
        return f"{self.name}/{printable(self._keys[i])}"

    def _read(self, i: int) -> bytes:
        # pread has no shared file position, so forked workers may use one descriptor. An archive
        # that was cut short meanwhile gives fewer bytes, which the decoder refuses.
        return os.pread(self._open().fileno(), int(self.sizes[i]), self._offsets[i])

    def _open(self) -> IO[bytes]:
        if self._file is None:
            try:
                plain = open(self._path, "rb")  # noqa: SIM115 - stays open as long as the source
            except PermissionError as error:
                raise PermissionDenied(f"no permission to read {self._path}") from error
            self._file = _decompress(plain, self.name) if plain.read(2) == b"\x1f\x8b" else plain
            weakref.finalize(self, self._file.close)
        return self._file

    def _index(self) -> tuple[dict[str, tuple[int, int]], list[str]]:
        """Read ``{member name: (offset, bytes)}`` of the images, and the names of the folders."""
        file = self._open()
        length = os.fstat(file.fileno()).st_size
        members: dict[str, tuple[int, int]] = {}
        folders: list[str] = []
        try:
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    name = self._checked_name(member)
                    if member.isdir():
                        folders.append(name)
                    elif is_image(name):
                        if name in members:
                            raise self._refusal(member, "twice")
                        members[name] = (member.offset_data, member.size)
                end = os.pread(file.fileno(), _BLOCK, archive.offset)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            reason = printable(str(error))
            raise DataError(f"{self.name} is not a readable tar archive ({reason})") from error
        if end != bytes(_BLOCK) or any(offset + size > length for offset, size in members.values()):
            raise DataError(f"{self.name} is cut short", "copy or download it again")
        return members, folders

    def _checked_name(self, member: tarfile.TarInfo) -> str:
        """Return the member's name without ``.`` parts; refuse what is no plain file or folder."""
        parts = [p for p in member.name.split("/") if p not in ("", ".")]
        if member.name.startswith("/") or ".." in parts:
            raise self._refusal(member, "under an unsafe name")
        if not (member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)):
            raise self._refusal(member, "as a link or a device")
        if member.issparse() or member.size > _MAX_MEMBER:
            raise self._refusal(member, "as a sparse or too large file")
        return "/".join(parts)

    def _refusal(self, member: tarfile.TarInfo, how: str) -> DataError:
        return DataError(
            f"{self.name} holds {printable(member.name)!r} {how}",
            "make the archive again of plain files, with tar -h",
        )


def _split_prefix(name: str, members: dict[str, tuple[int, int]], split: Split) -> str:
    """Find the folder of the split, with a slash; "" or the one root of a set without labels."""
    tops = {member.split("/", 1)[0] for member in members}
    nested = all("/" in member for member in members)
    splits = {folder for folders in SPLIT_NAMES.values() for folder in folders}
    root = f"{next(iter(tops))}/" if len(tops) == 1 and nested and not tops & splits else ""
    paths = [member.removeprefix(root) for member in members]
    inside = {path.split("/", 1)[0] for path in paths if "/" in path}
    for folder in SPLIT_NAMES[split]:
        if folder in inside:
            return f"{root}{folder}/"
    if split == "train" and members and not inside:
        return root
    raise no_split(name, split, inside)


def _decompress(file: IO[bytes], name: str) -> IO[bytes]:
    limit = _MAX_INFLATION * os.fstat(file.fileno()).st_size + _MAX_MEMBER
    file.seek(0)
    with ExitStack() as cleanup:
        plain = cleanup.enter_context(tempfile.TemporaryFile())
        try:
            with file, gzip.GzipFile(fileobj=file) as stream:
                while chunk := stream.read(_CHUNK):
                    plain.write(chunk)
                    if plain.tell() > limit:
                        raise DataError(f"{name} grows to more than {limit >> 20} MiB")
            plain.flush()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{name} is damaged or cut short ({error})", "copy or download it again"
            ) from error
        except OSError as error:
            raise DiskError(
                f"{name} could not be decompressed into {tempfile.gettempdir()} ({error.strerror})",
                ("make room there", "gunzip it"),
            ) from error
        cleanup.pop_all()
    return plain
