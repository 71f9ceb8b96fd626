"""Tar archives: the folder's very source, read in place; damaged and hostile ones are refused."""

import gzip
import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from vitdistill.data.sources import archive as archive_module
from vitdistill.data.sources.open import open_source
from vitdistill.errors import DataError, MissingSplit, UserError


def packed(root: Path, name: str = "set.tar", top: str = "set", mode: str = "w") -> Path:
    path = root.parent / name
    with tarfile.open(path, mode) as archive:
        archive.add(root, top)
    return path


def refused(path: Path, split: str = "train", kind: type[UserError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        open_source(str(path), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("top", ["set", ".", ""])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_is_its_folder(make_folder, tmp_path: Path, top: str, mode: str) -> None:
    root = make_folder(train=7)
    (root / "train" / ".cache").mkdir()
    (root / "train" / ".cache" / "x.png").write_bytes(b"of a tool")
    path = packed(root, "set.tar" if mode == "w" else "set.tar.gz", top, mode)
    before = sorted(os.walk(tmp_path))
    folder, archive = open_source(str(root), "train"), open_source(str(path), "train")
    assert archive.classes == folder.classes and archive.labels.tolist() == folder.labels.tolist()
    assert archive.fingerprint() == folder.fingerprint()
    for i in range(7):
        assert archive.load(i).tobytes() == folder.load(i).tobytes()
        assert archive.image_size(i) == folder.image_size(i)
    assert len(open_source(str(path), "val", classes=folder.classes)) == 6
    again = pickle.loads(pickle.dumps(archive))
    assert again.load(5).tobytes() == folder.load(5).tobytes()
    assert sorted(os.walk(tmp_path)) == before


def test_flat_archives_are_unlabelled(make_folder) -> None:
    path = packed(make_folder(classes=1) / "train" / "class0", top="photos")
    source = open_source(str(path), "train")
    assert source.classes == () and len(source) == 24 and source.key(0) == "000.png"
    refused(path, "val", MissingSplit)


def test_missing_split_and_empty_class(make_folder) -> None:
    root = make_folder()
    (root / "val").rename(root / "other")
    assert "'other'" in refused(packed(root), "val", MissingSplit)
    (root / "train" / "class7").mkdir()
    assert "class7" in refused(packed(root))
    (root / "train" / "class7" / "x.png").write_bytes(b"")
    assert "train/class7/x.png" in refused(packed(root))


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
    os.truncate(path, source._offsets[3] + 40)
    with pytest.raises(DataError, match=r"class0/009\.png"):
        source.load(3)


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
    assert "MiB" in refused(path)


def member(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    info.linkname = "" if kind == tarfile.REGTYPE else "/etc/passwd"
    return info


NAME = "train/a/x.png"
HOSTILE = {
    **{
        name: [member(name)]
        for name in ("/train/a/x.png", "train/../../x.png", "../x.png", "train/a/../x.png")
    },
    **{
        f"special {kind!r}": [member(NAME, b"", kind)]
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members(tmp_path, case):
    path, members = tmp_path / "x.tar", HOSTILE[case]
    word = "twice" if len(members) == 2 else "link" if "special" in case else "unsafe name"
    with tarfile.open(path, "w") as archive:
        for info in members:
            archive.addfile(info, io.BytesIO(b"x" * info.size))
    assert word in refused(path)


@pytest.mark.parametrize("size", [10 * 2**30, 50000])
def test_claimed_sizes(tmp_path, size):
    info = member(NAME)
    info.size = size
    (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(10240))
    refused(tmp_path / "x.tar")
