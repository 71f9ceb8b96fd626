"""torchvision's data sets, written here in their own file formats."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, DataError, UserError


def test_grey_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, part in (("train", images[:6]), ("t10k", images[6:])):
        sizes = b"".join(n.to_bytes(4, "big") for n in (0x803, *part.shape))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(sizes + part.tobytes())
        sizes = b"".join(n.to_bytes(4, "big") for n in (0x801, len(part)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(sizes + bytes(range(len(part))))
    location = f"torchvision/MNIST?root={tmp_path}"
    source = open_source(location, "train")
    assert source.labels.tolist() == list(range(6)) and len(source.classes) == 10
    assert np.array_equal(np.asarray(source.load(3)), np.repeat(images[3][..., None], 3, axis=2))
    assert source.image_size(0) == (28, 28) and source.key(3) == "train/000003"
    assert len(open_source(location, "val", classes=source.classes)) == 3


def test_colour_images(tmp_path: Path, monkeypatch) -> None:
    """CIFAR-10's pickles with six images, and torchvision told their checksums."""
    images = np.random.default_rng(1).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: object) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    train = write("data_batch_1", {"data": images[:4].reshape(4, -1), "labels": [3, 1, 2, 0]})
    test = write("test_batch", {"data": images[4:].reshape(2, -1), "labels": [9, 8]})
    names, digest = write("batches.meta", {"label_names": [f"n{i}" for i in range(10)]})
    meta = {"filename": names, "key": "label_names", "md5": digest}
    for name, value in {"train_list": [train], "test_list": [test], "meta": meta}.items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    source = open_source(f"torchvision/CIFAR10?root={tmp_path}", "train")
    assert source.labels.tolist() == [3, 1, 2, 0] and source.classes[3] == "n3"
    assert np.array_equal(np.asarray(source.load(2)), images[2].transpose(1, 2, 0))
    val = open_source(f"torchvision/CIFAR10?root={tmp_path}", "val")
    assert np.array_equal(np.asarray(val.load(1)), images[5].transpose(1, 2, 0))
    assert source.fingerprint() != val.fingerprint()


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
