"""Folders: the order of classes and images, and what is wrong with a folder, in one sentence
each.
"""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from vitdistill.data.source import open_source
from vitdistill.errors import DataError, MissingSplit, PermissionDenied, UserError
from vitdistill.messages import plural


def refused(
    location: Path | str, split: str = "train", kind: type[UserError] = DataError, **options: object
) -> str:
    """The one sentence with which a location is refused."""
    with pytest.raises(kind) as caught:
        open_source(str(location), split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder(make_folder) -> None:
    root = make_folder(train=7, val=3)
    source = open_source(str(root), "train")
    assert source.classes == ("class0", "class1", "class2") and len(source) == 7
    assert [source.key(i) for i in range(7)] == [
        f"class{c}/{n:03d}.png" for c in range(3) for n in range(c, 7, 3)
    ]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 2, 2] and source.labels.dtype == np.int64
    assert source.load(4).size == source.image_size(4) == (32, 32)
    assert source.sizes.tolist() == [
        (root / "train" / source.key(i)).stat().st_size for i in range(7)
    ]
    val = open_source(str(root), "val", classes=source.classes)
    assert len(val) == 3 and "val" in val.name
    again = pickle.loads(pickle.dumps(source))
    assert again.key(3) == source.key(3) and again.load(3).tobytes() == source.load(3).tobytes()


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_names_of_the_validation_split(make_folder, name: str) -> None:
    root = make_folder()
    (root / "val").rename(root / name)
    assert len(open_source(str(root), "val")) == 6


def test_fingerprints_tell_what_changed(make_folder) -> None:
    root = make_folder()
    base = open_source(str(root), "train").fingerprint()
    assert len(base) == 64 and base == open_source(str(root), "train").fingerprint()
    image = root / "train" / "class1" / "001.png"
    content = image.read_bytes()
    image.write_bytes(content + b"\0")
    assert open_source(str(root), "train").fingerprint() != base
    image.write_bytes(content)
    assert open_source(str(root), "train").fingerprint() == base
    image.rename(image.with_name("001b.png"))
    assert open_source(str(root), "train").fingerprint() != base
    image.with_name("001b.png").rename(image)
    (root / "train" / "class1").rename(root / "train" / "class1b")
    assert open_source(str(root), "train").fingerprint() != base


def test_nested_hidden_and_other_files(make_folder) -> None:
    root = make_folder(train=6)
    folder = root / "train" / "class0"
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "000.png").rename(folder / "deep" / "deeper" / "x.PNG")
    (folder / "._003.png").write_bytes(b"junk")
    (folder / "notes.txt").write_text("hello")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "readme.md").write_text("hello")
    source = open_source(str(root), "train")
    assert [source.key(i) for i in range(2)] == ["class0/003.png", "class0/deep/deeper/x.PNG"]
    assert source.load(1).size == (32, 32)


def test_classes_are_ordered_as_strings(make_folder) -> None:
    root = make_folder(train=12, classes=12)
    for i in range(12):
        (root / "train" / f"class{i}").rename(root / "train" / str(i))
    assert open_source(str(root), "train").classes == tuple(sorted(map(str, range(12))))


def test_unlabelled_folders(make_folder, tmp_path: Path) -> None:
    flat = make_folder(classes=1) / "train" / "class0"
    source = open_source(str(flat), "train")
    assert (
        source.classes == () and set(source.labels.tolist()) == {-1} and source.key(0) == "000.png"
    )
    (tmp_path / "nest").mkdir()
    flat.rename(tmp_path / "nest" / "train")
    assert len(open_source(str(tmp_path / "nest"), "train")) == 24
    assert "no 'val' or 'validation' or 'test' folder" in refused(
        tmp_path / "nest", "val", MissingSplit
    )
    (tmp_path / "nest" / "train").rename(tmp_path / "nest" / "val")
    assert "labels" in refused(tmp_path / "nest", "val", MissingSplit)


