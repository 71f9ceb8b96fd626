"""What a report is made of, whatever it is written as."""

from collections.abc import Sequence
from dataclasses import dataclass


class Strong(str):
    """A word or name that stands out."""


Text = Sequence[str]
"""A paragraph: plain and `Strong` parts, none of them markup."""


@dataclass(frozen=True)
class Table:
    """Rows of cells, of which the first names the row; "": it is not known."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Verdicts:
    """Answers, each a word and a sentence."""

    items: Sequence[tuple[str, Text]]


@dataclass(frozen=True)
class Picture:
    """An image file, and what it shows."""

    png: bytes
    alt: str
    caption: Text


@dataclass(frozen=True)
class Pictures:
    """Small pictures side by side."""

    items: Sequence[Picture]


@dataclass(frozen=True)
class Series:
    """Points that belong together; ``number`` gives them their colour and shape."""

    name: str
    number: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Series over two axes.

    Args:
        alt: what is to be seen, in words.
        lines: points are joined; else each is a mark.
        frontier: points, joined by steps, that nothing beats.
        large: marks that stand for the small ones of their series.
        log: the horizontal axis is logarithmic.
    """

    title: str
    alt: str
    x: str
    y: str
    series: Sequence[Series]
    lines: bool = True
    frontier: Sequence[tuple[float, float]] = ()
    large: Sequence[Series] = ()
    log: bool = False


@dataclass(frozen=True)
class Charts:
    """Charts side by side, of the same series."""

    items: Sequence[Chart]


Block = Table | Verdicts | Picture | Pictures | Charts | Text


@dataclass(frozen=True)
class Section:
    """A heading, and what stands under it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A title, a line about it, and sections."""

    title: str
    about: str
    sections: Sequence[Section]
