"""What an error says, with remedies spelled as flags."""

import re
import shlex
from functools import partial
from typing import Any

from ..errors import Add, Drop, Fix, Give, Set, UserError, spell_python
from ..messages import printable
from ..recipes.settings import EVERY_STAGE
from .arguments import StudyArguments, recipe_flags
from .flags import Flag, flags_of

_FIELD = re.compile(r"(?<![\w./-])(?<!--set )[a-z_]+(?:\.[a-z_]+)*(?![\w./-])")


def render(error: UserError, arguments: type) -> str:
    """Return the sentence of an error for the user of the command that takes ``arguments``, fit for
    a terminal.
    """
    flags = [*flags_of(arguments)]
    own = {flag.option.field or flag.dest: flag for flag in flags}
    of_study = arguments is StudyArguments
    known = own if of_study else {**recipe_flags(), **own}
    sentence = error.sentence(partial(_spell_row if of_study else _spell, known=known))
    # A folder may have the name of an argument ("labels holds ..."), but not that of a field.
    if error.field in known and sentence.startswith(f"{error.field} is "):
        sentence = known[error.field].name + sentence.removeprefix(error.field)
    # The command line's own errors say what they mean, and in stages a flag may be for another one.
    if type(error) is not UserError and not error.stage:
        names = {path: flag.name for path, flag in known.items() if "." in path}
        meant = [error.field, *(fix.field for fix in error.fixes if isinstance(fix, Set))]
        # A part of the recipe knows only its own fields: "batch_size 12 does not divide".
        last = {path.rpartition(".")[2]: path for path in meant if path in known}
        names |= {name: known[path].name for name, path in last.items() if "_" in name}
        sentence = _FIELD.sub(lambda word: names.get(word[0], word[0]), sentence)
    return printable(sentence)


def _spell_row(fix: Fix, stage: str, known: dict[str, Flag]) -> str:
    """Spell a remedy as for the ``set`` of a row; that of an argument as a flag."""
    return _spell(fix, stage, known) if isinstance(fix, Give) else spell_python(fix, stage)


def _spell(fix: Fix, stage: str, known: dict[str, Flag]) -> str:
    place = f"{stage}." if stage else ""
    if isinstance(fix, Set):
        return f"give {_spell_field(fix, place, known)}"
    if isinstance(fix, Give):
        value = "" if fix.value is None else f" {_word(fix.value)}"
        return f"give --{fix.argument.replace('_', '-')}{value}"
    if isinstance(fix, Add):
        return f"add --with {place}{fix.method}"
    return f"give --without {place}{fix.part}" if isinstance(fix, Drop) else fix


def _spell_field(fix: Set, place: str, known: dict[str, Flag]) -> str:
    flag = known.get(fix.field)
    if flag is None or (place and fix.field not in EVERY_STAGE):
        inside = next((path for path, own in known.items() if own.name == "--set"), "set")
        field = fix.field.removeprefix(f"{inside}.")
        return f"--set {place}{field}={'VALUE' if fix.value is None else _word(fix.value)}"
    if flag.alone and fix.value in (None, True):
        return flag.name
    value = flag.metavar if fix.value is None else _word(fix.value)
    return f"{value} in place of it" if flag.positional else f"{flag.name} {value}"


def _word(value: Any) -> str:
    word = str(value).lower() if isinstance(value, bool) else str(value)
    return shlex.quote(word)
