"""Folders: the order of classes and images, and what is wrong with a folder."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from vitdistill.data.sources.open import open_source
from vitdistill.errors import DataError, MissingSplit, PermissionDenied, UserError


def refused(
    location: Path | str, split: str = "train", kind: type[UserError] = DataError, **options: object
) -> str:
    """Return the sentence that refuses a location, on one line."""
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
    image = root / "train" / "class1" / "001.png"
    content = image.read_bytes()
    image.write_bytes(content + b"\0")
    assert open_source(str(root), "train").fingerprint() != base
    image.write_bytes(content)
    assert open_source(str(root), "train").fingerprint() == base
    for path in (image, image.parent):
        path.rename(path.with_name(f"{path.name}b.png"))
        assert open_source(str(root), "train").fingerprint() != base
        path.with_name(f"{path.name}b.png").rename(path)


def test_nested_hidden_and_other_files(make_folder) -> None:
    root = make_folder(train=6)
    folder = root / "train" / "class0"
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "000.png").rename(folder / "deep" / "deeper" / "x.PNG")
    (folder / "._003.png").write_bytes(b"junk")
    (folder / "notes.txt").write_text("hello")
    (root / "train" / ".cache").mkdir()
    (root / "train" / ".cache" / "thumbnail.png").write_bytes(b"junk")
    (root / "train" / "readme.md").write_text("hello")
    source = open_source(str(root), "train")
    assert [source.key(i) for i in range(2)] == ["class0/003.png", "class0/deep/deeper/x.PNG"]
    assert source.classes == ("class0", "class1", "class2")


def test_classes_are_ordered_as_strings(make_folder) -> None:
    root = make_folder(train=12, classes=12)
    for i in range(12):
        (root / "train" / f"class{i}").rename(root / "train" / str(i))
    assert open_source(str(root), "train").classes == tuple(sorted(map(str, range(12))))


def test_unlabelled_folders(make_folder, tmp_path: Path) -> None:
    flat = make_folder(classes=1) / "train" / "class0"
    source = open_source(str(flat), "train")
    assert source.classes == () and source.key(0) == "000.png"
    assert set(source.labels.tolist()) == {-1}
    (tmp_path / "nest").mkdir()
    flat.rename(tmp_path / "nest" / "train")
    assert len(open_source(str(tmp_path / "nest"), "train")) == 24
    refused(tmp_path / "nest", "val", MissingSplit)
    (tmp_path / "nest" / "train").rename(tmp_path / "nest" / "val")
    assert "labels" in refused(tmp_path / "nest", "val", MissingSplit)


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("nowhere", "empty", "a.zip", "link"):
        assert name in refused(tmp_path / name)


def test_class_folders_without_splits_are_told_where_to_go(make_folder, tmp_path):
    photos = tmp_path / "photos"
    (make_folder() / "train").rename(photos)
    assert f"{photos}/train/" in refused(photos, kind=MissingSplit)


def test_what_is_wrong_with_the_images(make_folder) -> None:
    root = make_folder()
    folder = root / "train" / "class9"
    folder.mkdir()
    assert "class9" in refused(root)  # empty
    (folder / "a.txt").write_text("x")
    assert "class9" in refused(root)
    (folder / "a.txt").rename(folder / "a.jpg")
    assert open_source(str(root), "train").classes[-1] == "class9"  # decoding comes later
    (folder / "a.jpg").write_bytes(b"")
    assert "class9/a.jpg" in refused(root)
    (folder / "a.jpg").unlink()
    (folder / "a.jpg").symlink_to(root / "gone.jpg")
    assert "class9/a.jpg" in refused(root)
    (folder / "a.jpg").unlink()
    folder.rmdir()
    (root / "train" / "class0" / "000.png").rename(root / "train" / "stray.png")
    assert "'stray.png'" in refused(root)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("class0", "class2", "zebra", "zoo"), "lacks 2 ('zebra', 'zoo') and adds 1 ('class1')"),
        (("class1", "class0", "class2"), "another order"),
    ],
)
def test_classes_that_differ(make_folder, classes: tuple[str, ...], words: str) -> None:
    assert words in refused(make_folder(), "val", classes=classes)


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
