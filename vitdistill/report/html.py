"""A report as one HTML page that needs nothing else: no network, no script.

Text becomes markup in `tag` alone, which escapes whatever is not markup already.
"""

import base64
from importlib.resources import files

from .charts import draw_chart, draw_key
from .document import (
    Block,
    Chart,
    Charts,
    Document,
    Picture,
    Pictures,
    Section,
    Strong,
    Table,
    Verdicts,
)
from .markup import Markup, tag

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"


LONG = 28
"""Characters beyond which a cell is broken into lines."""


def write_html(document: Document) -> str:
    """Return the page."""
    style = files(__package__).joinpath("style.css").read_text("utf-8")
    named = [(f"part-{i}", section) for i, section in enumerate(document.sections, 1)]
    links = [tag("li", tag("a", s.title, href=f"#{anchor}")) for anchor, s in named]
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", document.title),
            tag("style", Markup(style)),
        ),
        tag(
            "body",
            tag("header", tag("h1", document.title), tag("p", document.about)),
            tag("nav", tag("ul", *links), aria_label="parts of this page"),
            tag("main", *(_section(anchor, section) for anchor, section in named)),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _section(anchor: str, section: Section) -> Markup:
    heading = tag("h2", section.title, id=anchor)
    return tag("section", heading, *map(_block, section.blocks), aria_labelledby=anchor)


def _block(block: Block) -> Markup:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Verdicts):
        items = [
            tag("li", tag("span", word, class_=f"verdict {word.replace(' ', '-')}"), *_text(text))
            for word, text in block.items
        ]
        return tag("ul", *items, class_="verdicts")
    if isinstance(block, Picture):
        return _picture(block)
    if isinstance(block, Pictures):
        return tag("div", *map(_picture, block.items), class_="pictures")
    if isinstance(block, Charts):
        charts = tag("div", *map(_chart, block.items), class_="charts")
        return tag("div", _legend(block), charts)
    return tag("p", *_text(block))


def _text(parts: object) -> list[Markup | str]:
    assert isinstance(parts, list | tuple)
    return [tag("strong", tag("bdi", p)) if isinstance(p, Strong) else p for p in parts]


def _table(table: Table) -> Markup:
    head = tag("tr", *(tag("th", tag("span", cell), scope="col") for cell in table.head))
    rows = [
        tag("tr", tag("th", tag("bdi", row[0]), scope="row"), *map(_cell, row[1:]))
        for row in table.rows
    ]
    caption = tag("caption", table.caption)
    whole = tag("table", caption, tag("thead", head), tag("tbody", *rows))
    # It scrolls by itself where it is too wide, by keyboard too.
    return tag("div", whole, class_="wide", role="region", aria_label=table.caption, tabindex="0")


def _cell(text: str) -> Markup:
    return tag("td", text) if len(text) <= LONG else tag("td", tag("bdi", text), class_="long")


def _picture(picture: Picture) -> Markup:
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    image = tag("img", src=source, alt=picture.alt)
    return tag("figure", image, tag("figcaption", *_text(picture.caption)))


def _chart(chart: Chart) -> Markup:
    return tag("figure", tag("figcaption", chart.title), draw_chart(chart))


def _legend(charts: Charts) -> Markup:
    names = {item.number: item.name for chart in charts.items for item in chart.series}
    keys = [tag("li", draw_key(n), tag("bdi", name)) for n, name in sorted(names.items())]
    return tag("ul", *keys, class_="legend")
