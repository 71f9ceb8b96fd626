"""Image folders."""

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ...errors import DataError, PermissionDenied
from ...messages import printable
from .base import SPLIT_NAMES, ImageSource, Split, arrange, is_image, no_split
from .decode import decode_image, image_size


def open_folder(location: str, split: Split) -> ImageSource | None:
    """Open a folder ``root/{train,val}/<class>/*``; None for what is no folder."""
    root = Path(location).expanduser()
    return FolderSource(root, split) if root.is_dir() else None


class FolderSource(ImageSource):
    """Images in ``root/<split>/<class>/*``, classes ordered by name.

    For training, a ``root`` that holds images itself is read as one set without labels.
    """

    def __init__(self, root: Path, split: Split) -> None:
        """Index the folder. Raises `MissingSplit`, `DataError` or `PermissionDenied`."""
        self.root = _split_folder(root, split)
        self.name = printable(self.root)
        folders = [e.name for e in _list(self.root) if e.is_dir() and not e.name.startswith(".")]
        self.classes, self._keys, self.labels, self.sizes = arrange(
            self.name, list(_walk(self.root, "")), folders
        )

    def key(self, i: int) -> str:
        """Return the path inside the split's folder, with forward slashes."""
        return self._keys[i]

    def load(self, i: int) -> Image.Image:
        """Decode image ``i``."""
        path = self.root / self._keys[i]
        return decode_image(path, printable(path))

    def image_size(self, i: int) -> tuple[int, int]:
        """Return (width, height) from the file's header."""
        path = self.root / self._keys[i]
        return image_size(path, printable(path))


def _split_folder(root: Path, split: Split) -> Path:
    for name in SPLIT_NAMES[split]:
        if (root / name).is_dir():
            return root / name
    entries = _list(root)
    if split == "train" and any(is_image(e.name) and e.is_file() for e in entries):
        return root
    raise no_split(printable(root), split, (e.name for e in entries if e.is_dir()))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    for entry in _list(folder):
        key = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{key}/")
        elif is_image(entry.name):
            try:
                yield key, entry.stat().st_size
            except OSError as error:
                raise DataError(
                    f"{printable(entry.path)}: the file cannot be read ({error.strerror})",
                    "replace or remove it",
                ) from error


def _list(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda e: e.name)
    except PermissionError as error:
        raise PermissionDenied(f"no permission to list the folder {printable(folder)}") from error
