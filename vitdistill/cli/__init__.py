"""The command line: ``vitdistill demo | train | label | eval | explain | export | recipes``.

Words are read before a command is imported: help and mistyped flags do not wait for torch or timm.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from ..errors import PermissionDenied, UserError
from ..messages import printable, suggest
from ..recipes import FAMILIES
from .arguments import (
    CheckArguments,
    DemoArguments,
    EvalArguments,
    ExplainArguments,
    ExportArguments,
    LabelArguments,
    LabelExportArguments,
    MergeArguments,
    NoArguments,
    PruneArguments,
    RecipeArguments,
    StoreArguments,
    TrainArguments,
    groups_of,
)
from .flags import asks_help, format_help, parse_words, wrap
from .render import render


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        run: the function that is called with the arguments, as ``file:function``.
        arguments: what it takes.
        about: a line for the overview.
        description: a paragraph for its own help; empty: the same.
    """

    run: str
    arguments: type
    about: str
    description: str = ""


COMMANDS = {
    "demo": Command(
        "demo:run",
        DemoArguments,
        "the whole job in two minutes on a laptop: teacher, student, table, picture",
        "The whole job on scikit-learn's 1,797 handwritten digits: train a ViT teacher on the spot,"
        " then a small ViT alone, by plain distillation, and by MaskedKD; ends with a table and a"
        " picture of the patches the teacher saw.",
    ),
    "train": Command(
        "train:run",
        TrainArguments,
        "train a student, alone or from a teacher; the same command resumes a run",
        "Train a student, alone or from a teacher. The same command resumes a stopped run.",
    ),
    "label": Command(
        "label:write",
        LabelArguments,
        "store a teacher's answers once, so that training needs no teacher",
        "Run a recipe's teachers once, over the very views its student will see, and store what"
        " they say. Training with --labels then needs no teacher. The same command goes on where it"
        " was stopped, in any number of processes at once.\nWith labels that exist: vitdistill"
        " label status | info | verify | check | merge | prune | export",
    ),
    "explain": Command(
        "explain:run",
        ExplainArguments,
        "what a run will compute and cost, before it runs",
        "What a run will compute and cost, before it runs. No weights are read and nothing is"
        " written.",
    ),
    "eval": Command(
        "evaluate:run",
        EvalArguments,
        "accuracy, calibration, agreement with a teacher, FLOPs and speed of a model",
        "Top-1 and top-5 accuracy, calibration error, agreement with a teacher, parameters, FLOPs"
        " and speed of a model; k-NN and a linear probe of its features, also where it has no"
        " classifier.",
    ),
    "export": Command(
        "export:run",
        ExportArguments,
        "a run's student as a folder timm loads, or as ONNX",
        "Write a run's student as a folder that timm loads with the same answers,"
        " timm.create_model('local-dir:FOLDER', pretrained=True), or as an ONNX file checked"
        " against torch. There is no teacher and no adapter in it.",
    ),
    "recipes": Command("recipe:show_recipes", NoArguments, "the named recipes, a line each"),
    "label status": Command("label:status", StoreArguments, "How far labels are written."),
    "label info": Command("label:info", StoreArguments, "What labels are of."),
    "label verify": Command(
        "label:verify", StoreArguments, "Read every record and compare it with its checksum."
    ),
    "label check": Command(
        "label:check", CheckArguments, "Run the teachers again on some images and compare."
    ),
    "label merge": Command(
        "label:merge_stores", MergeArguments, "Unite labels of one teacher that were written apart."
    ),
    "label prune": Command(
        "label:prune_store",
        PruneArguments,
        "Write a smaller copy: fewer views, fewer classes an image.",
    ),
    "label export": Command(
        "label:export",
        LabelExportArguments,
        "Write labels as one Parquet file: sample_id, view, pixels and logits; of topk class_ids,"
        " values (z - max z) and tail_T (the log of the weight of all other classes at temperature"
        " T) in place of logits.",
    ),
}
"""The table of commands; two words where the first is a command too."""


