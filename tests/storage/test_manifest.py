"""A manifest says what a published folder holds, and leads nowhere else."""

import pytest

from vitdistill.errors import DataError
from vitdistill.storage.atomic import staged_dir, write_new
from vitdistill.storage.manifest import (
    MANIFEST,
    _manifest_bytes,
    check_sizes,
    read_manifest,
    read_verified,
    write_manifest,
)

CONTENTS = {"a": b"old " * 700, "b": bytes(range(100))}


@pytest.fixture
def published(tmp_path):
    with staged_dir(tmp_path / "final") as temp:
        for name, data in CONTENTS.items():
            write_new(temp / name, data)
        write_manifest(temp, CONTENTS, {"kind": "test"})
    return tmp_path / "final"


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"files": []},
        {"files": {"a": 5}},
        {"files": {"a": {"bytes": 1}}},
        {"identity": "a store"},
        {"identity": None},
    ],
)
def test_a_manifest_of_somebody_else_is_refused(tmp_path, change):
    body = {"format": 1, "files": {}, "identity": {}, **change}
    (tmp_path / MANIFEST).write_bytes(_manifest_bytes(body))
    with pytest.raises(DataError, match="damaged, or of another version"):
        read_manifest(tmp_path)


def test_what_is_read_is_what_the_manifest_says(published):
    body = read_manifest(published)
    assert body["identity"] == {"kind": "test"}
    assert {name: read_verified(published, name, body) for name in body["files"]} == CONTENTS
    (published / "other").write_bytes(b"")
    with pytest.raises(DataError):
        read_verified(published, "other", body)
    (published / "a").write_bytes(CONTENTS["a"].swapcase())
    check_sizes(published)  # which does not read
    with pytest.raises(DataError, match="a is missing or damaged"):
        read_verified(published, "a", body)


@pytest.mark.parametrize("content", [CONTENTS["a"][:-1], None])
def test_sizes_are_checked(published, content):
    (published / "a").unlink()
    if content is not None:
        (published / "a").write_bytes(content)
    with pytest.raises(DataError, match="a is missing or damaged"):
        check_sizes(published)
