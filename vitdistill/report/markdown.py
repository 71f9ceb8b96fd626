"""A report as Markdown, for a pull request or a model card: its words and tables."""

import re

from ..messages import printable
from .document import Block, Document, Strong, Table, Verdicts

_SPECIAL = re.compile(r"([\\`*_\[\]<>#|&~!${}]|:(?=//)|(?<=www)\.)", re.IGNORECASE)


def write_markdown(document: Document) -> str:
    """Return the text; pictures and charts are left out."""
    parts = [f"# {_escape(document.title)}", _escape(document.about)]
    for section in document.sections:
        blocks = [text for text in map(_block, section.blocks) if text]
        if blocks:
            parts += [f"## {_escape(section.title)}", *blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Table):
        head = _row(block.head)
        line = "|".join(["", ":--", *["--:"] * (len(block.head) - 1), ""])
        return "\n".join([f"{_escape(block.caption)}:", "", head, line, *map(_row, block.rows)])
    if isinstance(block, Verdicts):
        return "\n".join(f"- **{_escape(word)}**: {_text(text)}" for word, text in block.items)
    return _text(block) if isinstance(block, list | tuple) else ""


def _text(parts: object) -> str:
    assert isinstance(parts, list | tuple)
    return "".join(f"**{_escape(p)}**" if isinstance(p, Strong) else _escape(p) for p in parts)


def _row(cells: object) -> str:
    assert isinstance(cells, list | tuple)
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    """Escape what Markdown, HTML in it, links and mentions are made of."""
    return _SPECIAL.sub(r"\\\1", printable(text)).replace("@", "&#64;")
