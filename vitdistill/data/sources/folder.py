"""Image folders."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...errors import DataError, PermissionDenied
from ...messages import printable
from .base import FileSource, ImageSource, Split, choose_split, is_hidden


def open_folder(location: str, split: Split) -> ImageSource | None:
    """Open a folder ``root/{train,val}/<class>/*``; None for what is no folder.

    For training, a folder without splits is read as a whole.
    """
    root = Path(location).expanduser()
    return FolderSource(root, split) if root.is_dir() else None


class FolderSource(FileSource):
    """Images in the files of a folder."""

    def __init__(self, root: Path, split: Split) -> None:
        _, folders, _ = next(_walk(str(root)))
        inner, self.notes = choose_split(printable(root), split, folders)
        self.root = root / inner
        files: list[str] = []
        classes: list[str] = []
        for folder, folders, names in _walk(str(self.root)):
            inside = os.path.relpath(folder, self.root) + "/"
            if inside == "./":
                inside, classes = "", folders
            files += [inside + name for name in names]
        self._arrange(printable(self.root), split, files, classes)

    def content(self, i: int) -> Path:
        return self.root / self._keys[i]

    def _head(self, path: str) -> bytes:
        with suppress(OSError):
            if (self.root / path).is_file():
                with open(self.root / path, "rb") as file:
                    return file.read(16)
        return b""

    def _size(self, path: str) -> int:
        try:
            found = os.stat(self.root / path)
        except OSError as error:
            _refuse(error)
            raise
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{self.root / path} is no regular file", "remove it")
        return found.st_size


def _walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield every folder below ``root`` that is not hidden: its path, folders and files."""
    for folder, folders, names in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in folders:
            path = os.path.join(folder, name)
            if os.path.islink(path) and os.path.realpath(path) in _real_parents(folder, root):
                raise DataError(f"{path} is a link to a folder around it", "remove it")
        yield folder, folders, [name for name in names if not is_hidden(name)]


def _real_parents(folder: str, root: str) -> set[str]:
    """Return the real paths of ``folder`` and its parents up to ``root``."""
    inside = os.path.relpath(folder, root).split(os.sep)
    return {os.path.realpath(os.path.join(root, *inside[:i])) for i in range(len(inside) + 1)}


def _refuse(error: OSError) -> None:
    kind = PermissionDenied if isinstance(error, PermissionError) else DataError
    what = f"{error.filename} cannot be read ({error.strerror})"
    raise kind(what, "make it readable, or remove it") from error
