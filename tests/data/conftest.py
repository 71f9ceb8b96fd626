"""Tiny images, and folders of them, for the data tests."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

MakeFolder = Callable[..., Path]
Picture = Callable[..., Image.Image]


def _picture(number: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A smooth, coloured, numbered image of ``size`` (width, height)."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(number).integers(0, 60, (height, width, 3))
    waves = np.stack([np.sin(x / 5 + number), np.cos(y / 7 - number), np.sin((x + y) / 9)], axis=2)
    return Image.fromarray((waves * 90 + 100 + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def picture() -> Picture:
    """``picture(number, (width, height))``."""
    return _picture


@pytest.fixture(scope="session")
def stack() -> Callable[[list[Image.Image]], Tensor]:
    """Images of one size as a uint8 (N, 3, H, W) tensor."""
    return lambda images: torch.stack(
        [torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]
    )


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write ``root/{train,val}/<class>/NN.png``."""

    def make(
        train: int = 24,
        val: int = 6,
        classes: int = 3,
        sizes: tuple[tuple[int, int], ...] = ((32, 32),),
        name: str = "set",
    ) -> Path:
        root = tmp_path / name
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                folder = root / split / f"class{i % classes}"
                folder.mkdir(parents=True, exist_ok=True)
                _picture(i, sizes[i % len(sizes)]).save(folder / f"{i:03d}.png")
        return root

    return make


@pytest.fixture(params=["folder", "tar"])
def place(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """``place(root)``: a location that holds what the folder holds."""

    def packed(root: Path) -> str:
        path = root.parent / f"{root.name}.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(root, root.name)
        return str(path)

    return str if request.param == "folder" else packed
