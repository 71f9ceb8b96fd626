"""The page as a browser, a reader of screens and somebody with bad intentions find it."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.made import (
    HOSTILE,
    LARGER,
    alone,
    make_hostile_runs,
    make_run,
    make_stages,
    taught,
)
from vitdistill.recipes.settings import OptimConfig
from vitdistill.report.document import Chart, Charts, Document, Series, Table, Verdicts
from vitdistill.report.page import make_report, show_values
from vitdistill.report.write import FRAME, NUM_COLOURS, plot, write_html, write_markdown

VOID = {"meta", "img", "wbr"}


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
    root = tmp_path_factory.mktemp("home")
    make_hostile_runs(root / "runs")
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
        " caption thead tbody tr th td figure figcaption img svg g path polyline text span strong"
    )
    known += " bdi wbr"
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
    shown = "".join(page.words)
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
    sections = dict(document.sections)
    (scores, *_) = sections["Results"]
    assert isinstance(scores, Table)
    assert list(scores.head) == ["name", "role", "runs"]
    assert [list(row) for row in scores.rows] == [["old", "with a teacher", "0 of 1 finished"]]
    assert not any(isinstance(block, Verdicts) for block in sections["Did it help?"])
    assert "Curves" not in sections and "Pictures" not in sections
    Page(write_html(document))


def test_that_no_student_was_alone_is_said_before_the_verdicts(tmp_path: Path) -> None:
    for name, lr in (("one", 1e-5), ("other", 1e-4)):
        make_run(tmp_path / name, taught(name, optim=OptimConfig(lr=lr)), 0.5)
    words, verdicts, *_ = dict(make_report([tmp_path]).sections)["Did it help?"]
    assert not isinstance(words, Verdicts) and isinstance(verdicts, Verdicts)
    make_run(tmp_path / "alone", alone("alone"), 0.5)
    assert isinstance(dict(make_report([tmp_path]).sections)["Did it help?"][0], Verdicts)


def test_many_recipes_are_answered_by_the_best_the_cheapest_and_one_table(tmp_path: Path) -> None:
    """The teacher's own run is no rival: it is told apart in its table, and in no chart of them."""
    teacher = make_run(tmp_path / "t", alone("big", student=LARGER), 0.9)
    for seed in (0, 1):
        make_run(tmp_path / f"a{seed}", alone("alone", seed), 0.5, right=20)
        for i in range(11):
            recipe = taught(f"kd {i:02d}", seed, optim=OptimConfig(lr=1e-5 * (i + 1)))
            make_run(tmp_path / f"{i}{seed}", recipe, 0.4 + i / 20, learnt_from=teacher)
    document = make_report([tmp_path])
    sections = dict(document.sections)
    said, against, first, _ = sections["Did it help?"]
    assert isinstance(said, Verdicts) and len(said.items) <= 2
    assert isinstance(against, Table) and isinstance(first, Table)
    assert "kd 10" in said.items[0][1][0] and "the best" in said.items[0][1][1]
    assert [row[0] for row in against.rows] == [f"kd {i:02d}" for i in reversed(range(11))]
    results = sections["Results"][0]
    assert isinstance(results, Table)
    assert [*results.rows[-1][:2]] == ["big", "teacher"] and results.rows[0][0] == "kd 10"
    curves = next(block for block in sections["Curves"] if isinstance(block, Charts))
    assert len(curves.names) == 8 and "big" not in curves.names.values()
    assert "big" not in {s.name for s in sections["Accuracy against cost"][0].items[0].series}


def test_ticks_of_epochs_are_whole_and_stand_within_the_picture() -> None:
    chart = Chart("t", "alt", "epoch", "y", [Series("s", 0, [(0.2, 1.0), (3.0, 2.0)])], whole=True)
    assert [*plot(chart).x_ticks.values()] == ["0", "1", "2", "3"]
    text = write_html(Document("t", "a", [("one", [Charts([chart])])]))
    (width,) = re.findall(r'viewBox="0 0 (\d+) 300"', text)
    assert int(width) - FRAME["right"] > 4 * 6, "half of the last label, eight letters"


def draw(*series: Series, log: bool = False) -> str:
    chart = Chart("t", "alt", "x", "y", series, log=log)
    return write_html(Document("t", "a", [("one", [Charts([chart])])]))


def test_a_chart_places_every_point_inside_itself() -> None:
    points = [(10.0**i, 50 + i) for i in range(1, 9)]
    for log in (False, True):
        drawn = draw(*(Series(f"s{i}", i, [], p) for i, p in enumerate(points)), log=log)
        marks = re.findall(r'class="mark[^"]*" transform="translate\(([\d.]+) ([\d.]+)\)', drawn)
        placed = [(float(x), float(y)) for x, y in marks][-len(points) :]
        assert all(52 <= x <= 446 and 12 <= y <= 254 for x, y in placed)
        assert len({*placed}) == len(points)
        assert all(a[0] <= b[0] and a[1] > b[1] for a, b in pairwise(placed)), "more is higher"
    for same in ([(1.0, 2.0), (2.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)]):
        Page(draw(Series("s", 0, same)))


