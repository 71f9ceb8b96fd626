"""torchvision's data sets: their arrays are taken as they are, and nothing is downloaded."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torchvision import datasets

from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, DataError, UserError

GREY = np.random.default_rng(0).integers(0, 256, (6, 28, 20), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 28, 20, 3), dtype=np.uint8)
SETS = {
    "MNIST": ({"data": GREY, "targets": [3, 1, 2, 0, 1, 9]}, tuple("0123456789")),
    "CIFAR10": ({"data": COLOUR, "targets": [3, 1, 2, 0, 1, 9], "classes": [*"abcdefghij"]}, None),
    "STL10": ({"data": COLOUR.transpose(0, 3, 1, 2), "labels": [3, 1, 2, 0, 1, 9]}, None),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_arrays_are_images(tmp_path: Path, monkeypatch, name: str, split: str) -> None:
    content, classes = SETS[name]
    asked: list[object] = []

    def read(root: str, download: bool, **choice: object) -> SimpleNamespace:
        asked.extend((root, download, *choice.values()))
        return SimpleNamespace(**content)

    monkeypatch.setattr(datasets, name, read)
    source = open_source(f"torchvision/{name}?root={tmp_path}", split)
    by_name = "train" if split == "train" else "test"
    assert asked == [str(tmp_path), False, by_name if name == "STL10" else split == "train"]
    assert source.labels.tolist() == [3, 1, 2, 0, 1, 9] and len(source.classes) == 10
    assert source.classes == (classes or source.classes) and source.key(3) == f"{split}/000003"
    images = np.repeat(GREY[..., None], 3, axis=3) if name == "MNIST" else COLOUR
    assert np.array_equal(np.asarray(source.load(2)), images[2])
    assert source.image_size(0) == (20, 28)
    assert ["best weights" in note for note in source.notes] == [True] * (split == "val")


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("torchvision/CIFAR11?root=x", ConfigError),
        ("torchvision/CIFAR10", ConfigError),
        ("torchvision/CIFAR10?root=x&download=1", ConfigError),
        ("torchvision/CIFAR10?root=not_here", DataError),
        *((f"torchvision/{name}?root=.", DataError) for name in ("CIFAR100", "STL10", "SVHN")),
    ],
)
def test_absent_data_is_one_sentence_and_no_download(
    tmp_path, monkeypatch, location: str, error: type[UserError]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        open_source(location, "train")
    assert caught.value.field == "data.dir" and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
