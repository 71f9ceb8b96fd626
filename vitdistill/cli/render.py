"""What an error says, with remedies spelled as flags."""

from typing import Any

from ..errors import Add, Drop, Fix, Give, Set, UserError
from ..messages import printable
from ..option import options_of
from .arguments import recipe_flags
from .flags import Flag, flags_of


def render(error: UserError, arguments: type) -> str:
    """Return the sentence of an error for the user of the command that takes ``arguments``, fit for
    a terminal.
    """
    known = {**recipe_flags(), **_own_flags(arguments)}
    return printable(error.sentence(lambda fix, stage: _spell(fix, stage, known)))


def _own_flags(arguments: type) -> dict[str, Flag]:
    """Return the flags of a command that stand for a field of the recipe of another one."""
    described = options_of(arguments)
    return {f.option.field: f for f in flags_of(arguments) if described[f.dest].field}


def _spell(fix: Fix, stage: str, known: dict[str, Flag]) -> str:
    if isinstance(fix, Set):
        return _spell_field(fix, stage, known)
    if isinstance(fix, Give):
        name = f"--{fix.argument.replace('_', '-')}"
        return f"give {name}" if fix.value is None else f"give {name} {_word(fix.value)}"
    place = f"{stage}." if stage else ""
    if isinstance(fix, Add):
        return f"add --with {place}{fix.method}"
    return f"give --without {place}{fix.part}" if isinstance(fix, Drop) else fix


def _spell_field(fix: Set, stage: str, known: dict[str, Flag]) -> str:
    flag = known.get(fix.field)
    if flag is None or (stage and flag.option.stages != "every"):
        place = f"{stage}.{fix.field}" if stage else fix.field
        return f"give --set {place}={'VALUE' if fix.value is None else _quoted(fix.value)}"
    if flag.alone and fix.value in (None, True):
        return f"give {flag.name}"
    return f"give {flag.name} {flag.metavar if fix.value is None else _quoted(fix.value)}"


def _word(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def _quoted(value: Any) -> str:
    word = _word(value)
    return f"'{word}'" if set(word) & set(" {}") else word
