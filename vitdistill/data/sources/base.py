"""What a source of images is, and the rules that all kinds of sources share."""

import hashlib
import os
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image

from ...errors import DataError, Fix, MissingSplit, Set
from ...keyed import I64
from ...messages import listed, plural, printable
from .decode import decode_image, image_size

Split = Literal["train", "val"]

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval", "test", "testing"),
}
"""What a split's folder, table or part on the hub may be called; the first one found is used."""

ALL_SPLIT_NAMES = frozenset(SPLIT_NAMES["train"] + SPLIT_NAMES["val"])

_SUFFIXES = "jpg jpeg jpe jfif png apng webp gif avif jp2 bmp dib ico tga tif tiff pgm ppm pbm pnm"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""File names that count as images, in lower case; files without a suffix are looked into."""

_HEADS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5\n", b"P6\n")

_OF_SYSTEMS = frozenset(
    ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)


class ImageSource(ABC):
    """An ordered, read-only collection of images that worker processes may share."""

    name: str  # what messages call it
    classes: tuple[str, ...]  # ordered by label; () when unlabelled
    labels: I64  # (N,), -1 where unlabelled
    sizes: I64  # (N,), the bytes that hold each image
    notes: tuple[str, ...] = ()  # what a person should know of how they were found

    def __len__(self) -> int:
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

    def digest(self, i: int) -> bytes:
        """Hash the content of image ``i`` (SHA-256)."""
        return hashlib.sha256(self.load(i).tobytes()).digest()

    def fingerprint(self) -> str:
        """Hash the class list and every image's key, label and size, in order (SHA-256)."""
        digest = hashlib.sha256()
        for text in (str(len(self.classes)), *self.classes):
            digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
        rows = zip(self.labels.tolist(), self.sizes.tolist(), strict=True)
        for i, (label, size) in enumerate(rows):
            digest.update(f"{self.key(i)}\0{label}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class EncodedSource(ImageSource):
    """A source of image files, of whatever format."""

    @abstractmethod
    def content(self, i: int) -> bytes | Path:
        """Return what image ``i``'s file holds, or its path."""

    @abstractmethod
    def title(self, i: int) -> str:
        """Return what messages call image ``i``."""

    def digest(self, i: int) -> bytes:
        content = self.content(i)
        data = content if isinstance(content, bytes) else content.read_bytes()
        return hashlib.sha256(data).digest()

    def load(self, i: int) -> Image.Image:
        return decode_image(self.content(i), self.title(i))

    def image_size(self, i: int) -> tuple[int, int]:
        return image_size(self.content(i), self.title(i))


class IndirectSource(ImageSource):
    """Images of other sources."""

    @abstractmethod
    def place(self, i: int) -> tuple[ImageSource, int]:
        """Return the source of image ``i``, and its number there."""

    def key(self, i: int) -> str:
        source, number = self.place(i)
        return source.key(number)

    def load(self, i: int) -> Image.Image:
        source, number = self.place(i)
        return source.load(number)

    def image_size(self, i: int) -> tuple[int, int]:
        source, number = self.place(i)
        return source.image_size(number)

    def digest(self, i: int) -> bytes:
        source, number = self.place(i)
        return source.digest(number)


class PartSource(IndirectSource):
    """Some images of a source, in the order of their numbers there, int64 (N,)."""

    def __init__(self, source: ImageSource, ids: I64) -> None:
        self._source, self._ids = source, ids
        self.name, self.classes = source.name, source.classes
        self.labels, self.sizes = source.labels[ids], source.sizes[ids]
        self.notes = source.notes

    def place(self, i: int) -> tuple[ImageSource, int]:
        return self._source, int(self._ids[i])


def is_hidden(path: str) -> bool:
    """Whether the file or folder at ``path``, inside a source, belongs to a tool or a system.

    It does if a part of the path begins with a dot (``.cache``, ``._photo.png``) or is the name of
    a system folder.
    """
    return any(part.startswith(".") or part in _OF_SYSTEMS for part in path.split("/"))


def find_images(paths: Iterable[str], read_head: Callable[[str], bytes]) -> tuple[list[str], str]:
    """Choose the images among files, and say how many others there are.

    A file without a suffix is judged by its first bytes, from ``read_head``.
    """
    images, others = [], Counter[str]()
    for path in paths:
        suffix = os.path.splitext(path)[1].lower()
        head = b"" if suffix else read_head(path)
        is_image = head.startswith(_HEADS) or head[4:12] == b"ftypavif" or head[8:12] == b"WEBP"
        if is_image or suffix in IMAGE_SUFFIXES:
            images.append(path)
        else:
            others[printable(suffix) or "without a suffix"] += 1
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common(4))
    count = plural(others.total(), "file")
    note = f"{count} left out as no images ({kinds}): convert to JPEG or PNG those that are"
    return images, note if others else ""


