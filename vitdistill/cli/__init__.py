"""The command line: ``vitdistill demo | train | label | eval | report | ...``.

Words are read before a command is imported: help and mistyped flags do not wait for torch or timm.
"""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

from .. import __version__
from ..errors import DiskError, PermissionDenied, UserError
from ..messages import suggest
from ..recipes import FAMILIES, RECIPES
from . import arguments as given
from .console import lasting_console
from .early import refuse_early
from .flags import format_help, parse_words, wrap
from .render import render

COMMANDS: dict[str, tuple[str, type]] = {
    "demo": ("demo:run", given.DemoArguments),
    "train": ("train:run", given.TrainArguments),
    "label": ("label:write", given.LabelArguments),
    "explain": ("explain:run", given.ExplainArguments),
    "eval": ("evaluate:run", given.EvalArguments),
    "show": ("show:run", given.ShowArguments),
    "study": ("study:run", given.StudyArguments),
    "report": ("report:run", given.ReportArguments),
    "export": ("export:run", given.ExportArguments),
    "recipes": ("recipes:run", given.RecipesArguments),
    "label status": ("label:status", given.StoreArguments),
    "label info": ("label:info", given.StoreArguments),
    "label verify": ("label:verify", given.StoreArguments),
    "label check": ("label:check", given.CheckArguments),
    "label merge": ("label:merge_stores", given.MergeArguments),
    "label prune": ("label:prune_store", given.PruneArguments),
    "label export": ("label:export", given.LabelExportArguments),
}
"""The function each command calls, as ``file:function``, and what it takes; two words where the
first is a command too.
"""


USAGE = """vitdistill makes big Vision Transformers small and fast for little compute.

usage: vitdistill COMMAND [arguments]       (vitdistill COMMAND --help for each)

{commands}

From photos/{{train,val}}/CLASS/*.jpg and a teacher to a student:
  vitdistill train maskedkd --data-dir photos --model deit_tiny_patch16_224 \\
    --teacher-model runs/teacher"""


def usage() -> str:
    """Return the overview that ``vitdistill --help`` prints."""
    single = {name: kind for name, (_, kind) in COMMANDS.items() if " " not in name}
    lines = [wrap(f"  {name:<9}{_about(kind)[0]}", " " * 11) for name, kind in single.items()]
    return USAGE.format(commands="\n".join(lines))


@lasting_console()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or that of the error, whose sentence goes to
    stderr.

    Under torchrun, an error that all processes agreed on is said by the first of them, any other by
    the process that met it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words in (["-h"], ["--help"], ["help"]):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"vitdistill {__version__}")
        return 0
    if words[0] == "help":
        words = [*words[1:], "--help"]
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    prog = f"vitdistill {name}" if name in COMMANDS else "vitdistill"
    given: Any = COMMANDS.get(name, COMMANDS["recipes"])[1]  # their class, until they are read
    try:
        if name not in COMMANDS:
            raise _no_command(words)
        rest = words[1 + name.count(" ") :]
        if {"-h", "--help"} & {*rest}:
            print(_help(given, prog))
            return 0
        given = read_arguments(name, rest)
        return _run(name, given, prog)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.agreed:
            which = "" if rank == "0" else f" (process {rank})"
            print(f"{prog}{which}: {render(error, given)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        goes_on = ": the same command goes on" if name in ("train", "study", "label") else ""
        print(f"{prog}: interrupted{goes_on}", file=sys.stderr)
        return 130
    except OSError as error:  # what nobody foresaw of files, such as a name that is too long
        print(f"{prog}: {error}", file=sys.stderr)
        return (PermissionDenied if isinstance(error, PermissionError) else DiskError).exit_code


def _no_command(words: Sequence[str]) -> UserError:
    """Return the error of words that begin with no command."""
    known = [known for known in COMMANDS if " " not in known]
    is_recipe = words[0].partition(":")[0] in RECIPES
    fix = f"write vitdistill train {words[0]}" if is_recipe else suggest(words[0], known)
    return UserError(f"there is no command {words[0]!r}", fix)


def _run(name: str, arguments: Any, prog: str) -> int:
    refuse_early(arguments)
    if "torch" not in sys.modules and name != "recipes" and os.environ.get("RANK", "0") == "0":
        # Importing torch and timm takes seconds. Results alone go to the standard output.
        print(f"{prog}: loading PyTorch and timm", file=sys.stderr, flush=True)
    module, _, function = COMMANDS[name][0].partition(":")
    run: Callable[[Any], int] = getattr(import_module(f".{module}", __package__), function)
    return run(arguments)


def read_arguments(name: str, words: Sequence[str]) -> Any:
    """Return the arguments of the command ``name`` that the words spell; raises `UserError` for a
    wrong flag.
    """
    kind = COMMANDS[name][1]
    values = parse_words(given.groups_of(kind), words, f"vitdistill {name}")
    own = {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}
    return kind(**own, **({"settings": values} if values else {}))  # the rest are of the recipe


def _about(kind: type) -> list[str]:
    """Return the paragraphs on a command."""
    return [" ".join(part.split()) for part in (inspect.getdoc(kind) or "").split("\n\n")]


def _help(kind: type, prog: str) -> str:
    about = _about(kind)
    if issubclass(kind, given.RecipeArguments):
        about += _families()
    text = "\n".join(wrap(line, "    " * line.startswith("  ")) for line in about)
    return format_help(given.groups_of(kind), prog, text)


def _families() -> list[str]:
    lines = ["\nRecipes ('vitdistill recipes' lists all with a line each):"]
    for family in FAMILIES:
        names = ", ".join([*family.recipes][:3]) + (", ..." if len(family.recipes) > 3 else "")
        lines.append(f"  {family.about}: {names}")
    return [*lines, "\n'vitdistill explain RECIPE --recipe-yaml' prints all settings of one."]
