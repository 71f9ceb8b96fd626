"""Image folders."""

import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError, PermissionDenied
from ...messages import printable
from .base import FileSource, ImageSource, Split, is_image, split_folder


def open_folder(location: str, split: Split) -> ImageSource | None:
    """Open a folder ``root/{train,val}/<class>/*``; None for what is no folder.

    For training, a folder that holds images itself is read as one set without labels.
    """
    root = Path(location).expanduser()
    return FolderSource(root, split) if root.is_dir() else None


class FolderSource(FileSource):
    """Images in the files of a folder."""

    def __init__(self, root: Path, split: Split) -> None:
        """Index the folder. Raises `MissingSplit`, `DataError` or `PermissionDenied`."""
        _, folders, names = next(_walk(root))
        has_images = any(is_image(name) for name in names)
        self.root = root / split_folder(printable(root), split, set(folders), has_images)
        files: dict[str, int] = {}
        classes: list[str] = []
        for folder, folders, names in _walk(self.root):
            inside = os.path.relpath(folder, self.root) + "/"
            if inside == "./":
                inside, classes = "", folders
            for name in names:
                if is_image(name):
                    files[inside + name] = _size(os.path.join(folder, name))
        super().__init__(printable(self.root), files, classes)

    def content(self, i: int) -> Path:
        """Return the file's path."""
        return self.root / self._keys[i]


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield every folder below ``root`` that is not hidden: its path, folders and files."""
    for folder, folders, names in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield folder, folders, names


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        _refuse(error)
        raise


def _refuse(error: OSError) -> None:
    kind = PermissionDenied if isinstance(error, PermissionError) else DataError
    what = f"{printable(error.filename)} cannot be read ({error.strerror})"
    raise kind(what, "make it readable, or remove it") from error
