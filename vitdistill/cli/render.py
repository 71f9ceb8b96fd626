"""What an error says, with remedies spelled as flags."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import Add, Drop, Fix, Give, Say, Set, UserError, spell_python, tell
from ..recipes.settings import EVERY_STAGE
from .arguments import RecipeArguments, recipe_flags
from .console import say
from .flags import Flag, flags_of

_FIELD = re.compile(r"(?<![\w./-])(?<!--set )[a-z_]+(?:\.[a-z_]+)*(?![\w./-])")


def render(error: UserError, arguments: Any) -> str:
    """Return the sentence of an error for the user of a command, fit for a terminal.

    ``arguments``: what the command was given; or their class, where they could not be read.
    """
    kind = arguments if isinstance(arguments, type) else type(arguments)
    own = {name: flag for flag in flags_of(kind) for name in (flag.option.field, flag.dest) if name}
    known = {**recipe_flags(), **own} if issubclass(kind, RecipeArguments) else own
    sentence = error.sentence(_Spelling(known, _given(arguments, own)).spell)
    # A folder may have the name of an argument ("labels holds ..."), but not that of a field.
    for name in {error.field, error.field.rpartition(".")[2]} if error.field in known else ():
        if sentence.startswith(f"{name} is "):
            sentence = known[error.field].name + sentence.removeprefix(name)
    # The command line's own errors name flags already; in stages a flag may mean another stage.
    if type(error) is not UserError and not error.stage:
        names = {path: flag.name for path, flag in known.items() if "." in path}
        meant = [error.field, *(fix.field for fix in error.fixes if isinstance(fix, Set))]
        # A part of the recipe knows only its own fields: "batch_size 12 does not divide".
        last = {path.rpartition(".")[2]: path for path in meant if path in known}
        names |= {name: known[path].name for name, path in last.items() if "_" in name}
        sentence = _FIELD.sub(lambda word: names.get(word[0], word[0]), sentence)
    return sentence


def teller(arguments: Any) -> Say:
    """Return a function that prints the lines of a command with these arguments."""
    return lambda line: say(tell(line, lambda error: render(error, arguments)))


def _given(arguments: Any, own: Mapping[str, Flag]) -> frozenset[str]:
    """Return the fields and arguments that a command was given; none, if they were not read."""
    if isinstance(arguments, type):
        return frozenset()
    values = {path: getattr(arguments, flag.dest) for path, flag in own.items()}
    assigned = (item.partition("=")[0] for item in values.get("set", ()))
    changed = (path for path, value in values.items() if value != own[path].default)
    return frozenset((*changed, *assigned, *getattr(arguments, "settings", ())))


@dataclass(frozen=True)
class _Spelling:
    """How a command spells remedies: by its flags, which are ``known`` by field or argument.

    For what was ``given`` already, another value is advised.
    """

    known: Mapping[str, Flag]
    given: frozenset[str]

    def spell(self, fix: Fix, stage: str) -> str:
        place, of_recipe = f"{stage}." if stage else "", "with_" in self.known
        if isinstance(fix, Set):
            return self._spell_field(fix, stage, of_recipe)
        if isinstance(fix, Give) and fix.argument in self.known:
            return _spell_flag(self.known[fix.argument], fix.value, fix.argument in self.given)
        if isinstance(fix, Add) and of_recipe:
            return f"add --with {place}{fix.method}"
        if isinstance(fix, Drop) and of_recipe:
            return f"give --without {place}{fix.part}"
        return spell_python(fix, stage)

    def _spell_field(self, fix: Set, stage: str, of_recipe: bool) -> str:
        flag = self.known.get(fix.field)
        if flag is not None and (not stage or fix.field in EVERY_STAGE):
            return _spell_flag(flag, fix.value, fix.field in self.given)
        # Elsewhere --set is for fields below one (eval), or for every row (study).
        below = next((f.option.field for f in self.known.values() if f.name == "--set"), "")
        if not (of_recipe or below):
            return spell_python(fix, stage)
        field = f"{stage}.{fix.field}" if stage else fix.field.removeprefix(f"{below}.")
        if fix.value is None and field in self.given:
            return f"give another --set {field}=VALUE"
        return f"give --set {field}={'VALUE' if fix.value is None else _word(fix.value)}"


def _spell_flag(flag: Flag, value: Any, given: bool) -> str:
    if flag.alone and value in (None, True):
        return f"give {flag.name}"
    if value is None and given and not flag.positional:
        return f"give another {flag.name}"
    word = flag.metavar if value is None else _word(value)
    return f"give {word} in place of it" if flag.positional else f"give {flag.name} {word}"


def _word(value: Any) -> str:
    word = str(value).lower() if isinstance(value, bool) else str(value)
    return shlex.quote(word)
