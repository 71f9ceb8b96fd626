"""Labelled and unlabelled images as one source: whose they are stays known."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vitdistill.data.decoded import check_images
from vitdistill.data.sources.base import PartSource
from vitdistill.data.sources.joined import find_copies, join
from vitdistill.data.sources.open import open_source
from vitdistill.errors import DataError

Place = Callable[[Path], str]


def test_images_and_labels_stay_together(make_folder, place: Place) -> None:
    labelled = open_source(place(make_folder(name="few", train=7)), "train")
    others = open_source(place(make_folder(name="many", train=30)), "train")
    new = [i for i in range(30) if int(Path(others.key(i)).stem) >= 7]  # the rest is equal in both
    others = PartSource(others, np.array(new))
    both = join(labelled, others, None)
    assert both.classes == labelled.classes and len(both) == 30
    assert both.labels.tolist() == [*labelled.labels.tolist(), *[-1] * 23]
    for i in range(30):
        source, number = (labelled, i) if i < 7 else (others, i - 7)
        assert both.load(i).tobytes() == source.load(number).tobytes()
        assert both.image_size(i) == source.image_size(number) == (32, 32)
        assert both.sizes[i] == source.sizes[number] and both.digest(i) == source.digest(number)
    assert len({both.key(i) for i in range(30)}) == 30
    prints = {source.fingerprint() for source in (labelled, others, both)}
    assert len(prints) == 3
    assert check_images(both, True, 0) is both


def test_copies_are_found_wherever_they_lie(
    make_folder, picture, place: Place, tmp_path: Path
) -> None:
    root = make_folder(train=12, val=6)
    picture(99).save(root / "val/class2/005.png")
    more = tmp_path / "more"
    more.mkdir()
    copied = [("train/class0/003.png", "003.png"), ("val/class2/005.png", "005.png")]
    for name, new in copied:
        shutil.copy(root / name, more / new)
    shutil.copy(root / "train/class1/004.png", more / "another name.png")
    content = bytearray((root / "train/class1/007.png").read_bytes())
    content[-20] ^= 1
    (more / "007.png").write_bytes(content)  # of one name and size
    shutil.copy(root / "train/class0/009.png", more / "006.png")  # whose name is another's
    train, val = open_source(place(root), "train"), open_source(place(root), "val")
    others = open_source(str(more), "train")
    found = [others.key(i) for i in find_copies(others, train).tolist()]
    assert found == ["003.png", "006.png", "another name.png"]
    both = join(train, others, val)
    assert len(both) == 12 + 1
    assert any("4 of 5 images" in note and "left out" in note for note in both.notes)
    with pytest.raises(DataError, match="leaves none") as caught:
        join(train, train, val)
    assert caught.value.field == "data.unlabelled"
