"""How numbers, names and suggestions are written in what a person reads."""

import math
import os
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches


def printable(name: str | os.PathLike[str]) -> str:
    """Return ``name`` with control characters and undecodable bytes escaped for a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fsdecode(name))


def printable_lines(text: str) -> str:
    """Return ``text`` with everything but its line breaks fit for a terminal."""
    return "\n".join(map(printable, text.split("\n")))


def listed(names: Iterable[str], count: int = 3) -> str:
    """Quote the first ``count`` of ``names``: ``'ant', 'bee', 'cat', ...``."""
    names = list(names)
    quoted = [repr(printable(name)) for name in names[:count]]
    return ", ".join([*quoted, "..."] if len(names) > count else quoted)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, to quote in ours."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return textwrap.shorten(line, 160, placeholder=" ...")


def plural(number: int, noun: str) -> str:
    """``1 image``, ``2 images``, ``1,000 images``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def suggest(word: str, known: Iterable[str], otherwise: str = "", closeness: float = 0.6) -> str:
    """Suggest a replacement for an unknown ``word``: ``did you mean 'kd'?``, or the known words.

    ``otherwise`` is used if nothing is close; empty: ``choose from ...``. ``closeness`` is the
    least share of letters in common.
    """
    known = [str(name) for name in known]
    close = get_close_matches(str(word), known, n=1, cutoff=closeness)
    if close:
        return f"did you mean {close[0]!r}?"
    return otherwise or (f"choose from {', '.join(known)}" if known else "")


def format_count(count: int | float, unit: str = "FLOPs") -> str:
    """A count with its unit and at least three digits.

    >>> [format_count(count) for count in (12, 9.2e9, 99.94e9, 99.96e9, 1.2816e18)]
    ['12 FLOPs', '9.20 GFLOPs', '99.9 GFLOPs', '100 GFLOPs', '1,282 PFLOPs']
    """
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 10**power:
            value = count / 10**power
            digits = f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
            return f"{digits} {prefix}{unit}"
    return f"{count:.0f} {unit}"


def format_bytes(count: int) -> str:
    """Bytes with their unit and at least three digits: ``24.6 MB``."""
    return format_count(count, "B")


def format_duration(seconds: float) -> str:
    """``1 h 05 min``, ``3 min 20 s``, ``12 s``; ``?`` for what is not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def format_table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of aligned columns, two spaces apart, the first row underlined."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [lines[0], "  " + "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]
