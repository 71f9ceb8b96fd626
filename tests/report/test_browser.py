"""The page in a browser: from disk, without network, by keyboard, for everybody."""

import json
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.report.browser import CHROMIUM, Browser, open_browser
from tests.report.made import HOSTILE, make_hostile_runs
from vitdistill.report.page import make_report
from vitdistill.report.write import write_html

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("home")
    make_hostile_runs(root / "runs")
    file = root / "report <b> #1.html"
    file.write_text(write_html(make_report([root / "runs"])))
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_from_disk_and_asks_for_nothing(browser: Browser, page: Path, width: int) -> None:
    browser.show(page, width=width)
    asked = [event["request"]["url"] for event in browser.reported("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    for kind in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
        assert not browser.reported(kind)
    shown = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    assert browser.run(f"document.images.length > 0 && {shown}")
    assert browser.run("document.documentElement.scrollWidth") <= width, "tables scroll, not it"


def test_hostile_names_are_shown_as_text_and_do_nothing(browser: Browser, page: Path) -> None:
    browser.show(page)
    shown = browser.run("document.body.textContent")
    assert len(HOSTILE) > 20 and all(
        name in shown or name.replace("/", "\u2215") in shown for name in HOSTILE
    )
    assert browser.run("document.querySelectorAll('script, base, iframe, b, style').length") == 1
    assert browser.run("document.title") == browser.run("document.querySelector('h1').textContent")
    assert not browser.reported("Page.javascriptDialogOpening")


def test_everything_can_be_reached_and_moved_by_keyboard(browser: Browser, page: Path) -> None:
    browser.show(page, width=390)
    focused = "document.activeElement"
    # What a user comes to by Tab, and whether its focus is to be seen.
    about = f"""(() => {{
        const style = getComputedStyle({focused});
        const seen = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
        const all = [...document.querySelectorAll('a[href], [tabindex="0"], summary')];
        return [all.indexOf({focused}), seen, all.length];
    }})()"""
    reached = []
    while True:
        browser.press("Tab")
        number, seen, count = browser.run(about)
        if number < 0 or len(reached) > count:
            break
        assert seen
        reached.append(number)
    assert reached == [*range(count)] and count > 4

    browser.show(page, width=390)
    browser.press("Tab")
    browser.press("Enter")
    assert browser.run("location.hash") == "#part-1"
    while not browser.run(f"{focused}.scrollWidth > {focused}.clientWidth"):
        browser.press("Tab")
    for _ in range(3):
        browser.press("ArrowRight")
    assert browser.run(f"{focused}.scrollLeft") > 0


@pytest.mark.skipif(not find_spec("axe_core_python"), reason="axe-core-python is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_an_accessibility_engine_finds_nothing(
    browser: Browser, page: Path, scheme: str, width: int
) -> None:
    browser.show(page, width=width, scheme=scheme)
    browser.run((files("axe_core_python") / "axe.min.js").read_text() + ";0")
    found = json.loads(browser.run("axe.run().then(JSON.stringify)"))
    assert len(found["passes"]) > 15
    told = [(v["id"], [node["html"][:90] for node in v["nodes"][:3]]) for v in found["violations"]]
    assert not told
    doubts = {item["id"] for item in found["incomplete"]}
    assert doubts <= {"color-contrast"}, "what the engine cannot tell is tested by hand"
