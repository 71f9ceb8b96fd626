"""Build the documentation site into build/site (``make docs``): gather its pages, run Zensical,
check what it made. Without the extra ``docs``, `gather` alone serves the tests.
"""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from write_messages import write_messages

ROOT = Path(__file__).parents[1]
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"

HOMES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "license.txt",
    "LOG.md": "log.md",
    "benchmarks/README.md": "benchmarks/index.md",
    "benchmarks/results/*.md": "benchmarks/results",
    "benchmarks/studies/*": "benchmarks/studies",
    "docs/*.md": "",
    "docs/*.css": "",
    "docs/*.js": "",
    "docs/images/*": "images",
    "examples/*.ipynb": "examples",
    "examples/own_method/*": "examples/own_method",
    "tests/messages.txt": "messages.md",  # which `write_messages` makes of it
}
"""Files of the repository, and where on the site they are; patterns name a folder there."""

LINK = re.compile(r"(\]\()([^)\s#:]+)(?=[#)])")

SPAN = re.compile(r"`[^`\n]*`")
CODE = re.compile(r"<code>.*?</code>", re.DOTALL)
FLAG = re.compile(r"(?<=[>\s])(--?[a-z][\w-]*)")


def homes() -> dict[Path, Path]:
    """Return the place on the site of every file that is on it."""
    found = {}
    for pattern, home in HOMES.items():
        for file in sorted(ROOT.glob(pattern)):
            if file.is_file():
                found[file] = Path(home, file.name) if "*" in pattern else Path(home)
    return found


def gather(pages: Path) -> None:
    """Write every page of the site into a folder, its links led to where files are there."""
    places = homes()
    for file, place in places.items():
        (pages / place).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".md":
            shutil.copyfile(file, pages / place)
            continue

        def move(link: re.Match[str], file: Path = file, place: Path = place) -> str:
            there = places.get((file.parent / link[2]).resolve())
            moved = os.path.relpath(there, place.parent) if there else link[2]
            return link[1] + moved

        # GitHub wants bars in the code of a table escaped; Python-Markdown would show the escape.
        text = SPAN.sub(lambda code: code[0].replace("\\|", "|"), file.read_text("utf-8"))
        (pages / place).write_text(LINK.sub(move, text), "utf-8")
    (pages / "messages.md").write_text(write_messages(), "utf-8")


def keep_flags_whole(site: Path) -> None:
    """Mark the flags in code, so that no line ends between their hyphens."""
    for path in site.rglob("*.html"):
        marked = CODE.sub(
            lambda code: FLAG.sub(r'<span class="flag">\1</span>', code[0]), path.read_text("utf-8")
        )
        path.write_text(marked, "utf-8")


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element's anchor and addresses."""
        values = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := values.get(key))}
        if href := values.get("href"):
            (self.links if tag == "a" else self.loaded).add(href)
        if src := values.get("src"):
            self.loaded.add(src)


def faults(site: Path) -> list[str]:
    """Return links of a built site that lead nowhere, and what it loads from elsewhere."""
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for address in sorted(page.links | page.loaded):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.loaded and parts.scheme != "data":
                    found.append(f"{path.relative_to(site)} loads {address}")
                continue
            base = site if parts.path.startswith("/") else path.parent
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            lost = anchor and target in pages and anchor not in pages[target].anchors
            if not target.exists() or lost:
                found.append(f"{path.relative_to(site)} links to {address}")
    return found


def main() -> int:
    """Build the site; 1 where a link is broken or anything is loaded from elsewhere."""
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    gather(PAGES)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    built = subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(built.stdout, end="")
    if built.returncode or "griffe: " in built.stdout:  # what is wrong with a docstring
        return 1
    keep_flags_whole(SITE)
    found = faults(SITE)
    print(*found, f"{SITE.relative_to(ROOT)}: {len(found)} broken links", sep="\n")
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
