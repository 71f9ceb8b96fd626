"""What a source of images is, and the rules that all kinds of sources share."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from ...errors import DataError, MissingSplit, Set
from ...keyed import I64
from ...messages import listed, plural, printable
from .decode import REMEDY, decode_image, image_size

Split = Literal["train", "val"]

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval", "test", "testing"),
}
"""What a split's folder, table or part on the hub may be called; the first one found is used."""

_SUFFIXES = "jpg jpeg jpe jfif png apng webp gif avif jp2 bmp dib ico tga tif tiff pgm ppm pbm pnm"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""File names that count as images, in lower case; every other file is ignored."""


class ImageSource(ABC):
    """An ordered, read-only collection of images that worker processes may share."""

    name: str  # what messages call it
    classes: tuple[str, ...]  # ordered by label; () when unlabelled
    labels: I64  # (N,), -1 where unlabelled
    sizes: I64  # (N,), the bytes that hold each image

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @abstractmethod
    def key(self, i: int) -> str:
        """Return a stable name of image ``i`` inside the source, such as ``cat/001.png``."""

    @abstractmethod
    def load(self, i: int) -> Image.Image:
        """Decode image ``i`` as RGB. Raises `DataError` naming an image that is damaged."""

    def image_size(self, i: int) -> tuple[int, int]:
        """Return (width, height) of image ``i``."""
        return self.load(i).size

    def fingerprint(self) -> str:
        """Hash the class list and every image's key, label and size, in order (SHA-256)."""
        digest = hashlib.sha256()
        for text in (str(len(self.classes)), *self.classes):
            digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
        rows = zip(self.labels.tolist(), self.sizes.tolist(), strict=True)
        for i, (label, size) in enumerate(rows):
            digest.update(f"{self.key(i)}\0{label}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class PartSource(ImageSource):
    """Some images of a source, in the order of their numbers there, int64 (N,)."""

    def __init__(self, source: ImageSource, ids: I64) -> None:
        self._source, self._ids = source, ids
        self.name, self.classes = source.name, source.classes
        self.labels, self.sizes = source.labels[ids], source.sizes[ids]

    def key(self, i: int) -> str:
        return self._source.key(int(self._ids[i]))

    def load(self, i: int) -> Image.Image:
        return self._source.load(int(self._ids[i]))

    def image_size(self, i: int) -> tuple[int, int]:
        return self._source.image_size(int(self._ids[i]))


def is_image(path: str) -> bool:
    """Whether the file at ``path``, inside a source, is an image: by its suffix, and not hidden.

    Files and folders whose names begin with a dot belong to tools (``.cache``, ``._photo.png``).
    """
    hidden = path.startswith(".") or "/." in path
    return not hidden and os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def split_options(location: str) -> tuple[str, dict[str, str]]:
    """Split ``PATH?name=value&...`` into the path and its options."""
    path, _, options = location.partition("?")
    return path, dict(parse_qsl(options, keep_blank_values=True))


class FileSource(ImageSource):
    """Image files in one folder a class, classes ordered by name; without folders, unlabelled."""

    def __init__(self, name: str, files: Mapping[str, int], folders: Iterable[str]) -> None:
        """Arrange ``files``, bytes by path inside the split.

        Raises `DataError` for an empty file, a mixture of both layouts, or one of the class
        ``folders`` without images.
        """
        owners = {path: path.split("/", 1)[0] if "/" in path else "" for path in files}
        found = set(owners.values())
        if "" in found and len(found) > 1:
            stray = next(path for path, owner in owners.items() if not owner)
            raise DataError(
                f"{name} has class folders and also images beside them, such as"
                f" {printable(stray)!r}",
                "move or remove those",
            )
        for folder in sorted(set(folders) - found):
            raise DataError(
                f"the class folder {name}/{printable(folder)} has no images", "fill or remove it"
            )
        for path in files:
            if files[path] == 0:
                raise DataError(f"{name}/{printable(path)}: the file is empty", REMEDY)
        self.name = name
        self.classes = tuple(sorted(found - {""}))
        self._keys = sorted(files, key=lambda path: (owners[path], path))
        label = {folder: i for i, folder in enumerate(self.classes)}
        self.labels = np.array([label.get(owners[key], -1) for key in self._keys], dtype=np.int64)
        self.sizes = np.array([files[key] for key in self._keys], dtype=np.int64)

    @abstractmethod
    def content(self, i: int) -> bytes | Path:
        """Return what image ``i``'s file holds, or its path."""

    def key(self, i: int) -> str:
        return self._keys[i]

    def load(self, i: int) -> Image.Image:
        return decode_image(self.content(i), self._title(i))

    def image_size(self, i: int) -> tuple[int, int]:
        return image_size(self.content(i), self._title(i))

    def _title(self, i: int) -> str:
        return f"{self.name}/{printable(self._keys[i])}"


def split_folder(name: str, split: Split, folders: Collection[str], has_images: bool) -> str:
    """Choose the split's among the ``folders`` of a place; "": the place itself, for training."""
    for folder in SPLIT_NAMES[split]:
        if folder in folders:
            return folder
    if split == "train" and has_images:
        return ""
    raise no_split(name, split, folders)


def no_split(name: str, split: Split, found: Iterable[str]) -> MissingSplit:
    """Make the error for a place without a split, naming what is there instead."""
    found = sorted(found)
    remedy = "put a part of the images, a tenth say, into class folders there"
    if split == "train":
        remedy = f"put the class folders into {name}/train/"
        if not set(found) & set(SPLIT_NAMES["val"]):
            remedy += f" and about a tenth of the images of each class into {name}/val/CLASS/"
    return MissingSplit(
        f"{name} has no {split!r} folder, but {listed(found, 5) or 'nothing'}",
        remedy,
        field="data.dir",
    )


def check_classes(source: ImageSource, classes: Sequence[str]) -> None:
    """Raise `DataError`, naming a difference, unless ``source`` has ``classes`` in this order."""
    if tuple(classes) == source.classes:
        return
    missing = sorted(set(classes) - set(source.classes))
    extra = sorted(set(source.classes) - set(classes))
    parts = [
        f"{verb} {len(names)} ({listed(names)})"
        for verb, names in (("lacks", missing), ("adds", extra))
        if names
    ]
    difference = " and ".join(parts) or "has them in another order"
    raise DataError(
        f"{source.name} has other classes than expected: it {difference}",
        "make the class names equal",
    )


def check_enough(source: ImageSource, batch_size: int) -> None:
    """Raise `DataError` when a training set does not fill one batch."""
    if len(source) < batch_size:
        raise DataError(
            f"{source.name} has {plural(len(source), 'image')}, fewer than one batch of"
            f" {batch_size}",
            Set("train.batch_size"),
            field="train.batch_size",
        )
