"""A report as one HTML page that needs nothing else (no network, no script), or as Markdown.

The templates say where text stands; whatever they are given is escaped as it is written.
"""

import html
import math
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..messages import printable
from .document import Chart, Document, Strong, Word

NUM_COLOURS = 8
SHAPES = (
    "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1-1 0Z",
    "M-.9-.9H.9V.9H-.9Z",
    "M0-1.2L1.1.8H-1.1Z",
    "M0-1.25L1.25 0L0 1.25L-1.25 0Z",
)
FRAME = {"left": 52, "right": 446, "bottom": 254, "top": 12}
"""Where a chart's axes are, in a picture of 476 by 300."""
Axis = Callable[[float], float]
KEPT = Markup('<span class="whole">{}</span>')

_SPECIAL = re.compile(r"([\\`*_\[\]<>#|&~!${}]|:(?=//)|(?<=www)\.)", re.IGNORECASE)


def write_html(document: Document) -> str:
    """Return the page."""
    return _write("page.html.jinja", html.escape, document)


def write_markdown(document: Document) -> str:
    """Return words and tables, for a pull request or a model card; pictures are left out."""
    return _write("page.md.jinja", _escape_markdown, document)


def _write(name: str, escape: Callable[[str], str], document: Document) -> str:
    def say(value: Any) -> Markup:
        """Escape what is not markup already, and what would redraw or reorder a page."""
        return value if isinstance(value, Markup) else Markup(escape(printable(str(value))))

    def read(file: str) -> str:
        return files(__package__).joinpath(file).read_text("utf-8")

    def break_names(text: str) -> Markup:  # allow a line break after each separator
        return Markup("<wbr>").join(map(say, re.split(r"(?<=[._/])", text)))

    environment = Environment(
        autoescape=True, finalize=say, undefined=StrictUndefined, trim_blocks=True
    )
    environment.tests["strong"] = lambda part: isinstance(part, Strong)
    environment.tests["verdict"] = lambda cell: isinstance(cell, Word)

    def keep_whole(text: str) -> Markup:  # no line ends at the hyphen of a measure
        parts = enumerate(re.split("(top-1|k-NN)", text))
        return Markup("").join(KEPT.format(say(p)) if i % 2 else say(p) for i, p in parts)

    environment.filters |= {"breakable": break_names, "whole": keep_whole}
    environment.filters |= {"kind": lambda block: type(block).__name__, "plot": plot}
    given = {"style": Markup(read("style.css")), "shapes": SHAPES, "colours": NUM_COLOURS}
    return environment.from_string(read(name)).render(document=document, **given)


def _escape_markdown(text: str) -> str:
    """Escape what Markdown, HTML in it, links and mentions are made of."""
    return _SPECIAL.sub(r"\\\1", text).replace("@", "&#64;")


def plot(chart: Chart) -> SimpleNamespace:
    """Return where on a chart's picture a value is (``x``, ``y``), and the ticks of both axes."""
    points = [p for s in chart.series for p in (*s.points, s.mean) if p is not None]
    across, up = ([p[i] for p in points] for i in (0, 1))
    x_ticks = _powers(across) if chart.log else _round_ticks(across, 1 if chart.whole else 0)
    y_ticks = _round_ticks(up)
    return SimpleNamespace(
        x=_axis([*across, *x_ticks], FRAME["left"], FRAME["right"], chart.log),
        y=_axis([*up, *y_ticks], FRAME["bottom"], FRAME["top"]),
        x_ticks={tick: _label(tick) for tick in x_ticks},
        y_ticks={tick: _label(tick) for tick in y_ticks},
        **FRAME,
    )


def _axis(values: Sequence[float], start: float, end: float, log: bool = False) -> Axis:
    read: Axis = math.log10 if log else float
    low, high = read(min(values)), read(max(values))
    pad = 0.04 * (high - low) if log else 0

    def place(value: float) -> float:
        part = (read(value) - low + pad) / (high - low + 2 * pad)
        return round(start + part * (end - start), 1)

    return place


def _powers(values: Sequence[float]) -> list[float]:
    """Return at most six of 1, 2, 5, 10, 20 ... about the values."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    ticks = [t for t in ticks if 0.7 * low <= t <= 1.4 * high]
    while len(ticks) > 6:
        ticks = ticks[::2]
    return ticks


def _round_ticks(values: Sequence[float], least: float = 0) -> list[float]:
    """Return about five round numbers around the values, multiples of ``least``."""
    low, high = min(values), max(values)
    if high == low:
        low, high = (0.9 * low, high) if high > 0 else (low, low + 1)
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step * 5 >= high - low)
    step = max(math.ceil(step), least) if least else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _label(value: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.4g} {prefix}"
    return f"{value:.4g}"
