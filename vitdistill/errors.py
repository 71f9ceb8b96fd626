"""The errors a user can meet: what was wrong and where, and what would set it right.

An error names fields of the recipe (``masking.mask_rate``) and arguments (``output``), never flags
of the command line: ``str(error)`` is for a Python user, and `vitdistill.cli.render` spells flags.
The command line leaves with the error's exit code (BSD ``sysexits`` numbers).
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .messages import printable


@dataclass(frozen=True)
class Set:
    """Give a field of the recipe another value; None: the user knows which."""

    field: str
    value: Any = None


@dataclass(frozen=True)
class Give:
    """Give an argument of the command or function, such as ``output``; None: the user knows."""

    argument: str
    value: Any = None


@dataclass(frozen=True)
class Add:
    """Add a method to the recipe, by its name in the table of methods."""

    method: str


@dataclass(frozen=True)
class Drop:
    """Leave a part of the recipe out: an objective, a teacher, ``selector`` or ``masking``."""

    part: str


Fix = Set | Give | Add | Drop | str
"""A remedy; words where it is none of the four."""


def spell_python(fix: Fix, stage: str = "") -> str:
    """A remedy as a Python user would apply it, in the recipe of ``stage`` if there is one."""
    if isinstance(fix, Set):
        place = f"{stage}.{fix.field}" if stage else fix.field
        return f"set {place}" if fix.value is None else f"set {place}={fix.value}"
    if isinstance(fix, Give):
        return f"give {fix.argument}" if fix.value is None else f"give {fix.argument}={fix.value}"
    if isinstance(fix, Add):
        return f"add {fix.method}"
    return f"leave {fix.part} out" if isinstance(fix, Drop) else fix


class UserError(Exception):
    """Something the user asked for cannot be done; one sentence without a full stop.

    Args:
        what: what was wrong, and where: ``it hides none of the student's 49 patches``.
        fix: what would set it right; of several, any one will do.
        field: the wrong field of the recipe, or argument; empty: the first one that a fix sets.

    ``stage``: the stage of the recipe that the fields belong to; "" for a recipe of one run.
    ``agreed``: every process of the run raises it, and only the first reports it.
    """

    exit_code = 64
    agreed = False
    stage = ""

    def __init__(self, what: str, fix: Fix | tuple[Fix, ...] = (), *, field: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fixes: tuple[Fix, ...] = fix if isinstance(fix, tuple) else (fix,)
        named = (getattr(fix, "field", getattr(fix, "argument", "")) for fix in self.fixes)
        self.field = field or next(filter(None, named), "")

    def sentence(self, spell: Callable[[Fix, str], str] = spell_python) -> str:
        """Return the sentence to show, with remedies spelled by ``spell(fix, stage)``.

        It is escaped for a terminal, since names of files and classes may hold anything.
        """
        where = f"in the stage {self.stage!r}, " if self.stage else ""
        fixes = ", or ".join(spell(fix, self.stage) for fix in self.fixes)
        return printable(f"{where}{self.what}: {fixes}" if fixes else f"{where}{self.what}")

    def __str__(self) -> str:
        return self.sentence()


Spell = Callable[[UserError], str]
"""Makes the sentence of an error: ``str``, or one that spells its remedies as flags."""
Say = Callable[[str | UserError], None]
"""Tells the user a line: text, or an error that is not raised, as a warning."""


def tell(line: str | UserError, spell: Spell = str) -> str:
    """Return the text of a line for a `Say`."""
    return line if isinstance(line, str) else f"warning: {spell(line)}"


@contextmanager
def fields_below(path: str, names: Collection[str]) -> Iterator[None]:
    """Make errors name fields from the root of the recipe, not from ``path``.

    A method knows only its own fields, ``names``.
    """

    def named(field: str) -> str:
        return f"{path}.{field}" if field.partition(".")[0] in names else field

    try:
        yield
    except UserError as error:
        error.field = named(error.field)
        error.fixes = tuple(
            Set(named(fix.field), fix.value) if isinstance(fix, Set) else fix for fix in error.fixes
        )
        raise


class DataError(UserError):
    """Input data is damaged or does not fit: images, weights, checkpoints, class lists."""

    exit_code = 65


class MissingSplit(DataError):
    """A data set has no such split at all, as opposed to a damaged one."""


class NonFiniteError(UserError):
    exit_code = 70  # a loss, a gradient or a teacher's answer is NaN or infinite


class OutOfMemory(UserError):
    exit_code = 71  # the memory of the GPU or of the machine is used up


class DiskError(UserError):
    exit_code = 74  # a file could not be written: no room, or an I/O error


class Preempted(UserError):
    exit_code = 75  # the run was asked to stop and saved its state: the same command resumes it


class PermissionDenied(UserError):
    exit_code = 77  # a path may not be read or written


class ConfigError(UserError):
    """A setting is wrong, or cannot take effect together with the others."""

    exit_code = 78
