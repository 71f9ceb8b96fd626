"""docs/methods.md is what the code says: a reader chooses a method from that page alone."""

import importlib.util
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from vitdistill.cli import main
from vitdistill.methods import METHODS, method_class

DOCS = Path(__file__).parents[2] / "docs"
OUTDATED = "docs/methods.md is not what the code says: run `make docs`"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_methods", DOCS / "write_methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


WRITER = load()
PAGE = WRITER.PAGE.read_text(encoding="utf-8") if WRITER.PAGE.exists() else ""
WRITTEN = re.split(r"\n(?=## )", PAGE)


def test_every_method_says_whose_it_is_and_when_to_use_it() -> None:
    for name in METHODS:
        method = method_class(name)
        assert method.paper and method.use_when, (
            f"{name} lacks paper or use_when (see vitdistill/method.py)"
        )
        assert "\n" not in method.paper + method.use_when and method.use_when.endswith("."), name


@pytest.mark.whole
@pytest.mark.parametrize("i", range(7))
def test_the_page_is_what_the_code_says(i: int) -> None:
    """Section by section, so that no test counts all methods."""
    assert len(WRITER.sections()) == len(WRITTEN) == 7, OUTDATED
    assert WRITER.sections()[i]() == WRITTEN[i], OUTDATED


def test_every_method_stands_in_one_table_and_has_its_paragraph() -> None:
    tables = "".join(WRITTEN[1:6])
    for name in METHODS:
        assert (
            tables.count(f"| [`{name}`](#{name})") == 1 and PAGE.count(f"\n### `{name}`\n") == 1
        ), OUTDATED
    assert tables.count("\n| [`") == len(METHODS), OUTDATED


def test_tables_have_as_many_cells_in_every_row() -> None:
    lines = PAGE.splitlines()
    for above, line in pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", above)) == len(re.findall(r"(?<!\\)\|", line)), line


def test_the_commands_of_the_page_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    commands = [line for line in block.replace("\\\n", "").splitlines() if not line.startswith("#")]
    assert len(commands) == 4
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "vitdistill" and main([*words, "--recipe-yaml"]) == 0, (
            command,
            capsys.readouterr().err,
        )


def test_text_from_docstrings_keeps_its_words_in_markdown() -> None:
    assert (
        WRITER.prose("the ``x`` of a * b\n    and c < d, `e * f`")
        == "the `x` of a \\* b and c \\< d, `e * f`"
    )
    assert WRITER.table([["a", "b|c"], ["1", "2"]]) == "| a | b\\|c |\n|---|---|\n| 1 | 2 |"
