"""Files are old or new, never half: the order of system calls, full disks, failing calls."""

import ast
import errno
import os
import resource
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from vitdistill.errors import DiskError, PermissionDenied, UserError
from vitdistill.storage import atomic, checkpoint
from vitdistill.storage.atomic import (
    remove_dir,
    remove_temporaries,
    require_free,
    staged_dir,
    write_atomic,
    write_first,
    write_new,
)
from vitdistill.storage.manifest import write_manifest

OLD, NEW = b"old " * 700, b"new!" * 900


# -- power cuts -----------------------------------------------------------------------------------


def system_calls(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> list[tuple]:
    """Run ``work`` and return its calls that change files: (name, path, ...)."""
    calls: list[tuple] = []
    files: dict[int, str] = {}

    def record(name: str, real: Callable) -> Callable:
        def call(*args: Any, **kw: Any) -> Any:
            result = real(*args, **kw)
            if name == "open":
                files[result] = str(args[0])
                if args[1] & os.O_CREAT:
                    calls.append(("create", str(args[0])))
            elif name not in ("write", "fsync"):
                calls.append((name, *map(str, args[:2])))
            elif args[0] in files:
                calls.append((name, files[args[0]]))
            return result

        return call

    with monkeypatch.context() as patch:
        for name in ("open", "write", "fsync", "mkdir", "rename", "replace", "link"):
            patch.setattr(os, name, record(name, getattr(os, name)))
        work()
    return calls


def check_durable(calls: list[tuple]) -> int:
    """Check that a power cut at any moment shows old or new, and after the last call only new.

    Content is synced before it gets its final name, in a folder with the names in it, and every
    name before the work returns. Returns how many names were given.
    """
    unsynced: set[str] = set()
    named = 0
    for name, path, *more in calls:
        match name:
            case "create":
                unsynced |= {path, os.path.dirname(path)}
            case "write":
                unsynced.add(path)
            case "fsync":
                unsynced.discard(path)
            case "mkdir":
                unsynced.add(os.path.dirname(path))
            case "rename" | "replace" | "link":
                torn = {p for p in unsynced if p == path or p.startswith(path + os.sep)}
                assert not torn and os.path.dirname(path) == os.path.dirname(more[0])
                unsynced.add(os.path.dirname(path))
                named += 1
    assert not unsynced
    return named


def publish(final: Path, replaces: Collection[str] | None = None) -> None:
    with staged_dir(final, replaces) as temp:
        write_new(temp / "file", NEW)
        write_manifest(temp, {"file": NEW}, {"kind": "test"})


@pytest.mark.parametrize(
    ("work", "names"),
    [
        (lambda root: write_atomic(root / "file", NEW), 1),
        (lambda root: write_atomic(root / "deep" / "er" / "file", lambda f: f.write(NEW)), 1),
        (lambda root: write_first(root / "part", NEW), 1),
        (lambda root: publish(root / "deep" / "final"), 1),
        (lambda root: publish(root / "there", {"file", "manifest.json"}), 3),
        (lambda root: checkpoint.save(root, 3, {"w": torch.ones(9)}, {"lr": 0.1}), 1),
    ],
    ids=["replace", "new", "first", "folder", "replaced-folder", "checkpoint"],
)
def test_nothing_gets_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch, work, names):
    write_atomic(tmp_path / "file", OLD)
    publish(tmp_path / "there")
    assert check_durable(system_calls(monkeypatch, lambda: work(tmp_path))) == names


# -- full disks and failing calls -----------------------------------------------------------------


@pytest.mark.parametrize("older_than", [0.0, 3600.0])
def test_only_temporaries_are_removed(tmp_path, older_than):
    (tmp_path / ".tmp-0123456789ab" / "deep").mkdir(parents=True)
    for name in (".tmp-0123456789ab/deep/file", ".tmp-mine", ".tmp-ba9876543210"):
        (tmp_path / name).write_bytes(b"x")
    os.utime(tmp_path / ".tmp-0123456789ab", (0, 0))
    remove_temporaries(tmp_path, older_than)
    young = {".tmp-ba9876543210"} if older_than else set()
    assert set(os.listdir(tmp_path)) == {".tmp-mine"} | young
    remove_temporaries(tmp_path / "nothing")


