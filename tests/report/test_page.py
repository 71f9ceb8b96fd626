"""The page as a browser, a reader of screens and somebody with bad intentions find it."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from tests.report.made import VIT, alone, make_run, taught
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.recipes.config import StudentConfig
from vitdistill.report.charts import NUM_COLOURS, draw_chart
from vitdistill.report.document import Chart, Document, Section, Series, Table, Verdicts
from vitdistill.report.html import write_html
from vitdistill.report.markdown import write_markdown
from vitdistill.report.page import make_report

HOSTILE = (
    "<script>alert(1)</script>",
    "</style><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "' onmouseover='alert(4)",
    "<svg onload=alert(5)>",
    "</title><h1>own</h1>",
    "<!-- ",
    "--> <b>",
    "&lt;b&gt; &amp; &#60;",
    "javascript:alert(6)",
    "[a](javascript:alert(7))",
    "![a](https://example.org/a.png)",
    "| a | b |",
    "`code` **bold** _it_ ~~no~~ #1 @someone",
    "https://example.org www.example.org",
    "{{ 7 * 7 }} ${7 * 7} %s {0}",
    "<base href=https://example.org>",
    "<meta http-equiv=refresh content=0>",
    "]]> <![CDATA[",
    "\u5b57 \u0645\u0631\u062d\u0628\u0627 \U0001f600 \\",
    "x" * 300,
)
LARGER = StudentConfig(model="vit_tiny_patch16_224", model_args={**VIT, "embed_dim": 16})
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Every element with its attributes, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def all(self, *names: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name in names]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four recipes, one of which has only begun; every name in them is hostile."""
    root = tmp_path_factory.mktemp("home")
    names = [name.replace("/", "\u2215") for name in HOSTILE]
    teacher = make_run(
        root / "runs" / names[0], alone(names[0], description=HOSTILE[1], student=LARGER), 0.9
    )
    for seed in (0, 1, 2):
        make_run(root / "runs" / f"alone{seed}", alone(f"{names[2]}{seed}", seed), 0.5 + seed / 90)
        make_run(
            root / "runs" / f"{names[3]}{seed}",
            taught(names[4], seed, description=HOSTILE[5], selector=MaskedKD(keep_rate=0.5)),
            0.7 + seed / 100,
            learnt_from=teacher,
            right=28,
            classes=(HOSTILE[6], HOSTILE[7]),
            environment={HOSTILE[8]: HOSTILE[9], "command": list(HOSTILE[10:])},
        )
    make_run(root / "runs" / "begun", taught(names[10], teacher=HOSTILE[11]))
    return root


@pytest.fixture(scope="module")
def text(home: Path) -> str:
    return write_html(make_report([home / "runs"]))


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_page_needs_nothing_but_itself(text: str, page: Page) -> None:
    known = "html head meta title style body header h1 p nav ul li a main section h2 h3 div table"
    known += (
        " caption thead tbody tr th td figure figcaption img svg g path polyline polygon circle"
    )
    known += " text span strong bdi"
    assert {name for name, _ in page.elements} <= set(known.split()) and not page.comments
    attributes = {name for _, given in page.elements for name in given}
    assert not {name for name in attributes if name.startswith("on") or name == "style"}
    assert all(given["href"].startswith("#") for given in page.all("a"))
    assert all(given["src"].startswith("data:image/png;base64,") for given in page.all("img"))
    style = re.findall("<style>(.*?)</style>", text, re.S)
    assert len(style) == 1 and not re.search(r"url\(|@import|expression|<", style[0])
    policy = [given for given in page.all("meta") if "http-equiv" in given]
    assert [given["http-equiv"] for given in policy] == ["Content-Security-Policy"]
    assert policy[0]["content"].startswith("default-src 'none';")


def test_every_hostile_name_is_shown_as_text(page: Page) -> None:
    shown = "\n".join(page.words)
    for name in HOSTILE:
        assert name in shown or name.replace("/", "\u2215") in shown, name


def test_a_reader_of_screens_finds_its_way(page: Page) -> None:
    headings = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(headings))
    assert all(given.get("alt", "").strip() for given in page.all("img"))
    charts = [given for given in page.all("svg") if given.get("aria-hidden") != "true"]
    assert charts and all(g["role"] == "img" and len(g["aria-label"]) > 20 for g in charts)
    assert all(given["scope"] in ("col", "row") for given in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len({*ids}) == len(ids)
    assert {given["href"][1:] for given in page.all("a")} <= {*ids}
    assert {g["aria-labelledby"] for _, g in page.elements if "aria-labelledby" in g} <= {*ids}
    assert page.all("html")[0]["lang"] and "viewport" in {g.get("name") for g in page.all("meta")}
    scrolling = [given for given in page.all("div") if given.get("class") == "wide"]
    assert all(given["tabindex"] == "0" and given["aria-label"] for given in scrolling)


def test_markdown_has_no_markup_but_its_own(home: Path) -> None:
    text = write_markdown(make_report([home / "runs"]))
    plain = re.sub(r"\\.", "", text)  # what is escaped is text
    assert not re.search(r"[<>`\[\]!~@]|://|www\.", plain)
    tables = [line for line in plain.splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in tables if line.startswith("|:--")]
    assert widths and {line.count("|") for line in tables} == {*widths}


def test_what_is_not_known_is_left_empty(tmp_path: Path) -> None:
    make_run(tmp_path / "old", taught("old"))
    for name in ("identity.json",):
        (tmp_path / "old" / name).unlink()
    document = make_report([tmp_path / "old"])
    sections = {section.title: section.blocks for section in document.sections}
    (scores, *_) = sections["What each recipe came to"]
    assert isinstance(scores, Table)
    assert list(scores.head) == ["recipe", "runs"]
    assert [list(row) for row in scores.rows] == [["old", "0 of 1 finished"]]
    assert not any(isinstance(block, Verdicts) for block in sections["Did it help?"])
    assert "Curves" not in sections and "Pictures" not in sections
    Page(write_html(document))


def test_a_chart_places_every_point_inside_itself() -> None:
    points = [(10.0**i, 50 + i) for i in range(1, 9)]
    for log in (False, True):
        series = [Series(f"s{i}", i, [p]) for i, p in enumerate(points)]
        drawn = draw_chart(Chart("t", "alt", "x", "y", series, lines=False, log=log))
        circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)
        assert circles and all(52 <= float(x) <= 446 and 12 <= float(y) <= 254 for x, y in circles)
    for same in ([(1.0, 2.0), (2.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)]):
        draw_chart(Chart("t", "alt", "x", "y", [Series("s", 0, same)]))


def test_series_beyond_the_colours_are_told_apart_by_shape() -> None:
    series = [Series(str(i), i, [(0.0, 0.0), (1.0, float(i))]) for i in range(2 * NUM_COLOURS)]
    drawn = draw_chart(Chart("t", "alt", "x", "y", series))
    assert len(set(re.findall(r'class="line ([^"]+)"', drawn))) > NUM_COLOURS


def test_an_empty_section_is_no_section() -> None:
    text = write_html(Document("t", "a", [Section("one", [["words"]])]))
    assert [g["href"] for g in Page(text).all("a")] == ["#part-1"]
