"""Files are old or new, never half: power cuts simulated after every system call, real kills, full
disks, failing system calls.
"""

import ast
import errno
import os
import random
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vitdistill.errors import DiskError, PermissionDenied, UserError
from vitdistill.storage import atomic
from vitdistill.storage.atomic import (
    clear_aside,
    remove_dir,
    remove_temporaries,
    require_free,
    staged_dir,
    write_atomic,
    write_first,
    write_new,
)
from vitdistill.storage.manifest import verify_dir, write_manifest

OLD, NEW = b"old " * 700, b"new!" * 900


# -- a disk that loses power ----------------------------------------------------------------------


NAMED = {"mkdir": "mkdir", "rename": "rename", "replace": "rename", "link": "link"}
NAMED |= {"unlink": "unlink", "rmdir": "unlink"}


class Recorder:
    """Notes the system calls under ``root`` while they really happen."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.ops, self.fds = root, [], {}
        for name in ("open", "write", "fsync", "close"):
            patch.setattr(os, name, getattr(self, name)(getattr(os, name)))
        for name, kind in NAMED.items():
            patch.setattr(os, name, self.named(kind, getattr(os, name)))

    def open(self, real: Callable) -> Callable:
        def call(path, flags, *rest, **kw):
            fd = real(path, flags, *rest, **kw)
            if str(path).startswith(str(self.root)):
                self.fds[fd] = str(path)
                if flags & os.O_CREAT:
                    self.ops.append(("create", str(path)))
            return fd

        return call

    def write(self, real: Callable) -> Callable:
        def call(fd, data):
            done = real(fd, data)
            if fd in self.fds:
                self.ops.append(("write", self.fds[fd], bytes(data[:done])))
            return done

        return call

    def fsync(self, real: Callable) -> Callable:
        def call(fd):
            real(fd)
            if fd in self.fds:
                kind = "fsync_dir" if os.path.isdir(self.fds[fd]) else "fsync"
                self.ops.append((kind, self.fds[fd]))

        return call

    def close(self, real: Callable) -> Callable:
        def call(fd):
            real(fd)
            self.fds.pop(fd, None)

        return call

    def named(self, kind: str, real: Callable) -> Callable:
        def call(*paths, **kw):
            real(*paths, **kw)
            self.ops.append((kind, *(str(p) for p in paths if isinstance(p, str | Path))))

        return call


class Disk:
    """Inodes and names, each with what is durable and what is only in the cache."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.data: dict[int, list[bytes]] = {}  # inode -> [durable, cached]
        self.cached: dict[int, dict[str, int]] = {0: {}}  # folder inode -> names
        self.durable: dict[int, dict[str, int]] = {0: {}}
        self.pending: list[tuple[int, tuple]] = []
        self.next = 1
        for path in sorted(Path(root).rglob("*")):
            parent, name = self.place(str(path))
            inode = self.new()
            if path.is_dir():
                self.cached[inode], self.durable[inode] = {}, {}
            else:
                self.data[inode] = [path.read_bytes()] * 2
            self.cached[parent][name] = self.durable[parent][name] = inode

    def new(self) -> int:
        self.next += 1
        return self.next

    def place(self, path: str) -> tuple[int, str]:
        *folders, name = os.path.relpath(path, self.root).split(os.sep)
        inode = 0
        for folder in folders:
            inode = self.cached[inode][folder]
        return inode, name

    def inode(self, path: str) -> int:
        if os.path.relpath(path, self.root) == ".":
            return 0
        parent, name = self.place(path)
        return self.cached[parent][name]

    @staticmethod
    def apply(names: dict[str, int], change: tuple) -> None:
        match change:
            case ("add", name, inode):
                names[name] = inode
            case ("drop", name):
                names.pop(name, None)
            case ("move", old, new) if old in names:
                names[new] = names.pop(old)

    def change(self, folder: int, change: tuple) -> None:
        self.apply(self.cached[folder], change)
        self.pending.append((folder, change))

    def do(self, op: tuple) -> None:
        match op:
            case ("create", path):
                parent, name = self.place(path)
                if name not in self.cached[parent]:
                    inode = self.new()
                    self.data[inode] = [b"", b""]
                    self.change(parent, ("add", name, inode))
            case ("mkdir", path):
                parent, name = self.place(path)
                inode = self.new()
                self.cached[inode], self.durable[inode] = {}, {}
                self.change(parent, ("add", name, inode))
            case ("write", path, data):
                self.data[self.inode(path)][1] += data
            case ("fsync", path):
                self.data[self.inode(path)][0] = self.data[self.inode(path)][1]
            case ("fsync_dir", path):
                folder = self.inode(path)
                for place, change in self.pending:
                    if place == folder:
                        self.apply(self.durable[folder], change)
                self.pending = [item for item in self.pending if item[0] != folder]
            case ("rename", old, new):
                (folder, name), (other, target) = self.place(old), self.place(new)
                assert folder == other, "renames stay in one folder"
                self.change(folder, ("move", name, target))
            case ("link", old, new):
                folder, target = self.place(new)
                self.change(folder, ("add", target, self.inode(old)))
            case ("unlink", path):
                folder, name = self.place(path)
                self.change(folder, ("drop", name))

    def after_power_cut(self, rng: random.Random, into: Path) -> None:
        """One state the disk may be in: unsynced names in any subset, unsynced bytes lost, torn,
        zero or garbage.
        """
        names = {folder: dict(entries) for folder, entries in self.durable.items()}
        cut = rng.randint(0, len(self.pending))
        share = rng.choice([0.0, 0.5, 1.0])
        for index, (folder, change) in enumerate(self.pending):
            if index < cut or rng.random() < share:
                self.apply(names[folder], change)
        self._lay(0, names, rng, into)

    def _lay(
        self, folder: int, names: dict[int, dict[str, int]], rng: random.Random, into: Path
    ) -> None:
        into.mkdir()
        for name, inode in names[folder].items():
            if inode in names:
                self._lay(inode, names, rng, into / name)
                continue
            synced, cached = self.data[inode]
            if synced != cached:
                tail = len(cached) - len(synced)
                cached = rng.choice(
                    [
                        synced,
                        cached,
                        synced + bytes(tail),
                        synced + rng.randbytes(tail),
                        cached[: len(synced) + rng.randint(0, tail)],
                    ]
                )
            (into / name).write_bytes(cached)