def test_four_times_as_many_series_as_colours_are_told_apart_as_lines_and_as_marks() -> None:
    number = range(4 * NUM_COLOURS)
    lines = draw(*(Series(str(i), i, [(0.0, 0.0), (1.0, i)]) for i in number))
    marks = draw(*(Series(str(i), i, [], (0.0, float(i))) for i in number))
    assert len(set(re.findall(r'class="line ([^"]+)"', lines))) == len(number)
    shapes = re.findall(r'class="mark ([^"]+)"[^>]* d="([^"]+)"><title>', marks)
    assert len(shapes) == len({*shapes}) == len(number)


def test_a_table_of_many_recipes_is_in_parts_that_hold_every_cell() -> None:
    names = [f"r{i}" for i in range(20)]
    rows = [(f"s{i}", *("" if (i + j) % 7 else f"{i},{j}" for j in range(20))) for i in range(9)]
    parts = [*Table("all", ("setting", *names), rows).parts()]
    assert [name for part in parts for name in part.head[1:]] == names
    found = {
        (row[0], name, cell)
        for part in parts
        for row in part.rows
        for name, cell in zip(part.head[1:], row[1:], strict=True)
        if cell
    }
    assert found == {
        (row[0], name, cell)
        for row in rows
        for name, cell in zip(names, row[1:], strict=True)
        if cell
    }
    assert max(len(part.head) for part in parts) <= 9
    assert all(any(row[1:]) for part in parts for row in part.rows)


NUMBERS = st.floats(0.1, 10) | st.integers(0, 3) | st.booleans() | st.sampled_from(["", "1", "no"])


@given(st.lists(NUMBERS, min_size=2, max_size=5), st.sampled_from([1e-3, 1e-7, 1e-12]))
def test_settings_look_different_where_they_differ(values: list[Any], off: float) -> None:
    values += [value * (1 + off) for value in values if isinstance(value, float)]
    shown = show_values(values)
    for one, left in zip(values, shown, strict=True):
        for other, right in zip(values, shown, strict=True):
            if type(one) is type(other):
                assert (one == other) == (left == right)


def test_what_is_said_of_runs_names_them_and_how_each_was_begun(tmp_path: Path) -> None:
    kept = [make_run(tmp_path / f"k{seed}", taught("kept", seed), 0.5, right=20) for seed in (0, 1)]
    make_run(tmp_path / "n", taught("not kept", optim=OptimConfig(lr=1e-5)), 0.5)
    make_stages(tmp_path / "two")
    (kept[1] / "answers.json").unlink()
    for run in kept:
        images = [f"{run.name} has a copy", "one is damaged"]
        about = {"torch": "2.15", "images": images, "command": ["vitdistill", "train", run.name]}
        (run / "environment.json").write_text(json.dumps({"0": about}))
    document = make_report([tmp_path])
    tables = [b for _, blocks in document.sections for b in blocks if isinstance(b, Table)]
    rows = {table.caption.split()[0]: [*map(tuple, table.rows)] for table in tables if table.prose}
    begun = [row[-1] for row in rows["Folders,"]]
    assert [words for words in begun if words] == [f"vitdistill train k{i}" for i in (0, 1)]
    assert ("kept", "one is damaged") in rows["Notes"] and ("kept", "k1 has a copy") in rows[
        "Notes"
    ]
    assert [row[0] for row in rows["Versions"]] == ["torch"]
    written = write_markdown(document)
    assert "Single answers were not kept of 4 of 5 runs" in written
    assert "two (stage pretrain) | one after the other |" in written


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_what_they_are_on(text: str, scheme: str) -> None:
    """WCAG 2.2: 4.5 for text (1.4.3), 3 for lines and marks (1.4.11). Paper is light."""
    palettes = dict(zip(("light", "dark"), re.findall(r":root \{(.*?)\}", text, re.S), strict=True))
    found = palettes[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", found))
    assert {*colours} == {
        *("ink", "soft", "paper", "rule", "shade", "link", "good", "bad", "open"),
        *(f"c{i}" for i in range(NUM_COLOURS)),
    }
    for name in ("ink", "soft", "link", "good", "bad", "open"):
        for ground in ("paper", "shade"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for i in range(NUM_COLOURS):
        assert contrast(colours[f"c{i}"], colours["paper"]) >= 3, i


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * d for d in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_an_empty_section_is_no_section() -> None:
    text = write_html(Document("t", "a", [("one", [["words"]])]))
    assert [g["href"] for g in Page(text).all("a")] == ["#part-1"]
