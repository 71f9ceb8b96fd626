"""A setting is described once, where its field is declared: its flag, its help and its bounds."""

import dataclasses
import math
import operator
import os
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import ConfigError
from .messages import suggest

BOUNDS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


@dataclass(frozen=True)
class Option:
    """How a field is described to people and on the command line.

    Args:
        help: one line, without a full stop.
        flag: its spelling on the command line, other spellings, and what stands for its value in
            the help. A name without dashes is positional; empty: no flag.
        alone: what the flag means without a value.
        field: the recipe's field that the argument of a command stands for.
        at_least, above, at_most, below: bounds of a number.
    """

    help: str
    flag: str = ""
    alone: str = ""
    field: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    @property
    def spellings(self) -> tuple[str, ...]:
        """The flag's name, and its other spellings: those of timm, DeiT and MAE."""
        words = self.flag.split()
        return tuple(word for word in words if word.startswith("-")) or tuple(words)

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        return {name: bound for name in BOUNDS if (bound := getattr(self, name)) is not None}

    def describe_bounds(self) -> str:
        """Return ``at least 0 and below 1``, or nothing."""
        return " and ".join(f"{k.replace('_', ' ')} {bound:g}" for k, bound in self.bounds.items())


def option(default: Any, help: str, flag: str = "", **facts: Any) -> Any:
    """Declare a dataclass field with its `Option`.

    ``default`` may be a function that makes it (``dict``), or `MISSING` for a required argument.
    """
    described = {"option": Option(help, flag, **facts)}
    if default is not MISSING and callable(default):
        return dataclasses.field(default_factory=default, metadata=described)
    return dataclasses.field(default=default, metadata=described)


def options_of(kind: type) -> dict[str, Option]:
    """Return the options of a dataclass by field."""
    return {
        field.name: field.metadata["option"]
        for field in dataclasses.fields(kind)
        if "option" in field.metadata
    }


def check_options(settings: Any, path: str) -> None:
    """Raise `ConfigError` for a field that is out of its bounds or none of its choices.

    ``settings`` is a dataclass that stands at ``path`` of the recipe.
    """
    hints = get_type_hints(type(settings))
    for name, about in options_of(type(settings)).items():
        field = f"{path}.{name}" if path else name
        check_option(getattr(settings, name), hints[name], about, field)


def check_option(value: Any, kind: Any, about: Option, field: str) -> None:
    """Raise `ConfigError` if the value of one field is out of its bounds or none of its choices."""
    args = get_args(kind)
    if get_origin(kind) is Literal and value not in args:
        raise ConfigError(f"{field} is {value!r}", suggest(value, args), field=field)
    if value is None or not about.bounds:
        return
    within = all(BOUNDS[name](value, bound) for name, bound in about.bounds.items())
    if not within or abs(value) == math.inf:
        wanted = about.describe_bounds() + (", or null" if type(None) in args else "")
        raise ConfigError(f"{field} is {value!r}", f"give {wanted}", field=field)


RAW = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What can redraw or reorder a terminal, and undecodable bytes."""
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
"""Words for a bool; in lower case."""
NEEDED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def convert_scalar(value: Any, kind: type, name: str) -> Any:
    """Return ``value`` as a ``kind`` (int, float, bool or str), reading it from text if need be.

    Raises `ConfigError`, with ``name``, if it cannot be one.
    """
    if kind in (int, float):
        number = _number(value)
        if number is not None and (kind is float or number == int(number)):
            return kind(number)
    elif kind is bool and str(value).lower() in TRUTH:
        return TRUTH[str(value).lower()]
    elif kind is str and isinstance(value, str):
        return _read_text(value, name)
    elif isinstance(value, kind):
        return value
    raise refusal(value, f"{NEEDED.get(kind, kind.__name__)} is needed", name)


def _read_text(text: str, name: str) -> str:
    """Return ``text`` with ``~`` expanded where a path begins, also in an option's value."""
    if RAW.search(text):
        raise refusal(text, "text without control characters is needed", name)
    return re.sub(r"(?<![^=])~[^/=]*(?=/)", lambda home: os.path.expanduser(home[0]), text)


def _number(value: Any) -> int | float | None:
    """Return ``value`` as a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    for read in (int, float):  # a whole number may have more digits than a float
        try:
            number = read(value) if isinstance(value, str) else value
            return number if math.isfinite(number) else None
        except (ValueError, OverflowError):
            continue
    return None


class UnknownField(ConfigError):
    """A field that a recipe does not have."""


def unknown_field(path: str, known: Iterable[str]) -> UnknownField:
    """Return the error for an unknown field at a dotted path, suggesting a ``known`` one."""
    known, (parent, _, name) = list(known), path.rpartition(".")
    fix = suggest(name, known)
    if "model_args" in known:
        of_network = f"if the network takes it, write {parent}.model_args.{name}"
        fix = suggest(name, known, of_network, closeness=0.75)
    return UnknownField(f"the recipe has no field {path!r}", fix, field=path)


def refusal(value: Any, wanted: str, name: str) -> ConfigError:
    """Return the error of a value that is not ``wanted``."""
    text = repr(value)
    shown = text if len(text) <= 80 else text[:77] + "..."
    return ConfigError(f"{name or 'it'} is {shown}", wanted, field=name)
