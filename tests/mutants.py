"""Plant the faults of mutants.txt in a copy of the package, one at a time, and see which the tests
notice.

``python tests/mutants.py [--only WORD] [--dry]``: prints a line a fault. Code is found by its
tokens, in whatever file and line breaks it stands. Where it stands nowhere, write the same fault
in the words of the code as it is now.
"""

import argparse
import functools
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        name: what goes wrong, by room.
        before, old, after: code that stands once in the package; ``old`` may be empty.
        new: what takes the place of ``old``.
        tests: its heading: patterns below tests/ of those that should notice.
    """

    name: str
    before: str
    old: str
    after: str
    new: str
    tests: str


def read_mutants(text: str) -> list[Mutant]:
    found, tests, name = [], "", ""
    for line in text.splitlines():
        if change := re.fullmatch(r"    (.*)«(.*)→(.*)»(.*)", line):
            before, old, new, after = change.groups()
            found.append(Mutant(name, before, old, after, new, tests))
        elif line.startswith("== "):
            tests = line
        elif line:
            name = line
    return found


@dataclass(frozen=True)
class Token:
    text: str
    start: int
    end: int


@functools.cache
def tokens(text: str) -> list[Token]:
    """Return what a text says, whatever its line breaks: no comments, no comma before a bracket."""
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    found: list[Token] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in LAYOUT or not token.string:
                continue
            if token.string in ")]}" and found and found[-1].text == ",":
                found.pop()
            begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
            found.append(Token(token.string, begin, end))
    except (tokenize.TokenError, IndentationError):
        pass  # a part of an expression or of a block: all of it has been given by now
    return found


def places(mutant: Mutant, package: Path) -> Iterator[tuple[Path, int, int]]:
    """Give every place of ``old`` between ``before`` and ``after``."""
    first, middle = len(tokens(mutant.before)), len(tokens(mutant.old))
    wanted = [token.text for token in tokens(mutant.before + mutant.old + mutant.after)]
    for path in sorted(package.rglob("*.py")):
        found = tokens(path.read_text())
        texts = [token.text for token in found]
        for i in range(len(texts) - len(wanted) + 1):
            if texts[i] == wanted[0] and texts[i : i + len(wanted)] == wanted:
                old = found[i + first : i + first + middle]
                at = found[i + first - 1].end if first else found[i].start
                yield path, old[0].start if old else at, old[-1].end if old else at


def noticed_by(mutant: Mutant, tree: Path) -> str:
    """Return the first failing test, or what else the run came to."""
    patterns = mutant.tests.split()[1:]
    files = dict.fromkeys(path for p in patterns for path in sorted((tree / "tests").glob(p)))
    if not files:
        return "NO TESTS"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "--tb=no", *map(str, files)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            return line.partition(" - ")[0]
    return "SURVIVED" if done.returncode == 0 else f"?? {done.stdout[-200:]!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose names hold this word")
    parser.add_argument("--dry", action="store_true", help="only say which are not found")
    options = parser.parse_args()
    mutants = read_mutants((ROOT / "tests" / "mutants.txt").read_text())
    chosen = [mutant for mutant in mutants if options.only in mutant.name]
    noticed = lost = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        skipped = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", ".hypothesis")
        shutil.copytree(ROOT, tree, ignore=skipped)
        for mutant in chosen:
            found = [*places(mutant, tree / "vitdistill")]
            begun, answer = time.monotonic(), f"NOT FOUND, {len(found)} places"
            if len(found) == 1:
                ((path, start, end),) = found
                text = path.read_text()
                path.write_text(text[:start] + mutant.new + text[end:])
                compile(path.read_text(), str(path), "exec")
                answer = "" if options.dry else noticed_by(mutant, tree)
                path.write_text(text)
            lost += len(found) != 1
            noticed += answer.startswith(("FAILED", "ERROR"))
            print(f"{mutant.name}: {answer} ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"{len(chosen)} mutants, {lost} not found, {noticed} noticed")


if __name__ == "__main__":
    main()
