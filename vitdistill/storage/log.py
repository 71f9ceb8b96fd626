"""Logs of whole lines: a kill can cost the last lines, but leaves none torn.

`AppendLog.sync` makes all lines durable before the checkpoint that says how many bytes there were;
a resumed run cuts the log back to them and writes the same lines again.
"""

import os
from contextlib import suppress
from pathlib import Path

from ..errors import DataError
from .atomic import StrPath, disk_errors, fsync_dir, make_dirs, write_all


class AppendLog:
    """A text file, ``offset`` bytes long, that grows by whole lines.

    Args:
        path: the file, made if it is missing.
        offset: an earlier ``.offset``, after which everything is cut off; `DataError` if no line
            ends there.
    """

    def __init__(self, path: StrPath, offset: int = 0) -> None:
        self.path, self.offset = Path(path), offset
        make_dirs(self.path.parent)
        with disk_errors(self.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o666)
            try:
                if offset and os.pread(self._fd, 1, offset - 1) != b"\n":
                    why = f"it has no line's end at byte {offset}"
                    what = f"{self.path} is not the log this run wrote: {why}"
                    raise DataError(what, "restore it, or start a new run in another folder")
                os.ftruncate(self._fd, offset)
                os.fsync(self._fd)
                fsync_dir(self.path.parent)
            except BaseException:
                os.close(self._fd)
                raise

    def append(self, line: str) -> None:
        """Append a line and a newline. After a `DiskError` the file is as it was before."""
        data = line.encode() + b"\n"
        assert data.count(b"\n") == 1
        with disk_errors(self.path):
            try:
                write_all(self._fd, data)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._fd, self.offset)
                raise
        self.offset += len(data)

    def sync(self) -> int:
        with disk_errors(self.path):
            os.fsync(self._fd)
        return self.offset

    def close(self) -> None:
        """Sync and close."""
        try:
            self.sync()
        finally:
            os.close(self._fd)
