"""Logs of lines that survive a kill."""

import os
from contextlib import suppress
from pathlib import Path

from ..errors import DataError
from ..messages import printable
from .atomic import disk_errors, fsync_dir, make_dirs


class AppendLog:
    """A text file that only grows by whole lines, for metrics: a resumed run cuts it back to where
    its checkpoint was.

    ``offset=None`` opens it at its end (a last line torn by a crash is cut off); an ``offset`` from
    an earlier ``.offset`` cuts everything after it. Raises ``DataError`` when the file is shorter
    than ``offset`` or ``offset`` is inside a line.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int | None = None) -> None:
        self.path = Path(path)
        make_dirs(self.path.parent)
        with disk_errors(self.path):
            self._fd = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
        try:
            with disk_errors(self.path):
                size = os.fstat(self._fd).st_size
                keep = self._end_of_last_line(size) if offset is None else offset
                if keep > size:
                    raise DataError(
                        f"{printable(self.path)} has {size} bytes and the run's state expects at"
                        f" least {keep}; it was cut or replaced: restore it, or start a new run in"
                        " another folder."
                    )
                if keep != self._end_of_last_line(keep):
                    raise DataError(
                        f"{printable(self.path)} is not the log this run wrote: byte {keep} is"
                        " inside a line; restore it, or start a new run in another folder."
                    )
                if keep != size:
                    os.ftruncate(self._fd, keep)
                os.fsync(self._fd)
                fsync_dir(self.path.parent)
            self.offset = keep
        except BaseException:
            os.close(self._fd)
            raise

    def _end_of_last_line(self, size: int) -> int:
        while size > 0:
            start = max(0, size - 65536)
            found = os.pread(self._fd, size - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            size = start
        return 0

    def append(self, line: str) -> None:
        """Append one line (a newline is added); after ``DiskError`` the file is as it was
        before.
        """
        if "\n" in line:
            raise ValueError("a log line holds no newline")
        view = memoryview(line.encode() + b"\n")
        with disk_errors(self.path, len(view)):
            try:
                done = 0
                while done < len(view):
                    done += os.write(self._fd, view[done:])
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._fd, self.offset)
                raise
        self.offset += len(view)

    def sync(self) -> int:
        """Make all lines durable and return ``.offset``, the number to put in a checkpoint."""
        with disk_errors(self.path):
            os.fsync(self._fd)
        return self.offset

    def close(self) -> None:
        """Sync and close; closing twice is fine."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with disk_errors(self.path):
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def __enter__(self) -> "AppendLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
