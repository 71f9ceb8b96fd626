"""Rooms stand in one order, and imports go the same way: docs/design.md."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1] / "vitdistill"
ROOMS = (
    *("messages", "errors", "option", "keyed", "memory", "world", "storage", "vit", "models"),
    *("data", "methods", "labels", "weights", "distill", "recipes", "evaluate", "runs"),
    *("explain", "report", "study", "cli", "__main__"),
)
EXTRAS = {
    *("sklearn", "datasets", "pyarrow", "tensorboard", "onnx", "onnxscript", "onnxruntime"),
    "huggingface_hub",
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")
}
FILES = {name.removesuffix("__init__").removesuffix("."): path for name, path in FILES.items()}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items() if name}
IMPORT = (ast.Import, ast.ImportFrom)


def imported(name: str, node: ast.Import | ast.ImportFrom) -> set[str]:
    """The modules an import names: ours as "room.file", others as their top name and a colon."""
    if isinstance(node, ast.Import):
        return {ours(alias.name) for alias in node.names}
    package = ["vitdistill", *name.split(".")]
    package = package[: len(package) - node.level + (FILES[name].name == "__init__.py")]
    base = ".".join([*(package if node.level else []), *filter(None, [node.module])])
    parts = {ours(f"{base}.{alias.name}") for alias in node.names}
    return {part if part in FILES or ":" in part else ours(base) for part in parts}


def ours(module: str) -> str:
    if module.startswith("torch.utils.tensorboard"):
        return "tensorboard:"
    top, _, rest = module.partition(".")
    return rest if top == "vitdistill" else f"{top}:"


def in_functions(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    found = [n for f in functions for n in ast.walk(f) if isinstance(n, IMPORT)]
    return list(dict.fromkeys(found))


GRAPH = {
    name: {other for n in ast.walk(tree) if isinstance(n, IMPORT) for other in imported(name, n)}
    & FILES.keys() - {name, ""}
    for name, tree in TREES.items()
}


def test_imports_go_to_the_same_room_or_to_its_left() -> None:
    order = {room: i for i, room in enumerate(ROOMS)}
    room = {name: order[name.partition(".")[0]] for name in TREES}
    assert not {f"{a} -> {b}" for a in GRAPH for b in GRAPH[a] if room[a] < room[b]}


def test_no_files_import_each_other() -> None:
    reached = {name: set(others) for name, others in GRAPH.items()}
    for middle in reached:  # Warshall
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    assert not {name for name, others in reached.items() if name in others}


def test_functions_import_extras_only() -> None:
    found = {
        f"{name} imports {other.removesuffix(':')}"
        for name, tree in TREES.items()
        if name
        not in ("cli", "cli.main")  # the table of commands: each is loaded when it is called
        for node in in_functions(tree)
        for other in imported(name, node)
        if not (other.endswith(":") and other[:-1] in EXTRAS)
    }
    assert not found


def declared_flags(tree: ast.Module) -> set[ast.AST]:
    """The flags that declare a field: arguments of ``option``."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {
        part
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id.lower() == "option"
        for part in ast.walk(call)
        if isinstance(part, ast.Constant) and re.fullmatch(r"--[a-z-]+( .+)?", str(part.value))
    }


def test_only_the_command_line_spells_flags() -> None:
    found = {
        name
        for name, tree in TREES.items()
        if not name.startswith("cli")
        for node in set(ast.walk(tree)) - declared_flags(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.search(r"--[a-z]", node.value)
    }
    assert not found
