"""HTML and SVG elements, in which text cannot become markup."""

import html

from ..messages import printable

_VOID = ("meta", "img")


class Markup(str):
    """Text that is markup already."""


def tag(name: str, /, *children: str, **attributes: str | float) -> Markup:
    """Return an element; text in it is escaped, and so is what would redraw or reorder a page.

    ``class_`` is the attribute ``class``, ``aria_label`` is ``aria-label``.

    >>> tag("p", "<b>", tag("i", "you & I"), id='"')
    '<p id="&quot;">&lt;b&gt;<i>you &amp; I</i></p>'
    """
    start = f"<{name}"
    for key, value in attributes.items():
        start += f' {key.rstrip("_").replace("_", "-")}="{_escape(str(value))}"'
    start += ">"
    inner = [child if isinstance(child, Markup) else _escape(child) for child in children]
    return Markup(start if name in _VOID else f"{start}{''.join(inner)}</{name}>")


def _escape(text: str) -> str:
    return html.escape(printable(text))
