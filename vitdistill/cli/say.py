"""Lines for a terminal."""

import time
from collections.abc import Callable

from rich.console import Console

from ..messages import printable_lines

EVERY_S = 10.0
"""Seconds between the lines about long work."""


def say(text: str) -> None:
    """Print lines as they are, however long; what cannot be printed is escaped."""
    Console().print(printable_lines(text), highlight=False, markup=False, soft_wrap=True)


def now_and_then() -> Callable[[str], None]:
    """Return a `say` for every part of long work, silent for `EVERY_S` seconds after a line."""
    told = time.monotonic()

    def tell(text: str) -> None:
        nonlocal told
        if time.monotonic() - told >= EVERY_S:
            told = time.monotonic()
            say(text)

    return tell