def usage() -> str:
    """Return the overview that ``vitdistill --help`` prints."""
    lines = [f"  {name:<9}{command.about}" for name, command in COMMANDS.items() if " " not in name]
    return "\n".join(
        [
            "vitdistill turns a big Vision Transformer into a small, fast one for little compute.",
            "",
            "usage: vitdistill COMMAND [arguments]       (vitdistill COMMAND --help for each)",
            "",
            *lines,
            "",
            "From photos/{train,val}/CLASS/*.jpg and a teacher to a student that sees half of it:",
            "  vitdistill train maskedkd --data-dir photos --model deit_tiny_patch16_224 \\",
            "    --teacher-model runs/teacher/best",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or that of the error, whose sentence goes to
    stderr.

    Under torchrun, an error that all processes agreed on is said by the first of them, any other by
    the process that met it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from .. import __version__

        print(f"vitdistill {__version__}")
        return 0
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    prog = f"vitdistill {name}" if name in COMMANDS else "vitdistill"
    try:
        return _run(name, words[1 + name.count(" ") :], prog)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.agreed:
            which = "" if rank == "0" else f" (process {rank})"
            command = COMMANDS.get(name, COMMANDS["recipes"])
            print(f"{prog}{which}: {render(error, command.arguments)}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"{prog}: no permission for {printable(str(error.filename))}", file=sys.stderr)
        return PermissionDenied.exit_code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


def _run(name: str, words: Sequence[str], prog: str) -> int:
    if name not in COMMANDS:
        known = [known for known in COMMANDS if " " not in known]
        raise UserError(f"there is no command {printable(name)!r}", suggest(name, known))
    if name == "label" and len(words) > 1 and not any(w.startswith("-") for w in words[:2]):
        verbs = [verb.removeprefix("label ") for verb in COMMANDS if verb.startswith("label ")]
        hint = suggest(
            words[0], verbs, f"choose from {', '.join(verbs)}, or give a recipe and flags"
        )
        raise UserError(f"there is no 'vitdistill label {printable(words[0])}'", hint)
    command = COMMANDS[name]
    if asks_help(words):
        print(_help(command, words, prog))
        return 0
    arguments = read_arguments(name, words)
    run: Callable[[Any], int] = _load(command.run)
    return run(arguments)


def read_arguments(name: str, words: Sequence[str]) -> Any:
    """Return the arguments of the command ``name`` that the words spell; raises `UserError` for a
    wrong flag.
    """
    arguments = COMMANDS[name].arguments
    return _fill(arguments, parse_words(groups_of(arguments), words, f"vitdistill {name}"))


def _load(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(import_module(f".{module}", __package__), function)


def _fill(arguments: type, given: dict[str, Any]) -> Any:
    """Return the arguments of a command with the given values; those of paths are settings."""
    names = {field.name for field in fields(arguments)}
    own = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if name in names
    }
    settings = {path: value for path, value in given.items() if path not in names}
    return arguments(**own, **({"settings": settings} if settings else {}))


def _help(command: Command, words: Sequence[str], prog: str) -> str:
    """Return the help of a command; a recipe named beside ``--help`` shows its defaults."""
    groups, about = groups_of(command.arguments), wrap(command.description or command.about)
    defaults: dict[str, Any] = {field.name: field.default for field in fields(command.arguments)}
    if issubclass(command.arguments, RecipeArguments):
        rest = [word for word in words if word not in ("-h", "--help")]
        try:
            given = parse_words(groups, rest, prog)
        except UserError:  # the help answers it
            given = {}
        about += "\n\n" + _families()
        if given:
            text, values = _load("recipe:describe")(_fill(command.arguments, given))
            about, defaults = f"{about}\n\n{wrap(text)}", {**defaults, **values}
        else:
            about += "\n" + wrap(f"'{prog} RECIPE --help' shows the defaults of a recipe.")
    return format_help(groups, prog, about, defaults)


def _families() -> str:
    lines = ["recipes ('vitdistill recipes' lists all with a line each):"]
    for family in FAMILIES:
        names = ", ".join(family.names[:3]) + (", ..." if len(family.names) > 3 else "")
        lines.append(wrap(f"  {family.about}: {names}", "    "))
        lines += [f"    (and NAME:{variant})" for variant in family.variants]
    return "\n".join(lines)
