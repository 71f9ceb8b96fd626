"""Where images come from: `open_source` turns a location into an `ImageSource`, and finds what is
wrong with it first.

Folders are read here; archives, tables and torchvision's data sets have a module each.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import DataError, MissingSplit, PermissionDenied
from ..messages import listed, plural, printable
from .decode import decode_image, image_size

Split = Literal["train", "val"]

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "validation", "test"),
}
"""The folder names that hold a split, the first one found being used."""

_SUFFIXES = "jpg jpeg jpe jfif png apng webp gif avif jp2 bmp dib ico tga tif tiff pgm ppm pbm pnm"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""File names that count as images, in lower case; every other file is not looked at."""


class ImageSource(ABC):
    """An ordered, read-only collection of images that worker processes may share.

    Attributes:
        name: what messages call it.
        classes: class names, ordered by label; () when unlabelled.
        labels: int64 (N,), -1 where unlabelled.
        sizes: int64 (N,), bytes that hold each image.
    """

    name: str
    classes: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @abstractmethod
    def key(self, i: int) -> str:
        """A stable name of image ``i`` inside the source, such as ``cat/001.png``."""

    @abstractmethod
    def load(self, i: int) -> Image.Image:
        """Image ``i`` in mode RGB. Raises `DataError` naming the image when it cannot be
        decoded.
        """

    def image_size(self, i: int) -> tuple[int, int]:
        """(width, height) of image ``i``."""
        return self.load(i).size

    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of the class list and every image's key, label and size in bytes,
        in order.
        """
        digest = hashlib.sha256()
        for text in (str(len(self.classes)), *self.classes):
            digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
        for i, (label, size) in enumerate(
            zip(self.labels.tolist(), self.sizes.tolist(), strict=True)
        ):
            digest.update(f"{self.key(i)}\0{label}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def open_source(
    location: str, split: Split, *, classes: tuple[str, ...] | None = None
) -> ImageSource:
    """Open a ``split`` of the images at ``location``; with ``classes`` the source must have these,
    in this order.

    ``location`` is one of

    * a folder ``root/{train,val}/<class>/*`` (``validation`` and ``test`` also serve as ``val``),
    or, for training without labels, a
      folder of images;
    * a ``.tar`` or ``.tar.gz`` that holds such a tree; it is read in place and never extracted;
    * a ``.parquet`` or ``.arrow`` file, or a folder of them, in the layout of Hugging Face
    datasets; ``hfds/NAME`` for the hub;
    * ``torchvision/NAME?root=FOLDER`` for a data set of torchvision that is already on disk.

    Raises `MissingSplit` when the split is not there, or ``val`` has no labels to evaluate with,
    `DataError` when images or classes are missing or damaged, and `ConfigError` when the location
    has no meaning.
    """
    source = _open(location, split)
    if len(source) == 0:
        raise DataError(f"{source.name} has no images.")
    if split == "val" and not source.classes:
        raise MissingSplit(
            f"{source.name} has no class folders, and evaluation needs labels; put the images into"
            " one folder a class."
        )
    if classes is not None:
        check_classes(source, classes)
    return source


def _open(location: str, split: Split) -> ImageSource:
    kind, _, rest = location.partition("/")
    if kind == "torchvision" and not os.path.isdir(location):
        from .builtin import TorchvisionSource

        return TorchvisionSource(rest, split)
    if kind == "hfds":
        from .table import open_hub

        return open_hub(rest, split)
    path, _, options = location.partition("?")
    root = Path(path).expanduser()
    suffixes = "".join(root.suffixes[-2:]).lower()
    if suffixes.endswith((".tar", ".tar.gz", ".tgz")) and root.is_file():
        from .archive import TarSource

        return TarSource(root, split)
    from .table import TABLE_SUFFIXES, is_table_folder, open_table

    if (root.is_file() and root.suffix.lower() in TABLE_SUFFIXES) or (
        root.is_dir() and is_table_folder(root)
    ):
        return open_table(root, split, options)
    if not root.exists() and not root.is_symlink():
        raise DataError(f"there is no folder or file {printable(str(root))!r}; check the path.")
    if not root.is_dir():
        raise DataError(
            f"{printable(str(root))} is neither a folder, a .tar, a .parquet nor an .arrow file."
        )
    return FolderSource(root, split)


def check_classes(source: ImageSource, classes: Sequence[str]) -> None:
    """Raise `DataError`, naming the differences, unless ``source`` has exactly ``classes`` in this
    order.
    """
    if tuple(classes) == source.classes:
        return
    missing = sorted(set(classes) - set(source.classes))
    extra = sorted(set(source.classes) - set(classes))
    if missing or extra:
        parts = [
            f"{word} {len(names)} ({listed(names)})"
            for word, names in (("lacks", missing), ("adds", extra))
            if names
        ]
        raise DataError(
            f"{source.name} has other classes than expected: it {' and '.join(parts)}; make the"
            " class names equal."
        )
    first = next(i for i, (a, b) in enumerate(zip(classes, source.classes, strict=True)) if a != b)
    raise DataError(
        f"{source.name} has the expected classes in another order: label {first} is"
        f" {printable(source.classes[first])!r}, not {printable(classes[first])!r}; order them"
        " alike."
    )


def too_few(source: ImageSource, batch_size: int) -> str:
    """What is said of training images that do not fill one batch."""
    few = f"{source.name} has {plural(len(source), 'image')}, fewer than one batch of {batch_size}"
    return f"{few}: lower --batch-size, and --lr in proportion"


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: a known suffix, and not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def no_split(name: str, split: Split, found: Iterable[str]) -> MissingSplit:
    """The error for a place without the split's folder, naming what is there instead and how to
    make one.
    """
    found = sorted(found)
    wanted = " or ".join(repr(n) for n in SPLIT_NAMES[split])
    remedy = "put a part of the images, a tenth say, into class folders there"
    if split == "train":
        remedy = f"put the class folders into {name}/train/"
        if not set(found) & set(SPLIT_NAMES["val"]):
            remedy += f" and about a tenth of the images of each class into {name}/val/CLASS/"
    return MissingSplit(
        f"{name} has no {wanted} folder; found {listed(found, 5) or 'nothing'}: {remedy}."
    )


def arrange(
    name: str, files: Sequence[tuple[str, int]]
) -> tuple[tuple[str, ...], list[str], list[int], list[int]]:
    """Sort the (path inside the split, bytes) of images into ``(classes, keys, labels, sizes)``.

    Paths without a folder mean a set without labels. Raises `DataError` for an empty image or a
    mixture of both layouts.
    """
    nested = ["/" in path for path, _ in files]
    if any(nested) and not all(nested):
        stray = next(path for (path, _), inside in zip(files, nested, strict=True) if not inside)
        raise DataError(
            f"{name} has class folders and also images beside them, such as {printable(stray)!r};"
            " move or remove those."
        )
    for path, size in files:
        if size == 0:
            raise DataError(
                f"{name}/{printable(path)}: the image file is empty (0 bytes); replace the file or"
                " remove it."
            )
    labelled = bool(files) and nested[0]
    owner = [path.split("/", 1)[0] if labelled else "" for path, _ in files]
    classes = tuple(sorted(set(owner))) if labelled else ()
    index = {c: i for i, c in enumerate(classes)}
    order = sorted(range(len(files)), key=lambda i: (owner[i], files[i][0]))
    return (
        classes,
        [files[i][0] for i in order],
        [index.get(owner[i], -1) for i in order],
        [files[i][1] for i in order],
    )


class FolderSource(ImageSource):
    """Images in ``root/<split>/<class>/*``, classes ordered by name; for training, also one folder
    without classes.
    """

    def __init__(self, root: str | os.PathLike[str], split: Split) -> None:
        """Index the folder; every check of `open_source` that needs no decoding happens here."""
        self.root = self._split_folder(Path(root), split)
        self.name = printable(str(self.root))
        files = self._scan()
        self.classes, self._keys, labels, sizes = arrange(self.name, files)
        self.labels = np.array(labels, dtype=np.int64)
        self.sizes = np.array(sizes, dtype=np.int64)

    def key(self, i: int) -> str:
        """The path inside the split's folder, with forward slashes."""
        return self._keys[i]

    def load(self, i: int) -> Image.Image:
        """Decode image ``i``."""
        path = self.root / self._keys[i]
        return decode_image(path, printable(str(path)))

    def image_size(self, i: int) -> tuple[int, int]:
        """(width, height) from the file's header."""
        path = self.root / self._keys[i]
        return image_size(path, printable(str(path)))

    @staticmethod
    def _split_folder(root: Path, split: Split) -> Path:
        for name in SPLIT_NAMES[split]:
            if (root / name).is_dir():
                return root / name
        entries = _list(root)
        flat = any(is_image_name(e.name) and e.is_file() for e in entries)
        if split == "train" and flat:
            return root
        raise no_split(printable(str(root)), split, (e.name for e in entries if e.is_dir()))

    def _scan(self) -> list[tuple[str, int]]:
        files: list[tuple[str, int]] = []
        for entry in _list(self.root):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                inside = list(self._walk(entry.path, entry.name))
                if not inside:
                    raise DataError(
                        f"the class folder {printable(entry.path)} has no images; fill it or"
                        " remove it."
                    )
                files += inside
            elif is_image_name(entry.name):
                files.append((entry.name, self._size(entry)))
        return files

    def _walk(self, folder: str, prefix: str) -> Iterable[tuple[str, int]]:
        for entry in _list(folder):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from self._walk(entry.path, f"{prefix}/{entry.name}")
            elif is_image_name(entry.name):
                yield f"{prefix}/{entry.name}", self._size(entry)

    def _size(self, entry: os.DirEntry[str]) -> int:
        try:
            return entry.stat().st_size
        except OSError as error:
            raise DataError(
                f"{printable(entry.path)}: the image cannot be read ({error.strerror}); is it a"
                " broken link?"
            ) from error


def _list(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda e: e.name)
    except PermissionError as error:
        raise PermissionDenied(
            f"no permission to list the folder {printable(os.fspath(folder))}."
        ) from error
    except OSError as error:
        raise DataError(
            f"the folder {printable(os.fspath(folder))} cannot be listed ({error.strerror})."
        ) from error
