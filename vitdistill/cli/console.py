"""Standard output and error, which a reader may close without stopping the command."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from ..messages import printable_lines
from .flags import wrap


class Lasting:
    """A stream that drops what it cannot write, as after ``| head -3``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text at once."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            # Not only this object: Python still holds a buffer, and libraries have their own.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
        return len(text)

    def flush(self) -> None:
        """Do nothing: all is written."""


def say(text: str, fold: bool = False) -> None:
    """Print lines as they are, however long; what cannot be printed is escaped.

    ``fold``: wrap at words on a terminal, for prose that nobody copies.
    """
    lines = printable_lines(text)
    print(wrap(lines) if fold and sys.stdout.isatty() else lines)


def working(text: str) -> None:
    """Say on stderr what is being done; standard output is for results."""
    print(f"vitdistill: {printable_lines(text)}", file=sys.stderr)


@contextmanager
def lasting_console() -> Iterator[None]:
    """Let the block print, whether anybody reads it or not."""
    out, err = (Lasting(stream or io.StringIO()) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield
