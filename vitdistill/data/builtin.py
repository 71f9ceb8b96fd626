"""torchvision's own data sets that keep their images as arrays, read from disk and never
downloaded.
"""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image
from torchvision import datasets

from ..errors import ConfigError, DataError
from ..messages import printable
from .source import ImageSource, Split

_BY_FLAG = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS")
_BY_NAME = ("STL10", "SVHN")
BUILTINS = _BY_FLAG + _BY_NAME
"""The names that `TorchvisionSource` knows."""

_DIGITS = tuple("0123456789")


class TorchvisionSource(ImageSource):
    """``NAME?root=FOLDER``: a data set of torchvision; ``val`` is its test split."""

    def __init__(self, location: str, split: Split) -> None:
        """Raises `ConfigError` for a location without meaning, `DataError` for a data set that is
        not on disk.
        """
        dataset_name, _, query = location.partition("?")
        options = dict(parse_qsl(query))
        if dataset_name not in BUILTINS:
            raise ConfigError(
                f"torchvision/{printable(dataset_name)} is not supported; use"
                f" {', '.join(BUILTINS)}, or a folder."
            )
        if set(options) != {"root"}:
            raise ConfigError(
                f"torchvision/{dataset_name} needs its folder, and only that:"
                f" torchvision/{dataset_name}?root=FOLDER."
            )
        root = Path(options["root"]).expanduser()
        self.name = f"torchvision/{dataset_name}?root={printable(str(root))} ({split})"
        dataset = self._read(dataset_name, root, split)
        self._images = _channels_last(np.asarray(dataset.data))
        labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = tuple(getattr(dataset, "classes", _DIGITS))
        self.sizes = np.full(len(self.labels), self._images[0].nbytes, dtype=np.int64)
        self._split = split

    def key(self, i: int) -> str:
        """The split and the image's number."""
        return f"{self._split}/{i:06d}"

    def load(self, i: int) -> Image.Image:
        """Image ``i``."""
        return Image.fromarray(self._images[i]).convert("RGB")

    def image_size(self, i: int) -> tuple[int, int]:
        """(width, height), the same for all images."""
        return self._images.shape[2], self._images.shape[1]

    def _read(self, dataset_name: str, root: Path, split: Split) -> Any:
        if not root.is_dir():
            raise DataError(
                f"there is no folder {printable(str(root))!r} for torchvision/{dataset_name}; check"
                " root."
            )
        make = getattr(datasets, dataset_name)
        try:
            if dataset_name in _BY_FLAG:
                return make(str(root), train=split == "train", download=False)
            return make(str(root), split="train" if split == "train" else "test", download=False)
        except Exception as error:
            # RuntimeError for absent or altered files, and whatever unpickling or unpacking raises
            # for damaged ones.
            reason = printable(str(error).split(". ")[0].split("\n")[0])
            raise DataError(
                f"torchvision's {dataset_name} cannot be read from {printable(str(root))}"
                f" ({reason}); it is never downloaded here, so put its files there first."
            ) from error


def _channels_last(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W) or (N, H, W, 3); some of torchvision's sets have the channels first."""
    if images.ndim == 4 and images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images)
