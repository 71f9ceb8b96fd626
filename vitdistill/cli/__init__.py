"""The command line: ``vitdistill demo | train | label | eval | explain | export``; imports are per
command, so that help is instant.
"""

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from ..errors import PermissionDenied, UserError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": (
        "vitdistill.cli.demo:main",
        "the whole job in two minutes on a laptop: teacher, student, table, picture",
    ),
    "train": (
        "vitdistill.cli.train:main",
        "train a student, alone or from a teacher; the same command resumes a run",
    ),
    "label": (
        "vitdistill.cli.label:main",
        "store a teacher's answers once, so that training needs no teacher",
    ),
    "explain": ("vitdistill.cli.explain:main", "what a run will compute and cost, before it runs"),
    "eval": (
        "vitdistill.cli.evaluate:main",
        "accuracy, calibration, agreement with a teacher, FLOPs and speed of a model",
    ),
    "export": ("vitdistill.cli.export:main", "a run's student as a folder timm loads, or as ONNX"),
}


def usage() -> str:
    """The overview ``vitdistill --help`` prints."""
    lines = [
        "vitdistill turns a big Vision Transformer into a small, fast one for the least compute.",
        "",
        "usage: vitdistill COMMAND [arguments]       (vitdistill COMMAND --help for each)",
        "",
    ]
    lines += [f"  {name:<9}{text}" for name, (_, text) in COMMANDS.items()]
    lines += [
        "",
        (
            "From a folder photos/{train,val}/CLASS/*.jpg and a teacher to a student that sees it"
            " half-priced:"
        ),
        (
            "  vitdistill train maskedkd --data-dir photos --model deit_tiny_patch16_224"
            " --teacher-model runs/teacher/best"
        ),
    ]
    return "\n".join(lines)


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
    if words[0] not in COMMANDS:
        close = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(COMMANDS)}"
        print(f"vitdistill: there is no command {words[0]!r}: {hint}", file=sys.stderr)
        return 64
    from importlib import import_module

    module, _, function = COMMANDS[words[0]][0].partition(":")
    try:
        command: Callable[[list[str]], int] = getattr(import_module(module), function)
        return command(words[1:])
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.agreed:
            which = "" if rank == "0" else f" (process {rank})"
            print(f"vitdistill {words[0]}{which}: {error}", file=sys.stderr)
        return error.exit_code
    except PermissionError as error:
        print(f"vitdistill {words[0]}: no permission for {error.filename}", file=sys.stderr)
        return PermissionDenied.exit_code
    except SystemExit as done:  # tyro's, after the help
        return 0 if done.code in (0, None) else UserError.exit_code
    except KeyboardInterrupt:
        print(f"vitdistill {words[0]}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
