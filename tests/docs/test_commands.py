"""Every command of the pages is understood by the program that would run it."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from doc_pages import FENCE, PAGES, ROOT, blocks, inline

from vitdistill import cli
from vitdistill.cli.recipe import resolve_recipe

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
LANGUAGES = {"bash", "python", "yaml", "toml", "text"}
# Methods that a guide writes are as good as one that is there.
STANDS_FOR = {"cosine": "tokens", "logit_mse": "dist"}
PLACEHOLDER = re.compile(r"(^|[ =])(\.\.\.|[A-Z]{3,})($|[ .])|\|")
OF_PYTEST = {"--rewrite", "--hypothesis-profile"}
COMMANDS = {name for name in cli.COMMANDS if name not in ("demo", "recipes")}


def lines(block: str) -> list[str]:
    """Return the commands of a block, its variables put in."""
    values: dict[str, str] = {}
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
            values[f"${assigned[1]}"] = assigned[2]
            continue
        for name, value in values.items():
            line = line.replace(name, value)
        if line and not line.startswith("#"):
            found.append(line)
    return found


def read(words: list[str], page: Path) -> str:
    """Read the words after ``vitdistill`` as it does, its recipe too; return the command."""
    name = " ".join(words[:2]) if " ".join(words[:2]) in cli.COMMANDS else words[0]
    words = [re.sub(r"\b(cosine|logit_mse)\b", lambda m: STANDS_FOR[m[1]], w) for w in words]
    arguments = cli.read_arguments(name, words[1 + name.count(" ") :])
    recipe = getattr(arguments, "recipe", "")
    if recipe.endswith(".yaml"):
        yaml = [block for block in blocks(page, "yaml") if "stages:" in block]
        Path(recipe).write_text(yaml[0])
    if recipe and not recipe.startswith("runs/"):
        resolve_recipe(arguments)
    return name


def check(line: str, page: Path) -> str:
    """Check one line of a shell; return the command of vitdistill it is, or ""."""
    words = shlex.split(line, comments=True)
    program = words[0]
    if "-m" in words:  # torchrun, with or without Slurm's launcher
        assert "torchrun" in words[:2] and words[words.index("-m") + 1] == "vitdistill"
        return read(words[words.index("-m") + 2 :], page)
    if program == "vitdistill":
        return read(words[1:], page)
    if program == "pip":
        assert words[1] == "install"
        for extra in re.findall(r"\[([\w,]+)\]", line):
            assert {*extra.split(",")} <= {*EXTRAS}, line
    elif program == "make":
        assert words[1] in TARGETS, line
    else:
        assert program == "export", f"{page.name}: nobody checks {line!r}"
    return ""


def test_every_command_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = set()
    for page in PAGES:
        for line in (line for block in blocks(page, "bash") for line in lines(block)):
            if "..." not in line:
                said.add(check(line, page))
        for part in inline(page):
            whole = part.startswith("vitdistill ") and part.count(" ") > 2
            if whole and not PLACEHOLDER.search(part):
                said.add(check(part, page))
            if extras := re.search(r"vitdistill\[(\w+)\]", part):
                assert extras[1] in EXTRAS
            if target := re.fullmatch(r"make (\w+)", part):
                assert target[1] in TARGETS, part
    assert said >= COMMANDS, COMMANDS - said


def test_every_script_of_the_shell_can_be_parsed() -> None:
    for page in PAGES:
        for block in blocks(page, "bash"):
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_every_block_says_what_it_is_in() -> None:
    for page in PAGES:
        text = page.read_text()
        assert {kind for kind, _ in FENCE.findall(text)} <= LANGUAGES, page
        # Indented blocks, and lists right after one, are no such on the site.
        assert not re.search(r"^ +```|^```\n- ", text, re.MULTILINE), page


def test_every_flag_is_one_of_the_command_line() -> None:
    """Flags that stand in a sentence, by their names."""
    groups = [cli.given.groups_of(kind) for _, kind in cli.COMMANDS.values()]
    helps = " ".join(cli.format_help(group, "", "") for group in groups)
    known = {*re.findall(r"--[a-z][\w-]*", helps), "--help", "--signal", *OF_PYTEST}
    for page in PAGES:
        for part in inline(page):
            flags = re.findall(r"--[a-z][\w-]*(?!\S*\.\.\.)", part) if part[:2] == "--" else []
            assert {*flags} <= known, f"{page.name}: {part}"
