"""The site: its links lead somewhere, its page of messages has a cure for each, and it builds."""

import re
import sys
from pathlib import Path

import pytest
from doc_pages import FENCE, ROOT

sys.path.insert(0, str(ROOT / "docs"))

import build_site
import write_messages

NAVIGATION = re.findall(r'= "([^"]+\.md)"', (ROOT / "zensical.toml").read_text())


def anchor(heading: str) -> str:
    """Return the anchor of a heading, as Python-Markdown makes it."""
    words = re.sub(r"[`*]|\]\([^)]*\)|\[|[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


def test_links_between_the_pages_lead_somewhere(tmp_path: Path) -> None:
    build_site.gather(tmp_path)
    pages = {path: path.read_text() for path in tmp_path.rglob("*.md")}
    anchors = {
        path: {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        for path, text in pages.items()
    }
    for path, text in pages.items():
        for address in re.findall(r"\]\((?!http)([^)\s]+)\)", FENCE.sub("", text)):
            target, _, place = address.partition("#")
            there = (path.parent / target).resolve() if target else path
            assert there.exists(), f"{path.name}: {address}"
            assert not place or place in anchors[there], f"{path.name}: {address}"


def test_links_lead_somewhere_in_a_checkout_too() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"):
        for address in re.findall(r"\]\((?!http)([^)\s#]+)", FENCE.sub("", page.read_text())):
            assert (page.parent / address).exists(), f"{page.name}: {address}"


def test_every_page_is_in_the_navigation(tmp_path: Path) -> None:
    build_site.gather(tmp_path)
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.md")}
    assert {*NAVIGATION} == {page for page in pages if not page.startswith("benchmarks/results")}


def test_every_message_has_a_cure() -> None:
    found = [*write_messages.messages()]
    answers = re.findall(r"^\d+  ", write_messages.MESSAGES.read_text(), re.MULTILINE)
    assert len(found) == len(answers)
    for *_, code, text in found:
        wrong, remedy = write_messages.split_remedy(text)
        assert wrong and (remedy or code in write_messages.KINDS), text
    page = write_messages.write_messages()
    assert page.count("\n:   ") == len(found) and "\n:   <br>" not in page


def test_broken_links_and_what_is_loaded_from_elsewhere_are_found(tmp_path: Path) -> None:
    links = '<a href="b.html#here">1</a><a href="b.html#lost">2</a><img src="no.png">'
    (tmp_path / "a.html").write_text(f'{links}<script src="https://x.y/z.js"></script>')
    (tmp_path / "b.html").write_text('<h1 id="here">b</h1><a href="https://x.y">fine</a>')
    assert build_site.faults(tmp_path) == [
        "a.html links to b.html#lost",
        "a.html loads https://x.y/z.js",
        "a.html links to no.png",
    ]


@pytest.mark.whole
def test_the_site_builds_without_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zensical")
    assert build_site.main() == 0, capsys.readouterr().out
    assert (build_site.SITE / "index.html").exists()
