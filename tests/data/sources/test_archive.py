"""Tar archives are read in place; damaged and hostile ones are refused."""

import os
import tarfile
from pathlib import Path

import pytest

from vitdistill.data.sources.open import open_source
from vitdistill.errors import DataError


def packed(root: Path, name: str = "set.tar", top: str = "set", mode: str = "w") -> Path:
    path = root.parent / name
    with tarfile.open(path, mode) as archive:
        archive.add(root, top)
    return path


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_source(str(path), "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("top", ["set", ".", ""])
@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.TGZ"])
def test_an_archive_is_its_folder(make_folder, tmp_path: Path, top: str, name: str) -> None:
    root = make_folder(train=7)
    path = packed(root, name, top, "w" if name == "set.tar" else "w:gz")
    before = sorted(os.walk(tmp_path))
    folder, archive = open_source(str(root), "train"), open_source(str(path), "train")
    assert archive.fingerprint() == folder.fingerprint()
    for i in range(7):
        assert archive.load(i).tobytes() == folder.load(i).tobytes()
    assert sorted(os.walk(tmp_path)) == before


def test_cut_short_archives(make_folder) -> None:
    path = packed(make_folder(train=4, val=2))
    content = path.read_bytes()
    # Cuts at every block, and in the middle of blocks: never a smaller data set without a word.
    for length in [*range(0, len(content) - 10240, 1024), 700, 5000]:
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(b"no archive at all" * 100)
    refused(path)


def test_an_archive_that_is_cut_while_it_is_open(make_folder) -> None:
    path = packed(make_folder())
    source = open_source(str(path), "train")
    os.truncate(path, source._members[source.key(3)][0] + 40)
    with pytest.raises(DataError, match=r"class0/009\.png"):
        source.load(3)


def test_damaged_gzip(make_folder) -> None:
    path = packed(make_folder(), "set.tar.gz", mode="w:gz")
    content = path.read_bytes()
    flipped = content[:5000] + b"\0" * 50 + content[5050:]
    for damaged in (content[: len(content) // 2], content[:-4], flipped):
        path.write_bytes(damaged)
        assert "is damaged" in refused(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_images_that_are_no_files(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("train/a/x.png")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(info)
    assert "link" in refused(tmp_path / "x.tar")


@pytest.mark.parametrize("size", [10 * 2**30, 50000])
def test_claimed_sizes(tmp_path: Path, size: int) -> None:
    info = tarfile.TarInfo("train/a/x.png")
    info.size = size
    (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(10240))
    refused(tmp_path / "x.tar")