def test_a_full_disk_is_a_disk_error_and_changes_nothing(tmp_path, fork, join, tree):
    write_atomic(tmp_path / "file", OLD)
    before = tree(tmp_path)

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        for content in (bytes(8000), lambda file: file.write(bytes(8000))):
            with pytest.raises(DiskError, match="file cannot be written: the disk is full"):
                write_atomic(tmp_path / "file", content)

    assert join(fork(write)) == 0
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("blocks", "full"), [(1000, True), (0, False)])
def test_no_room_is_told_before_any_work(tmp_path, monkeypatch, blocks, full):
    """A volume without blocks, as tmpfs without a limit, does not say its size."""
    volume = os.statvfs_result((4096, 4096, blocks, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: volume)
    if full:
        with pytest.raises(DiskError, match="full"):
            require_free(tmp_path / "not" / "yet" / "there", 1000)
    require_free(tmp_path, 0 if full else 10**18)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("name", ["open", "write", "fsync", "replace", "close"])
def test_failing_system_calls_surface_and_leave_old_or_new(tmp_path, monkeypatch, name, code, tree):
    write_atomic(tmp_path / "file", OLD)
    real = getattr(os, name)
    for nth in range(1, 6):
        calls = 0

        def fail(*args, nth=nth, **kw):
            nonlocal calls
            calls += 1
            if calls == nth:
                if name == "close":
                    real(*args, **kw)
                raise OSError(code, os.strerror(code))
            return real(*args, **kw)

        monkeypatch.setattr(os, name, fail)
        try:
            write_atomic(tmp_path / "file", NEW)
        except UserError as error:
            assert calls >= nth
            assert isinstance(error, PermissionDenied if code == errno.EACCES else DiskError)
            assert str(tmp_path / "file") in str(error)
        else:
            assert calls < nth
        monkeypatch.setattr(os, name, real)
        assert list(tree(tmp_path)) == ["file"]
        assert (tmp_path / "file").read_bytes() in (OLD, NEW)
        write_atomic(tmp_path / "file", OLD)


def test_an_interrupt_while_writing_leaves_nothing(tmp_path):
    def content(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", content)
    assert list(tmp_path.iterdir()) == []


# -- names and modes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("umask", "file_mode", "dir_mode"), [(0o002, 0o664, 0o775), (0o077, 0o600, 0o700)]
)
def test_umask_is_honoured(tmp_path, umask, file_mode, dir_mode):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "sub" / "file", NEW)
        with staged_dir(tmp_path / "published") as temp:
            write_new(temp / "file", NEW)
    finally:
        os.umask(before)
    for folder in (tmp_path / "sub", tmp_path / "published"):
        assert (folder / "file").stat().st_mode & 0o777 == file_mode
        assert folder.stat().st_mode & 0o777 == dir_mode


def test_unusable_paths_are_disk_errors(tmp_path):
    (tmp_path / "a-file").write_bytes(b"x")
    (tmp_path / "a-folder" / "inside").mkdir(parents=True)
    for path in (tmp_path / "a-file" / "b", tmp_path / "a-folder", tmp_path / ("n" * 300)):
        with pytest.raises(DiskError):
            write_atomic(path, b"x")
    assert sorted(os.listdir(tmp_path)) == ["a-file", "a-folder"]


def test_the_first_writer_wins(tmp_path, tree):
    assert write_first(tmp_path / "part", b"me")
    assert not write_first(tmp_path / "part", lambda file: file.write(b"you"))
    assert tree(tmp_path) == {"part": b"me"}


def test_a_new_file_replaces_none(tmp_path, tree):
    write_new(tmp_path / "file", OLD)
    with pytest.raises(DiskError):
        write_new(tmp_path / "file", NEW)
    assert tree(tmp_path) == {"file": OLD}


def test_a_published_folder_is_not_overwritten(tmp_path, tree):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "mine").write_bytes(b"x")
    with pytest.raises(DiskError), staged_dir(tmp_path / "final") as temp:
        write_new(temp / "file", b"y")
    assert tree(tmp_path) == {"final/mine": b"x"}
    assert not remove_dir(tmp_path / "final", {"other"})
    assert remove_dir(tmp_path / "final", {"mine"})
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_folder_comes_back_when_publishing_fails(tmp_path, monkeypatch, tree):
    final, real = tmp_path / "final", os.rename
    with staged_dir(final) as temp:
        write_new(temp / "file", OLD)

    def fail(source, target):
        if str(source).startswith(str(tmp_path / ".tmp-")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(DiskError), staged_dir(final, {"file"}) as temp:
        write_new(temp / "file", NEW)
    assert tree(tmp_path) == {"final/file": OLD}
    monkeypatch.setattr(os, "rename", real)
    (final / ".DS_Store").write_bytes(b"finder")
    with staged_dir(final, {"file"}) as temp:
        write_new(temp / "file", NEW)
    assert tree(tmp_path) == {"final/file": NEW, "final/.DS_Store": b"finder"}


# -- the rule itself ------------------------------------------------------------------------------


def writes_files(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    last = name.split(".")[-1]
    if any(ast.unparse(argument) == "os.devnull" for argument in call.args):
        return False
    if name in ("torch.save", "os.rename", "os.replace", "os.open"):
        return True
    if last != "open" or name in ("Image.open", "archive.open"):
        return last in ("save_file", "write_text", "write_bytes", "save_model")
    given = [*call.args[:2], *(k.value for k in call.keywords if k.arg == "mode")]
    modes = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return any(set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes)


def test_nothing_else_in_the_package_writes_files():
    package = Path(atomic.__file__).parents[1]
    found = [
        f"{path.relative_to(package)}:{node.lineno}"
        for path in package.rglob("*.py")
        if path.parent.name != "storage" and path.name != "demo.py"  # whose images are made anew
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and writes_files(node)
    ]
    assert found == []
