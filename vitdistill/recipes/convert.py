"""Recipes to and from plain data: dicts, lists, text, numbers, booleans, None."""

import dataclasses
import json
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import Add, ConfigError, Set, fields_below
from ..messages import suggest
from ..methods import METHODS, method_class, method_name
from ..methods.base import Masking, Objective, TokenSelector
from ..option import UnknownField, convert_scalar, refusal, unknown_field
from .config import Recipe

T = TypeVar("T")

METHOD_KINDS: dict[type, str] = {
    Objective: "an objective",
    TokenSelector: "a patch selector",
    Masking: "a masking",
}
NULL_METHODS = {"selector": "maskedkd", "masking": "random_masking"}
"""What to add where a recipe lacks one of these."""


def to_dict(value: Any) -> Any:
    """Return a recipe, or any part of it, as plain data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = {}
        if isinstance(value, Objective | TokenSelector | Masking):
            name = {"method": method_name(value)}
        parts = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {**name, **parts}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return value


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return every leaf of the recipe by its dotted path."""
    flat: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if not (isinstance(node, dict) and node):
            flat[path] = node
            return
        for key, item in node.items():
            walk(item, _join(path, key))

    walk(to_dict(recipe), "")
    return flat


def from_dict(data: Any, source: str = "") -> Recipe:
    """Return the recipe that plain data describes; raises `ConfigError`, naming ``source``."""
    with in_file(source):
        recipe: Recipe = convert(data, Recipe)
        return recipe


@contextmanager
def in_file(source: str) -> Iterator[None]:
    """Prefix errors raised inside with the file that is wrong."""
    try:
        yield
    except ConfigError as error:
        error.what = f"{source}: {error.what}" if source else error.what
        raise


def convert(value: Any, kind: Any, path: str = "") -> Any:
    """Return ``value`` as a ``kind``: a scalar, dataclass, method, union, Literal, dict or tuple.

    Raises `ConfigError`, naming ``path``, if it is none.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, path)
    if origin is Literal:
        if value not in args:
            raise refusal(value, suggest(value, args), path)
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise refusal(value, "a mapping is needed", path)
        return {str(key): convert(v, args[1], _join(path, key)) for key, v in value.items()}
    if origin is tuple:
        return _convert_tuple(value, args, path)
    if kind in METHOD_KINDS:
        return _convert_method(value, kind, path)
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return _convert_dataclass(value, kind, path)
    if kind is not Any:
        return convert_scalar(value, kind, path)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise refusal(value, "plain data is needed, such as text or a number", path) from None
    return value


def _convert_union(value: Any, options: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    for option in options[:-1]:
        with suppress(ConfigError):
            return convert(value, option, path)
    return convert(value, options[-1], path)


def _convert_tuple(value: Any, args: tuple[Any, ...], path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise refusal(value, "a list is needed, e.g. [0, 1]", path)
    if args[-1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(value) != len(args):
        raise refusal(value, f"a list of {len(args)} numbers is needed", path)
    items = enumerate(zip(value, args, strict=True))
    return tuple(convert(item, arg, f"{path}[{i}]") for i, (item, arg) in items)


def _convert_dataclass(value: Any, kind: type, path: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise refusal(value, "a mapping is needed", path)
    hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise unknown_field(_join(path, str(key)), fields)
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise refusal(dict(value), f"it lacks {name!r}", _join(path, name))
    parts = {key: convert(v, hints[key], _join(path, key)) for key, v in value.items()}
    return kind(**parts)


def _convert_method(value: Any, kind: type, path: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping) or "method" not in value:
        wanted = "give a mapping with the key 'method', e.g. {method: kd, weight: 0.5}"
        if isinstance(value, str) and value in METHODS:
            raise ConfigError(f"{path} is {value!r}", (Add(value), wanted), field=path)
        raise refusal(value, wanted, path)
    cls = method_class(str(value["method"]))
    if not issubclass(cls, kind):
        raise refusal(value["method"], f"it is not {METHOD_KINDS[kind]}", path)
    rest = {key: item for key, item in value.items() if key != "method"}
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    with fields_below(path, names):
        return _convert_dataclass(rest, cls, path)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


# --- replacing fields ----------------------------------------------------------------------------


def replace_fields(settings: T, values: Mapping[str, Any]) -> T:
    """Return a recipe, or other settings, with the fields at dotted paths (``optim.lr``) replaced,
    all at once; for an unknown field, `ConfigError` says where one of that name is.
    """
    try:
        return _replace_fields(settings, values)
    except UnknownField as error:
        wrong = next((p for p in values if f"{p}.".startswith(f"{error.field}.")), "")
        places = find_places(settings, wrong) if wrong else []
        error.fixes = tuple(Set(place, values[wrong]) for place in places) or error.fixes
        raise


def find_places(settings: Any, path: str) -> list[str]:
    """Return the paths that end in ``path`` (``kd.weight``), or else in its last name: below its
    first name, if there are any.
    """
    found: list[str] = []

    def walk(node: Any, place: str) -> None:
        for key, item in node.items() if isinstance(node, dict) else ():
            found.append(_join(place, key))
            walk(item, found[-1])

    walk(to_dict(settings), "")
    last = [place for place in found if f".{place}".endswith(f".{path.rpartition('.')[2]}")]
    whole = [place for place in last if f".{place}".endswith(f".{path}")]
    below = [place for place in last if place.startswith(f"{path.partition('.')[0]}.")]
    return whole or below or last


def _replace_fields(settings: T, values: Mapping[str, Any]) -> T:
    data = to_dict(settings)
    for path, value in values.items():
        node, walked, (*parents, last) = data, "", path.split(".")
        for name in parents:
            walked = _join(walked, name)
            if not isinstance(node, dict) or name not in node:
                raise unknown_field(walked, node if isinstance(node, dict) else ())
            node = node[name]
            if node is None:
                fix = Add(NULL_METHODS[walked]) if walked in NULL_METHODS else Set(walked)
                raise ConfigError(f"{walked} is null", fix, field=walked)
        if not isinstance(node, dict):
            raise unknown_field(path, ())
        node[last] = to_dict(value)
    replaced: T = convert(data, type(settings))
    return replaced