def test_what_is_wrong_with_a_place(make_folder, tmp_path: Path) -> None:
    assert "there is no folder or file" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "found nothing" in refused(tmp_path / "empty")
    (tmp_path / "a.zip").write_bytes(b"PK")
    assert "neither a folder" in refused(tmp_path / "a.zip")
    root = make_folder()
    (root / "train").rename(root / "training_images")
    sentence = refused(root)
    assert (
        "no 'train' folder" in sentence and "'training_images'" in sentence and "'val'" in sentence
    )
    (root / "train").mkdir()
    assert "no images" in refused(root)


def test_a_place_without_splits_is_right_once_its_advice_is_followed(
    make_folder, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    (make_folder() / "train").rename(photos)
    remedy = (
        f"put the class folders into {photos}/train/ and about a tenth of the images of each class"
        f" into {photos}/val/CLASS/."
    )
    assert (
        refused(photos)
        == f"{photos} has no 'train' folder; found 'class0', 'class1', 'class2': {remedy}"
    )
    for folder in sorted(photos.iterdir()):
        (photos / "train").mkdir(exist_ok=True)
        folder.rename(photos / "train" / folder.name)
    assert len(open_source(str(photos), "train")) == 24
    remedy = "put a part of the images, a tenth say, into class folders there."
    assert (
        refused(photos, "val")
        == f"{photos} has no 'val' or 'validation' or 'test' folder; found 'train': {remedy}"
    )
    for folder in sorted((photos / "train").iterdir()):
        (photos / "val" / folder.name).mkdir(parents=True)
        first = sorted(folder.iterdir())[0]
        first.rename(photos / "val" / folder.name / first.name)
    assert len(open_source(str(photos), "val")) == 3
    (photos / "train").rename(tmp_path / "class_folders")
    assert refused(photos).endswith(f"found 'val': put the class folders into {photos}/train/.")


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1000, "1,000 images")]
)
def test_numbers_of_things(number: int, text: str) -> None:
    assert plural(number, "image") == text


def test_what_is_wrong_with_the_images(make_folder) -> None:
    root = make_folder()
    (root / "train" / "class9").mkdir()
    assert "class folder" in refused(root) and "class9" in refused(root)
    (root / "train" / "class9" / "a.txt").write_text("x")
    assert "class9" in refused(root)
    (root / "train" / "class9" / "a.txt").rename(root / "train" / "class9" / "a.jpg")
    assert open_source(str(root), "train").classes[-1] == "class9"
    (root / "train" / "class9" / "a.jpg").write_bytes(b"")
    assert "class9/a.jpg: the image file is empty" in refused(root)
    (root / "train" / "class9" / "a.jpg").unlink()
    (root / "train" / "class9" / "a.jpg").symlink_to(root / "gone.jpg")
    assert "broken link" in refused(root)
    (root / "train" / "class9" / "a.jpg").unlink()
    (root / "train" / "class9").rmdir()
    (root / "train" / "class0" / "000.png").rename(root / "train" / "stray.png")
    assert "'stray.png'" in refused(root)


def test_classes_that_differ(make_folder) -> None:
    root = make_folder()
    assert "lacks 2 ('zebra', 'zoo') and adds 1 ('class1')" in refused(
        root, "val", classes=("class0", "class2", "zebra", "zoo")
    )
    assert "lacks 5 ('a', 'b', 'c', ...)" in refused(
        root, "val", classes=("class0", "class1", "class2", *"abcde")
    )
    assert "another order: label 0 is 'class0', not 'class1'" in refused(
        root, "val", classes=("class1", "class0", "class2")
    )


def test_names_cannot_write_to_the_terminal(make_folder) -> None:
    root = make_folder()
    (root / "train" / "evil\x1b[2J\n").mkdir()
    sentence = refused(root)
    assert "\x1b" not in sentence and "\\x1b[2J\\n" in sentence


def test_folders_that_may_not_be_read(make_folder, monkeypatch) -> None:
    root = make_folder()
    scandir = os.scandir

    def refuse(folder: object) -> object:
        if str(folder).endswith("class1"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "class1" in refused(root, kind=PermissionDenied)