def split_options(location: str) -> tuple[str, dict[str, str]]:
    """Split ``PATH?name=value&...`` into the path and its options."""
    path, _, options = location.partition("?")
    return path, dict(parse_qsl(options, keep_blank_values=True))


class FileSource(EncodedSource):
    """Image files in one folder a class, classes ordered by name; without folders, unlabelled."""

    def _arrange(
        self, name: str, split: Split, files: Iterable[str], folders: Iterable[str]
    ) -> None:
        """Take the images among ``files``, paths inside the split; classes are ``folders``."""
        images, left_out = find_images(files, self._head)
        owners = {path: path.split("/", 1)[0] if "/" in path else "" for path in images}
        found = set(owners.values())
        if "" in found and len(found) > 1:
            stray = next(path for path, owner in owners.items() if not owner)
            what = f"{name} has class folders and also images beside them, such as"
            fixes = "move or remove those", Set("data.unlabelled")
            raise DataError(f"{what} {stray!r}", fixes)
        for path in images:
            if ALL_SPLIT_NAMES.intersection(path.lower().split("/")[1:-1][:1]):
                what = f"{name} holds several sets of images, one in {owners[path]!r}"
                raise DataError(what, Set("data.dir", f"{name}/{owners[path]}"))
        for folder in sorted(set(folders) - found) if split == "train" else ():
            what = f"the class folder {name}/{folder} has no images"
            raise DataError(f"{what} ({left_out})" if left_out else what, "fill or remove it")
        self.name = name
        if left_out:
            self.notes += (f"{name}: {left_out}",)
        self.classes = tuple(sorted(found - {""}))
        self._keys = sorted(images, key=lambda path: (owners[path], path))
        label = {folder: i for i, folder in enumerate(self.classes)}
        self.labels = np.array([label.get(owners[key], -1) for key in self._keys], dtype=np.int64)
        self.sizes = np.array([self._size(key) for key in self._keys], dtype=np.int64)

    @abstractmethod
    def _head(self, path: str) -> bytes:
        """Return the first bytes of a file."""

    @abstractmethod
    def _size(self, path: str) -> int:
        """Return a file's size in bytes. Raises `DataError` for what is no file."""

    def key(self, i: int) -> str:
        return self._keys[i]

    def title(self, i: int) -> str:
        return f"{self.name}/{printable(self._keys[i])}"


def choose_split(name: str, split: Split, found: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """Choose the split's name among those ``found``; return it with a note if it is another.

    For training, if no name is a split's, choose "": the whole place. Raises `MissingSplit`.
    """
    known = {other.lower(): other for other in sorted(found)}
    if split == "train" and not ALL_SPLIT_NAMES & known.keys():
        return "", ()
    chosen = next((word for word in SPLIT_NAMES[split] if word in known), None)
    if chosen is not None:
        taken = say_taken(name, split, known[chosen])
        return known[chosen], () if chosen == split else (taken,)
    fixes: tuple[Fix, ...] = (f"put the class folders into {name}/train/",)
    if split == "val":
        fixes = (Set("data.val_split", 0.1), f"put some images into {name}/val/CLASS/")
        parent, folder = os.path.split(name)
        beside = any(os.path.isdir(os.path.join(parent, other)) for other in SPLIT_NAMES["val"])
        if folder in SPLIT_NAMES["train"] and beside:
            fixes = (Set("data.dir", parent or "."),)
    what = f"{name} has no {split!r} folder, but {listed(sorted(found), 5) or 'nothing'}"
    raise MissingSplit(what, fixes, field="data.dir")


def say_taken(name: str, split: Split, chosen: str) -> str:
    """Return the note of a split under another name."""
    note = f"{name}: {chosen!r} is taken for {split!r}"
    if chosen.lower() in ("test", "testing"):
        note += ", and chooses the best weights (beside a 'val' it would stay untouched)"
    return note


def typical_side(source: ImageSource) -> int:
    """Return the median shorter side of some images, pixels."""
    some = range(0, len(source), -(-len(source) // 32))
    return statistics.median_high(min(source.image_size(i)) for i in some)


def renumber(source: ImageSource, classes: Sequence[str]) -> None:
    """Number the labels of ``source``, in place, as in ``classes``; it may lack some of them.

    Raises `DataError` for a class that is not among them.
    """
    extra = [name for name in source.classes if name not in set(classes)]
    if extra:
        what = f"{source.name} has classes that are not expected ({listed(extra)})"
        raise DataError(what, "make the class names equal")
    index = np.array([*map(classes.index, source.classes), -1], dtype=np.int64)
    source.labels, source.classes = index[source.labels], tuple(classes)  # -1 stays -1


def check_enough(source: ImageSource, batch_size: int) -> None:
    """Raise `DataError` when a training set does not fill one batch."""
    if len(source) < batch_size:
        found = plural(len(source), "image")
        what = f"{source.name} has {found}, fewer than one batch of {batch_size}"
        raise DataError(what, Set("train.batch_size"), field="train.batch_size")
