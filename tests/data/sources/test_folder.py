"""Folders, and tars of them: the order of classes and images, and what is wrong with them."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vitdistill.data.sources.open import open_source
from vitdistill.errors import DataError, MissingSplit, PermissionDenied, UserError

Place = Callable[[Path], str]


def refused(
    location: Path | str, split: str = "train", kind: type[UserError] = DataError, **options: object
) -> str:
    """Return the sentence that refuses a location, on one line."""
    with pytest.raises(kind) as caught:
        open_source(str(location), split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder(make_folder, place: Place) -> None:
    root = make_folder(train=7, val=3)
    for junk in ("class0/._003.png", "class0/notes.txt", ".cache/x.png", "readme.md"):
        (root / "train" / junk).parent.mkdir(exist_ok=True)
        (root / "train" / junk).write_bytes(b"junk")
    (root / "train" / "class2" / "deep" / "deeper").mkdir(parents=True)
    (root / "train/class2/002.png").rename(root / "train/class2/deep/deeper/x.PNG")
    source = open_source(place(root), "train")
    assert source.classes == ("class0", "class1", "class2")
    assert [source.key(i) for i in range(len(source))] == [
        *("class0/000.png", "class0/003.png", "class0/006.png", "class1/001.png"),
        *("class1/004.png", "class2/005.png", "class2/deep/deeper/x.PNG"),
    ]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 2, 2] and source.labels.dtype == np.int64
    paths = [root / "train" / source.key(i) for i in range(7)]
    assert source.sizes.tolist() == [path.stat().st_size for path in paths]
    assert source.load(4).size == source.image_size(4) == (32, 32)
    val = open_source(place(root), "val", classes=source.classes)
    assert len(val) == 3 and "val" in val.name
    again = pickle.loads(pickle.dumps(source))
    assert again.key(3) == source.key(3) and again.load(3).tobytes() == source.load(3).tobytes()
    assert source.fingerprint() == open_source(str(root), "train").fingerprint()


def test_fingerprints_tell_what_changed(make_folder) -> None:
    root = make_folder()
    base = open_source(str(root), "train").fingerprint()
    image = root / "train" / "class1" / "001.png"
    content = image.read_bytes()
    image.write_bytes(content + b"\0")
    assert open_source(str(root), "train").fingerprint() != base
    image.write_bytes(content)
    assert open_source(str(root), "train").fingerprint() == base
    for path in (image, image.parent):
        other = path.rename(path.with_name(f"{path.name}b.png"))
        assert open_source(str(root), "train").fingerprint() != base
        other.rename(path)


def test_classes_are_ordered_as_strings(make_folder, place: Place) -> None:
    root = make_folder(train=12, classes=12)
    for i in range(12):
        (root / "train" / f"class{i}").rename(root / "train" / str(i))
    assert open_source(place(root), "train").classes == tuple(sorted(map(str, range(12))))


def test_unlabelled_images(make_folder, place: Place, tmp_path: Path) -> None:
    flat = make_folder(classes=1) / "train" / "class0"
    source = open_source(place(flat), "train")
    assert source.classes == () and source.key(0) == "000.png"
    assert set(source.labels.tolist()) == {-1}
    (tmp_path / "nest").mkdir()
    flat.rename(tmp_path / "nest" / "train")
    assert len(open_source(place(tmp_path / "nest"), "train")) == 24
    refused(place(tmp_path / "nest"), "val", MissingSplit)
    (tmp_path / "nest" / "train").rename(tmp_path / "nest" / "val")
    assert "labels" in refused(place(tmp_path / "nest"), "val", MissingSplit)


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("nowhere", "empty", "a.zip", "link"):
        assert name in refused(tmp_path / name)
    refused(tmp_path / "empty", val_split=0.5)


def test_what_is_wrong_with_the_images(make_folder, place: Place) -> None:
    root = make_folder()
    folder = root / "train" / "class9\x1b[2J\n"  # which cannot write to the terminal
    folder.mkdir()
    assert "class9\\x1b[2J\\n" in refused(place(root))  # empty
    (folder / "a.txt").write_text("x")
    assert "class9" in refused(place(root))
    image = (folder / "a.txt").rename(folder / "a.jpg")
    assert "class9" in open_source(place(root), "train").classes[-1]  # decoding comes later
    image.unlink()
    image.symlink_to(root / "gone.jpg")
    assert "a.jpg" in refused(place(root))
    image.unlink()
    folder.rmdir()
    (root / "train" / "class0" / "000.png").rename(root / "train" / "stray.png")
    assert "'stray.png'" in refused(place(root))


def test_splits_that_are_not_there(make_folder, place: Place) -> None:
    root = make_folder()
    (root / "val").rename(root / "other")
    assert "'other'" in refused(place(root), "val", MissingSplit)
    (root / "train").rename(root / "val")
    assert "'val'" in refused(place(root), "train", MissingSplit)


NAMES = tuple(f"class{i}" for i in range(4))


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1], ("other", *NAMES[2:], *NAMES[:2])])
@pytest.mark.parametrize("absent", [(), (0,), (3,), (1, 2), (0, 1, 3)])
@pytest.mark.parametrize("empty", [False, True])
def test_some_of_the_classes_in_any_order(
    make_folder, place: Place, order: tuple[str, ...], absent: tuple[int, ...], empty: bool
) -> None:
    root = make_folder(val=8, classes=4)
    for i in absent:
        shutil.rmtree(root / "val" / NAMES[i])
        if empty:
            (root / "val" / NAMES[i]).mkdir()
    source = open_source(place(root), "val", classes=order)
    assert source.classes == order and len(source) == 8 - 2 * len(absent)
    for i, label in enumerate(source.labels.tolist()):
        assert source.key(i).startswith(order[label])
    assert "'class" in refused(place(root), "val", classes=("other",))


def test_folders_that_may_not_be_read(make_folder, monkeypatch) -> None:
    root, scandir = make_folder(), os.scandir

    def refuse(folder: object) -> object:
        if str(folder).endswith("class1"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "class1" in refused(root, kind=PermissionDenied)
