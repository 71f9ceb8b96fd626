"""What is found where people keep images: names of splits, other files, and what goes wrong."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, DataError, MissingSplit, Set

Place = Callable[[Path], str]


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("train", "val"), "val"),
        (("train", "valid"), "valid"),
        (("training", "validation", "test"), "validation"),
        (("Train", "Dev", "Test"), "Dev"),
        (("train", "eval", "test"), "eval"),
        (("TRAIN", "test"), "test"),
        (("train", "testing"), "testing"),
        (("train", "test", "val", "valid"), "val"),
    ],
)
def test_names_of_splits(make_folder, place: Place, names: tuple[str, ...], taken: str) -> None:
    root = make_folder(train=6, val=6)
    for name in names[1:]:
        shutil.copytree(root / "val", root / f"{name}_")
    shutil.rmtree(root / "val")
    (root / "train").rename(root / f"{names[0]}_")
    for name in names:
        (root / f"{name}_").rename(root / name)
    train, val = open_source(place(root), "train"), open_source(place(root), "val")
    assert (len(train), len(val)) == (6, 6) and val.name.endswith(taken)
    if taken == "val":
        assert not val.notes
    else:
        (note,) = val.notes
        assert repr(taken) in note and ("best weights" in note) == (taken in ("test", "testing"))


OTHERS = [
    ([f"{i}.HEIC" for i in range(30)], "30 files left out", "30 .heic"),
    (["notes.txt", "a.json", "b.json"], "3 files left out", "2 .json"),
    (["README", "LICENSE"], "2 files left out", "2 without a suffix"),
    (["x.webm", "y.mp4", "z.psd", "u.svg", "v.cr2"], "5 files left out", "1 ."),
    ([".DS_Store", "._x.png", "__MACOSX/x.png", ".thumbs/a/b.png"], "", ""),
]


@pytest.mark.parametrize(("names", "said", "kind"), OTHERS)
def test_other_files_are_counted(make_folder, place: Place, names, said: str, kind: str) -> None:
    root = make_folder(train=6)
    for name in names:
        path = root / "train" / "class1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of another kind")
    source = open_source(place(root), "train")
    assert len(source) == 6
    assert all(said in note and kind in note for note in source.notes)
    assert len(source.notes) == (1 if said else 0)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp", "tif", "ppm"])
def test_images_without_a_suffix(picture, place: Place, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "set"
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
        picture(3, (20, 16)).save(root / "train" / name / f"0.{kind}")
        (root / "train" / name / f"0.{kind}").rename(root / "train" / name / "n01440764_18")
    source = open_source(place(root), "train")
    assert source.classes == ("a", "b") and source.load(1).size == (20, 16) and not source.notes


def test_a_class_of_other_files_says_which(make_folder, place: Place) -> None:
    root = make_folder()
    for path in (root / "train" / "class1").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"class1 has no images.*8 \.heic"):
        open_source(place(root), "train")


HIDDEN = [
    *(".ipynb_checkpoints", ".cache", "__MACOSX", "@eaDir", "$RECYCLE.BIN", ".Trash-1000"),
    "System Volume Information",
]


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("where", ["", "train", "train/class0", "train/class0/deep"])
def test_folders_of_tools_and_systems(make_folder, place: Place, name: str, where: str) -> None:
    root = make_folder(train=6)
    base = open_source(str(root), "train").fingerprint()
    (root / where / name / "class0").mkdir(parents=True)
    for path in (root / where / name / "x.png", root / where / name / "class0" / "y.png"):
        path.write_bytes(b"a thumbnail")
    found = open_source(place(root), "train")
    assert found.fingerprint() == base and not found.notes


def test_class_folders_alone_are_training_images(make_folder, place: Place) -> None:
    root = make_folder(train=6)
    photos = (root / "train").rename(root.parent / "photos")
    source = open_source(place(photos), "train")
    assert source.classes == ("class0", "class1", "class2") and len(source) == 6
    with pytest.raises(MissingSplit) as caught:
        open_source(place(photos), "val")
    assert Set("data.val_split", 0.1) in caught.value.fixes


def test_the_training_folder_itself(make_folder) -> None:
    root = make_folder(train=6)
    assert len(open_source(str(root / "train"), "train")) == 6
    with pytest.raises(MissingSplit) as caught:
        open_source(str(root / "train"), "val")
    assert caught.value.fixes == (Set("data.dir", str(root)),)


def test_several_sets_in_one_folder(make_folder, place: Place) -> None:
    root = make_folder(name="all/one")
    make_folder(name="all/two")
    with pytest.raises(DataError, match="several sets of images, one in 'one'"):
        open_source(place(root.parent), "train")


@pytest.mark.parametrize("name", ["photos.zip", "a.7z", "b.tar.xz", "c.rar"])
def test_packed_images_are_to_be_unpacked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(DataError, match=r"unpack") as caught:
        open_source(str(tmp_path / name), "train")
    assert caught.value.field == "data.dir"


def test_a_folder_of_shards_says_what_is_there(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"shard-{i}.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"no images.*3 \.tar"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize("links", [["a/self -> a"], ["a/up -> ."], ["a/b -> b", "b/a -> a"]])
def test_link_loops(make_folder, links: list[str]) -> None:
    root = make_folder() / "train"
    for name in ("a", "b"):
        shutil.copytree(root / "class0", root / name)
    for link in links:
        path, target = link.split(" -> ")
        (root / path).symlink_to(root / target, target_is_directory=True)
    with pytest.raises(DataError, match="link to a folder around it"):
        open_source(str(root.parent), "train")


def test_links_to_folders_elsewhere_are_followed(make_folder, tmp_path: Path) -> None:
    root = make_folder(train=6)
    moved = (root / "train" / "class1").rename(tmp_path / "elsewhere")
    (root / "train" / "class1").symlink_to(moved, target_is_directory=True)
    assert len(open_source(str(root), "train")) == 6


def test_what_is_no_regular_file(make_folder) -> None:
    root = make_folder()
    os.mkfifo(root / "train" / "class0" / "x.png")
    with pytest.raises(DataError, match="no regular file"):
        open_source(str(root), "train")


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.99])
def test_a_part_of_the_training_images_validates(make_folder, place: Place, fraction) -> None:
    root = make_folder(train=61, val=1)
    shutil.rmtree(root / "val")
    whole = open_source(place(root), "train")
    train, val = (open_source(place(root), s, val_split=fraction) for s in ("train", "val"))
    keys = [{source.key(i) for i in range(len(source))} for source in (train, val, whole)]
    assert not keys[0] & keys[1] and keys[0] | keys[1] == keys[2]
    assert train.classes == val.classes == whole.classes
    sizes = np.bincount(whole.labels)
    wanted = np.clip(np.rint(fraction * sizes), 1, sizes - 1)
    assert np.bincount(val.labels).tolist() == wanted.tolist()


def test_a_split_beside_validation_images_is_refused(make_folder, place: Place) -> None:
    with pytest.raises(ConfigError) as caught:
        open_source(place(make_folder()), "train", val_split=0.1)
    assert caught.value.field == "data.val_split"


def test_unlabelled_images_cannot_be_split_by_class(make_folder) -> None:
    flat = make_folder(classes=1) / "train" / "class0"
    with pytest.raises(MissingSplit):
        open_source(str(flat), "val", val_split=0.1)
