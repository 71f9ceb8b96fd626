"""Print what this package costs to read: lines, functions, errors, imports.

``python benchmarks/house.py [--path FOLDER]...`` prints a column per folder; default vitdistill/.
"""

import argparse
import ast
import io
import runpy
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LAYERS = Path(__file__).resolve().parents[1] / "tests" / "test_layers.py"
ROOMS: tuple[str, ...] = runpy.run_path(str(LAYERS))["ROOMS"]
Function = ast.FunctionDef | ast.AsyncFunctionDef
SKIPPED = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class File:
    name: str
    is_package: bool
    text: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def comments(self) -> int:
        """Return the number of lines that are a comment and nothing else."""
        return sum(line.lstrip().startswith("#") for line in self.lines)

    def code_lines(self) -> int:
        """Return the number of lines with code: no blank line, comment or docstring."""
        code: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in SKIPPED and token.type != tokenize.COMMENT:
                code |= set(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                assert node.end_lineno is not None
                code -= set(range(node.lineno, node.end_lineno + 1))
        return len(code)


def read(root: Path) -> list[File]:
    """Return every Python file below a folder, by its dotted name within the package."""
    found = []
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        parts = path.relative_to(root).with_suffix("").parts
        package = parts[-1] == "__init__"
        found.append(File(".".join(parts[: len(parts) - package]), package, text, ast.parse(text)))
    return found


def imports(file: File, package: str, names: set[str]) -> set[str]:
    """Return the files of its own package that a file imports, at the top or in a function."""
    here = [package, *filter(None, file.name.split("."))]
    found = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + file.is_package] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {
                part if part.removeprefix(f"{package}.") in names else base
                for part in (f"{base}.{alias.name}" for alias in node.names)
            }
    found = {name.removeprefix(f"{package}.") for name in found if name.startswith(f"{package}.")}
    return (found & names) - {file.name}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of files that all reach each other."""
    reached = {name: set(others) for name, others in graph.items()}
    for middle in reached:  # Warshall
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    groups = {
        frozenset(other for other in others if name in reached[other])
        for name, others in reached.items()
        if name in others
    }
    return [set(group) for group in groups]


def length(function: Function) -> int:
    """Return the lines of a function but for its decorators and its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def arguments(function: Function) -> int:
    found = function.args
    named = [*found.posonlyargs, *found.args, *found.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def measure(root: Path) -> dict[str, str]:
    """Return the table's column of one package."""
    files = read(root)
    kinds = Counter(type(node).__name__ for file in files for node in ast.walk(file.tree))
    lengths = sorted(length(f) for file in files for f in file.functions())
    counts = [arguments(f) for file in files for f in file.functions()]
    lines = [line for file in files for line in file.lines]
    code = sum(file.code_lines() for file in files)
    graph = {file.name: set[str]() for file in files}
    graph |= {file.name: imports(file, root.name, graph.keys() - {""}) for file in files}
    knots = circles(graph)
    order = {room: i for i, room in enumerate(ROOMS)}
    place = {name: order.get(name.partition(".")[0]) for name in graph}
    back = sum(
        a is not None and b is not None and a < b
        for name, others in graph.items()
        for a, b in ((place[name], place[other]) for other in others)
    )
    ordered = all(place[name] is not None for name in graph if name)
    p90 = lengths[int(0.9 * len(lengths))]
    widths = [len(line) for line in lines]
    return {
        "files": f"{len(files)}",
        "lines": f"{len(lines):,}",
        "code lines": f"{code:,}",
        "comment lines": f"{sum(f.comments() for f in files) / len(lines):.1%}",
        "characters per line, longest": f"{statistics.mean(widths):.0f}, {max(widths)}",
        "functions": f"{len(lengths):,}",
        "function median / p90 / max": f"{statistics.median(lengths):.0f} / {p90} / {lengths[-1]}",
        "functions over 50 lines": f"{sum(n > 50 for n in lengths)}",
        "functions with over 8 arguments": f"{sum(n > 8 for n in counts)}",
        "files over 400 lines": f"{sum(len(file.lines) > 400 for file in files)}",
        "raise": f"{kinds['Raise']}",
        "raise per 100 code lines": f"{100 * kinds['Raise'] / code:.1f}",
        "except per 100 functions": f"{100 * kinds['ExceptHandler'] / len(lengths):.1f}",
        "circles (files in them)": f"{len(knots)} ({sum(map(len, knots))})",
        "imports to a room on the right": str(back) if ordered else "other rooms",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parents[1] / "vitdistill"
    parser.add_argument("--path", type=Path, action="append", help=f"default: {default}")
    paths = [path.resolve() for path in parser.parse_args().path or [default]]
    columns = [measure(path) for path in paths]
    for key in columns[0]:
        print(f"{key:32}" + "".join(f"{column[key]:>18}" for column in columns))


if __name__ == "__main__":
    main()
