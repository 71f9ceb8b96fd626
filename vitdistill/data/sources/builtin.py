"""torchvision's data sets that keep their images as arrays, read from disk, never downloaded."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from ...errors import ConfigError, DataError
from ...messages import printable, suggest
from .base import ImageSource, Split, say_taken, split_options

_BY_FLAG = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS")
_BY_NAME = ("STL10", "SVHN")
_DIGITS = tuple("0123456789")


def open_builtin(location: str, split: Split) -> ImageSource | None:
    """Open ``torchvision/NAME?root=FOLDER``; None for another location.

    Raises `ConfigError` for an unknown name or option, `DataError` for absent or damaged files.
    """
    path, options = split_options(location)
    kind, _, name = path.partition("/")
    if kind != "torchvision" or os.path.isdir(location):
        return None
    if name not in _BY_FLAG + _BY_NAME:
        fix = suggest(name, _BY_FLAG + _BY_NAME)
        raise ConfigError(f"unknown data set {path!r}", fix, field="data.dir")
    if set(options) != {"root"}:
        what = f"{path} needs its folder, and only that"
        raise ConfigError(what, f"write {path}?root=FOLDER", field="data.dir")
    return TorchvisionSource(name, Path(options["root"]).expanduser(), split)


class TorchvisionSource(ImageSource):
    """A data set of torchvision; ``val`` is its test split."""

    def __init__(self, name: str, root: Path, split: Split) -> None:
        self.name = f"torchvision/{name}?root={printable(root)} ({split})"
        self._split = split
        dataset = _read(name, root, split)
        images = np.asarray(dataset.data)
        if images.ndim == 4 and images.shape[1] == 3:  # some keep the channels first
            images = images.transpose(0, 2, 3, 1)
        self._images = np.ascontiguousarray(images)
        labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
        self.labels = np.asarray(labels, dtype=np.int64)
        if split == "val":
            self.notes = (say_taken(f"torchvision/{name}", split, "test"),)
        self.classes = tuple(getattr(dataset, "classes", _DIGITS))
        self.sizes = np.full(len(self.labels), self._images[0].nbytes, dtype=np.int64)

    def key(self, i: int) -> str:
        return f"{self._split}/{i:06d}"

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self._images[i]).convert("RGB")

    def image_size(self, i: int) -> tuple[int, int]:
        return self._images.shape[2], self._images.shape[1]


def _read(name: str, root: Path, split: Split) -> Any:
    wanted = "train" if split == "train" else "test"
    choice = {"train": split == "train"} if name in _BY_FLAG else {"split": wanted}
    try:
        if not root.is_dir():  # torchvision would create it
            raise FileNotFoundError("there is no such folder")
        return getattr(datasets, name)(str(root), download=False, **choice)
    except Exception as error:
        # RuntimeError for absent or altered files, and whatever unpickling or unpacking raises.
        reason = str(error).split(". ")[0].split("\n")[0]
        what = f"torchvision's {name} cannot be read from {root} ({reason})"
        fix = "put its files there first, nothing is downloaded"
        raise DataError(what, fix, field="data.dir") from error
