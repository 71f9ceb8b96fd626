"""torchvision's data sets, written here in their own file formats."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, DataError, UserError


def write_mnist(root: Path) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, part in (("train", images[:6]), ("t10k", images[6:])):
        head = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in part.shape)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + part.tobytes())
        labels = (np.arange(len(part)) % 10).astype(np.uint8)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            (0x801).to_bytes(4, "big") + len(part).to_bytes(4, "big") + labels.tobytes()
        )
    return images


def test_grey_images(tmp_path: Path) -> None:
    images = write_mnist(tmp_path)
    source = open_source(f"torchvision/MNIST?root={tmp_path}", "train")
    assert len(source) == 6
    assert source.labels.tolist() == list(range(6))
    assert len(source.classes) == 10
    assert np.array_equal(np.asarray(source.load(3)), np.repeat(images[3][..., None], 3, axis=2))
    assert source.image_size(0) == (28, 28) and source.key(3) == "train/000003"
    assert (
        len(open_source(f"torchvision/MNIST?root={tmp_path}", "val", classes=source.classes)) == 3
    )


def write_cifar(root: Path, monkeypatch) -> np.ndarray:
    """CIFAR-10's pickles with six images, and torchvision told their checksums."""
    images = np.random.default_rng(1).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, content: object) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    train = write("data_batch_1", {"data": images[:4].reshape(4, -1), "labels": [3, 1, 2, 0]})
    test = write("test_batch", {"data": images[4:].reshape(2, -1), "labels": [9, 8]})
    names, digest = write("batches.meta", {"label_names": [f"n{i}" for i in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [train])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [test])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": names, "key": "label_names", "md5": digest}
    )
    return images


def test_colour_images(tmp_path: Path, monkeypatch) -> None:
    images = write_cifar(tmp_path, monkeypatch)
    source = open_source(f"torchvision/CIFAR10?root={tmp_path}", "train")
    assert source.labels.tolist() == [3, 1, 2, 0] and source.classes[3] == "n3"
    assert np.array_equal(np.asarray(source.load(2)), images[2].transpose(1, 2, 0))
    val = open_source(f"torchvision/CIFAR10?root={tmp_path}", "val")
    assert np.array_equal(np.asarray(val.load(1)), images[5].transpose(1, 2, 0))
    assert source.fingerprint() != val.fingerprint()


def test_altered_files_are_not_unpickled(tmp_path: Path, monkeypatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (canary,)

    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="nothing is downloaded"):
        open_source(f"torchvision/CIFAR10?root={tmp_path}", "train")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["CIFAR100", "STL10", "SVHN", "FashionMNIST", "USPS"])
def test_an_absent_data_set_is_one_sentence_and_no_download(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="nothing is downloaded") as caught:
        open_source(f"torchvision/{name}?root={tmp_path}", "train")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("torchvision/CIFAR11?root=x", ConfigError),
        ("torchvision/CIFAR10", ConfigError),
        ("torchvision/CIFAR10?root=x&download=1", ConfigError),
        ("torchvision/CIFAR10?root=not_here", DataError),
    ],
)
def test_locations_without_meaning(location: str, error: type[UserError]) -> None:
    with pytest.raises(error) as caught:
        open_source(location, "train")
    assert caught.value.field == "data.dir"
