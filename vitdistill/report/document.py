"""What a report is made of, whatever it is written as."""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Strong(str):
    """A word or name that stands out."""


class Word(str):
    """A verdict."""


Text = Sequence[str]
"""A paragraph: plain and `Strong` parts, none of them markup."""
Point = tuple[float, float]
MOST_COLUMNS = 8  # of a table of recipes side by side


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first naming the row; "": unknown. ``prose``: cells are words."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False

    def parts(self) -> Iterator["Table"]:
        """Yield the table in parts that fit the width of a page."""
        for i in range(1, len(self.head), MOST_COLUMNS):
            last = i + MOST_COLUMNS
            rows = [(row[0], *row[i:last]) for row in self.rows if any(row[i:last])]
            yield Table(self.caption, (self.head[0], *self.head[i:last]), rows)


@dataclass(frozen=True)
class Verdicts:
    """Answers, each a word and a sentence."""

    items: Sequence[tuple[Word, Text]]


class Picture(NamedTuple):
    """An image file, and what it shows."""

    png: bytes
    alt: str
    caption: Text

    @property
    def url(self) -> str:
        return f"data:image/png;base64,{b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Pictures:
    """Pictures below each other, or small ones side by side; ``about``: what is said of them."""

    items: Sequence[Picture]
    small: bool = False
    about: Text = ()


class Series(NamedTuple):
    """Points that belong together, a line or, where they have a ``mean``, marks around it.

    ``number`` gives them their colour and shape.
    """

    name: str
    number: int
    points: Sequence[Point]
    mean: Point | None = None


@dataclass(frozen=True)
class Chart:
    """Series over two axes.

    Args:
        alt: what is to be seen, in words.
        frontier: points, joined by steps, that nothing beats.
        log: the horizontal axis is logarithmic; whole: it counts whole things.
    """

    title: str
    alt: str
    x: str
    y: str
    series: Sequence[Series]
    frontier: Sequence[Point] = ()
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Charts:
    """Charts side by side, of the same series."""

    items: Sequence[Chart]

    @property
    def names(self) -> dict[int, str]:
        """Return the names of the series by their numbers, in order."""
        found = {s.number: s.name for chart in self.items for s in chart.series}
        return dict(sorted(found.items()))


Block = Table | Verdicts | Pictures | Charts | Text


@dataclass(frozen=True)
class Document:
    """A title, a line about it, and blocks under headings."""

    title: str
    about: str
    sections: Sequence[tuple[str, Sequence[Block]]]
