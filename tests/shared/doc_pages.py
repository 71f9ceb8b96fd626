"""The pages that readers are given: whatever Markdown is here is a page, and every block of it is
run or read by what it is for.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """Return the blocks of code of a page in one language."""
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def inline(page: Path) -> list[str]:
    """Return what a page has in code outside its blocks."""
    text = FENCE.sub("", page.read_text())
    return [" ".join(part.split()) for part in re.findall(r"`([^`]+)`", text)]
