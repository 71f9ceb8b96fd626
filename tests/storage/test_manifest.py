"""Every changed bit of a published folder is found."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitdistill.errors import DataError
from vitdistill.storage.atomic import staged_dir, write_new
from vitdistill.storage.manifest import (
    MANIFEST,
    _manifest_bytes,
    check_sizes,
    read_verified,
    verify_dir,
    write_manifest,
)

CONTENTS = {"a": b"old " * 700, "b": bytes(range(100))}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    final = tmp_path_factory.mktemp("published") / "final"
    with staged_dir(final) as temp:
        for name, data in CONTENTS.items():
            write_new(temp / name, data)
        write_manifest(temp, CONTENTS, {"kind": "test"})
    return final


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["a", "b", MANIFEST]),
    position=st.integers(0, 10**6),
    bit=st.integers(0, 7),
)
def test_every_flipped_bit_is_found(published, name, position, bit):
    path = published / name
    good = path.read_bytes()
    bad = bytearray(good)
    bad[position % len(good)] ^= 1 << bit
    path.write_bytes(bad)
    try:
        with pytest.raises(DataError, match=name):
            verify_dir(published)
    finally:
        path.write_bytes(good)
    assert verify_dir(published)["identity"] == {"kind": "test"}


def test_manifest_names_are_plain(tmp_path):
    body = {"format": 1, "files": {"../x": {"bytes": 1, "sha256": "0"}}, "identity": {}}
    (tmp_path / MANIFEST).write_bytes(_manifest_bytes(body))
    with pytest.raises(DataError, match="no plain file name"):
        verify_dir(tmp_path)
    (tmp_path / MANIFEST).write_bytes(_manifest_bytes({**body, "format": 2}))
    with pytest.raises(DataError, match="format 2"):
        verify_dir(tmp_path)


def test_only_what_the_manifest_names_is_read(published):
    body = verify_dir(published)
    assert {name: read_verified(published, name, body) for name in body["files"]} == CONTENTS
    (published.parent / "other").write_bytes(b"")
    with pytest.raises(DataError):
        read_verified(published.parent, "other", body)


@pytest.mark.parametrize("change", ["cut", "missing"])
def test_sizes_are_checked_without_reading(published, change):
    path = published / "a"
    if change == "cut":
        path.write_bytes(CONTENTS["a"][:-1])
    else:
        path.unlink()
    try:
        with pytest.raises(DataError, match="a "):
            check_sizes(published)
    finally:
        path.write_bytes(CONTENTS["a"])
    check_sizes(published)
