"""Tar archives: the folder's very source, read in place; damaged and hostile archives are
refused.
"""

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vitdistill.data import archive as archive_module
from vitdistill.data.augment import AUGMENTS, InputSpec
from vitdistill.data.loader import TrainLoader
from vitdistill.data.source import open_source
from vitdistill.errors import DataError

SPEC = InputSpec((32, 32), (0.5,) * 3, (0.5,) * 3)


def packed(root: Path, name: str = "set.tar", top: str = "set", mode: str = "w") -> Path:
    path = root.parent / name
    with tarfile.open(path, mode) as archive:
        archive.add(root, top)
    return path


def refused(path: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        open_source(str(path), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("top", ["set", ".", ""])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_is_its_folder(make_folder, top: str, mode: str) -> None:
    root = make_folder(train=7)
    path = packed(root, "set.tar" if mode == "w" else "set.tar.gz", top, mode)
    folder, archive = open_source(str(root), "train"), open_source(str(path), "train")
    assert archive.classes == folder.classes and archive.labels.tolist() == folder.labels.tolist()
    assert archive.fingerprint() == folder.fingerprint()
    for i in range(7):
        assert archive.load(i).tobytes() == folder.load(i).tobytes()
        assert archive.image_size(i) == folder.image_size(i)
    assert len(open_source(str(path), "val", classes=folder.classes)) == 6
    again = pickle.loads(pickle.dumps(archive))
    assert again.load(5).tobytes() == folder.load(5).tobytes()


def test_workers_read_one_archive_together(make_folder) -> None:
    source = open_source(str(packed(make_folder())), "train")
    runs = [
        list(
            TrainLoader(
                source, AUGMENTS["small"], SPEC, batch_size=8, seed=0, workers=w, in_memory=False
            ).batches(0, 3)
        )
        for w in (0, 2)
    ]
    assert all((a.images == b.images).all() for (a,), (b,) in zip(*runs, strict=True))


def test_flat_archives_are_unlabelled(make_folder) -> None:
    root = make_folder(classes=1)
    path = packed(root / "train" / "class0", top="photos")
    source = open_source(str(path), "train")
    assert source.classes == () and len(source) == 24 and source.key(0) == "000.png"
    assert "found nothing" in refused(path, "val")


def test_missing_split_and_empty_class(make_folder) -> None:
    root = make_folder()
    (root / "val").rename(root / "other")
    assert "'other'" in refused(packed(root), "val")
    (root / "train" / "class7").mkdir()
    assert "'class7'" in refused(packed(root))
    (root / "train" / "class7" / "x.png").write_bytes(b"")
    assert "train/class7/x.png: the image file is empty" in refused(packed(root))


def test_cut_short_archives(make_folder) -> None:
    path = packed(make_folder(train=4, val=2))
    content = path.read_bytes()
    # Cuts at every block, and in the middle of blocks: never a smaller data set without a word.
    for length in [*range(0, len(content) - 10240, 1024), 700, 5000]:
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(b"no archive at all" * 100)
    assert "not a readable tar archive" in refused(path)


def test_damaged_gzip(make_folder, monkeypatch) -> None:
    path = packed(make_folder(), "set.tar.gz", mode="w:gz")
    content = path.read_bytes()
    for damaged in (
        content[: len(content) // 2],
        content[:-4],
        content[:5000] + b"\0" * 50 + content[5050:],
    ):
        path.write_bytes(damaged)
        assert "damaged or cut short" in refused(path)
    monkeypatch.setattr(archive_module, "_MAX_MEMBER", 2**20)
    path.write_bytes(gzip.compress(bytes(2**25)))
    assert "grows to more than" in refused(path)


def hostile(path: Path, name: str, change=lambda info: None, content: bytes = b"x") -> Path:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        change(info)
        archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "name", ["/train/a/x.png", "train/../../x.png", "../x.png", "train/a/../x.png"]
)
def test_unsafe_names(tmp_path: Path, name: str) -> None:
    assert "unsafe name" in refused(hostile(tmp_path / "x.tar", name))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_special_members(tmp_path: Path, kind: bytes) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    assert "not a regular file" in refused(hostile(tmp_path / "x.tar", "train/a/x.png", change))


def test_repeated_names(tmp_path: Path, picture) -> None:
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("train/a/x.png", "./train/a/x.png"):
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            archive.addfile(info, io.BytesIO(buffer.getvalue()))
    assert "twice" in refused(tmp_path / "x.tar")


def test_claimed_sizes(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("train/a/x.png")
    info.size = 10 * 2**30
    path.write_bytes(info.tobuf() + bytes(10240))
    assert "too large" in refused(path)
    info.size = 50000
    path.write_bytes(info.tobuf() + bytes(10240))
    assert refused(path)


def test_nothing_is_written(make_folder, tmp_path: Path) -> None:
    path = packed(make_folder())
    before = sorted(os.walk(tmp_path))
    source = open_source(str(path), "train")
    assert np.asarray(source.load(0)).shape == (32, 32, 3)
    assert sorted(os.walk(tmp_path)) == before
