"""Charts as SVG: colours come from the page's style, so that they follow light, dark and print."""

import math
from collections.abc import Callable, Sequence

from .document import Chart, Series
from .markup import Markup, tag

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 46
NUM_COLOURS = 8

Scale = Callable[[float], float]


def draw_chart(chart: Chart) -> Markup:
    """Return the chart as an SVG element."""
    every = [*chart.series, *chart.large]
    points = [point for series in every for point in series.points]
    x, x_ticks = _axis([p[0] for p in points], LEFT, WIDTH - RIGHT, log=chart.log)
    y, y_ticks = _axis([p[1] for p in points], HEIGHT - BOTTOM, TOP)
    parts = [_grid(chart, x, x_ticks, y, y_ticks)]
    if chart.frontier:
        parts.append(_frontier(chart.frontier, x, y))
    for series in chart.series:
        placed = [(x(a), y(b)) for a, b in series.points]
        if chart.lines:
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
            parts.append(tag("polyline", points=line, class_=f"line {_style(series)}"))
        else:
            parts += [_mark(a, b, series.number, 3.2, "point") for a, b in placed]
    for series in chart.large:
        parts += [_mark(x(a), y(b), series.number, 6) for a, b in series.points]
    label = f"{chart.title}. {chart.alt}"
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def draw_key(number: int) -> Markup:
    """Return the line and mark of a series, for a legend."""
    line = tag("polyline", points="1,8 31,8", class_=f"line {_style(Series('', number, ()))}")
    mark = _mark(16, 8, number, 5)
    return tag("svg", line, mark, viewBox="0 0 32 16", class_="key", aria_hidden="true")


def _style(series: Series) -> str:
    return f"c{series.number % NUM_COLOURS} d{(series.number + series.number // NUM_COLOURS) % 4}"


def _mark(x: float, y: float, number: int, size: float, kind: str = "mark") -> Markup:
    """Return a mark whose shape tells series apart where colours do not."""
    corners, turn = ((0, 0), (4, math.pi / 4), (3, -math.pi / 2), (4, 0))[number % 4]
    style = f"{kind} c{number % NUM_COLOURS}"
    if not corners:
        return tag("circle", cx=round(x, 1), cy=round(y, 1), r=size, class_=style)
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    places = [(x + 1.25 * size * math.cos(a), y + 1.25 * size * math.sin(a)) for a in angles]
    return tag("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places), class_=style)


def _frontier(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> Markup:
    """Return the steps below which something is as good and cheaper."""
    path = f"M {x(points[0][0]):.1f} {y(points[0][1]):.1f}"
    for a, b in points[1:]:
        path += f" H {x(a):.1f} V {y(b):.1f}"
    return tag("path", d=f"{path} H {WIDTH - RIGHT}", class_="frontier")


def _grid(
    chart: Chart, x: Scale, x_ticks: Sequence[float], y: Scale, y_ticks: Sequence[float]
) -> Markup:
    parts = []
    for value in y_ticks:
        at = round(y(value), 1)
        parts.append(tag("path", d=f"M {LEFT} {at} H {WIDTH - RIGHT}", class_="grid"))
        parts.append(tag("text", _label(value), x=LEFT - 6, y=at + 4, text_anchor="end"))
    for value in x_ticks:
        at = round(x(value), 1)
        parts.append(tag("path", d=f"M {at} {HEIGHT - BOTTOM} v 4", class_="tick"))
        text = tag("text", _label(value), x=at, y=HEIGHT - BOTTOM + 17, text_anchor="middle")
        parts.append(text)
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", chart.x, x=middle, y=HEIGHT - 8, text_anchor="middle"))
    parts.append(
        tag(
            "text",
            chart.y,
            transform=f"translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)",
            text_anchor="middle",
        )
    )
    return tag("g", *parts, class_="axes")


def _axis(
    values: Sequence[float], start: float, end: float, log: bool = False
) -> tuple[Scale, list[float]]:
    """Return where on the page a value is, and the values to write there."""
    low, high = min(values), max(values)
    read: Scale = math.log10 if log else float
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
        ticks = [t for t in ticks if 0.7 * low <= t <= 1.4 * high]
        while len(ticks) > 6:
            ticks = ticks[::2]
    else:
        ticks = _round_ticks(low, high)
    low, high = min(low, *ticks), max(high, *ticks)
    pad = 0.04 * (read(high) - read(low)) if log else 0
    first, last = read(low) - pad, read(high) + pad

    def place(value: float) -> float:
        return start + (read(value) - first) / (last - first) * (end - start)

    return place, ticks


def _round_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers around the values."""
    if high == low:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step * 5 >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _label(value: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.4g} {prefix}"
    return f"{value:.4g}"