def crash_states(root: Path, work: Callable[[], object], samples: int, without: str | None = None):
    """Run ``work``, then yield (finished, folder) for power cuts after each of its system calls."""
    disk = Disk(root)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(root, patch)
        work()
    ops = [op for op in recorder.ops if op[0] != without]
    assert len(ops) > 3
    rng = random.Random(7)
    where = root.with_name(root.name + "-crashed")
    for position in range(len(ops) + 1):
        for sample in range(samples):
            state = where.with_name(f"{where.name}-{position}-{sample}")
            disk.after_power_cut(rng, state)
            yield position == len(ops), state
        if position < len(ops):
            disk.do(ops[position])


def old_new_or_broken(folder: Path, finished: bool) -> bool:
    content = (folder / "file").read_bytes() if (folder / "file").exists() else None
    return content != NEW if finished else content not in (OLD, NEW)


@pytest.mark.parametrize("without", [None, "fsync", "fsync_dir"])
def test_power_cut_leaves_old_or_new_and_never_loses_a_returned_write(tmp_path, without):
    """The simulator finds protocols that do not sync."""
    root = tmp_path / "root"
    root.mkdir()
    write_atomic(root / "file", OLD)
    work = lambda: write_atomic(root / "file", NEW)
    states = list(crash_states(root, work, samples=40, without=without))
    assert len(states) > 150
    broken = [state for finished, state in states if old_new_or_broken(state, finished)]
    assert bool(broken) == (without is not None)


def test_power_cut_while_publishing_a_folder(tmp_path):
    root = tmp_path / "root"
    root.mkdir()

    def publish():
        with staged_dir(root / "deep" / "final") as temp:
            write_new(temp / "file", NEW)
            write_manifest(temp, {"file": NEW}, {"kind": "test"})

    for finished, state in crash_states(root, publish, samples=25):
        final = state / "deep" / "final"
        assert final.exists() or not finished
        if final.exists():
            verify_dir(final)


# -- real kills and full disks --------------------------------------------------------------------


def test_only_temporaries_are_removed(tmp_path):
    """Those of an earlier version, with a host and a process in the name, are left over too."""
    (tmp_path / ".tmp-host.0123-17-0123456789ab").write_bytes(b"half")
    for name, file in ((".tmp-0123456789ab", "state.json"), (".tmp-ba9876543210", "thesis.doc")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"half")
    for name in (".tmp-mine", "data"):
        (tmp_path / name).write_bytes(b"x")
    remove_temporaries(tmp_path, {"state.json"})
    assert {path.name for path in tmp_path.iterdir()} == {".tmp-ba9876543210", ".tmp-mine", "data"}


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


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EBUSY])
def test_what_a_network_disk_keeps_for_a_reader_is_taken_later(tmp_path, monkeypatch, code):
    """NFS keeps a removed file that somebody has open under another name, and with it the
    folder.
    """
    with staged_dir(tmp_path / "old") as temp:
        write_new(temp / "mine", b"1")

    def kept(path):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", kept)
        assert remove_dir(tmp_path / "old", {"mine"})
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tmp-") and list(left.iterdir()) == []
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES])
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


def test_a_read_only_folder_is_a_permission_error(fork, join):
    # Not tmp_path: its parents are closed to the user this becomes, and root may write anywhere.
    with tempfile.TemporaryDirectory() as name:
        locked = Path(name) / "locked"
        locked.mkdir()
        locked.chmod(0o555)
        Path(name).chmod(0o755)

        def as_nobody():
            if os.getuid() == 0:
                os.setuid(65534)
            with pytest.raises(PermissionDenied, match="locked"):
                write_atomic(locked / "file", b"x")

        assert join(fork(as_nobody)) == 0
        assert list(locked.iterdir()) == []


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
    final, aside, real = tmp_path / "final", tmp_path / "aside", os.rename
    with staged_dir(final) as temp:
        write_new(temp / "file", OLD)

    def fail(source, target):
        if str(source).startswith(str(tmp_path / ".tmp-")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(DiskError), staged_dir(final, aside) as temp:
        write_new(temp / "file", NEW)
    assert tree(tmp_path) == {"final/file": OLD}
    monkeypatch.setattr(os, "rename", real)
    with staged_dir(final, aside) as temp:
        write_new(temp / "file", NEW)
    (aside / ".DS_Store").write_bytes(b"finder")
    clear_aside(aside, final, {"file"})
    assert tree(tmp_path) == {"final/file": NEW, "final/.DS_Store": b"finder"}


# -- the rule itself ------------------------------------------------------------------------------


def writes_files(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    last = name.split(".")[-1]
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
        if path.parent.name != "storage"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and writes_files(node)
    ]
    assert found == []
