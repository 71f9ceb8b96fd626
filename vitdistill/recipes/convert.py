"""Recipes to and from plain data: dicts, lists, text, numbers, booleans, None."""

import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import Add, ConfigError, Fix, Set
from ..messages import suggest
from ..methods import method_class, method_name
from ..methods.base import Masking, Objective, TokenSelector
from ..option import convert_scalar, refusal
from .config import Recipe

METHOD_KINDS: dict[type, str] = {
    Objective: "an objective",
    TokenSelector: "a patch selector",
    Masking: "a masking",
}


def to_dict(value: Any) -> Any:
    """Return a recipe, or any part of it, as plain data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = {"method": method_name(value)} if isinstance(value, tuple(METHOD_KINDS)) else {}  # type: ignore[arg-type]
        return {
            **name,
            **{f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return value


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return every leaf of the recipe by its dotted path."""
    return _flatten(to_dict(recipe), "")


def _flatten(node: Any, path: str) -> dict[str, Any]:
    if not (isinstance(node, dict) and node):
        return {path: node}
    flat: dict[str, Any] = {}
    for key, item in node.items():
        flat |= _flatten(item, _join(path, key))
    return flat


def from_dict(data: Any, source: str = "the recipe") -> Recipe:
    """Return the recipe that plain data describes.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type; ``source`` is named.
    """
    recipe = convert(data, Recipe, "", source)
    assert isinstance(recipe, Recipe)
    return recipe


def convert(value: Any, kind: Any, path: str, source: str = "") -> Any:
    """Return ``value`` as a ``kind``: a scalar, dataclass, method, union, Literal, dict or tuple.

    Raises:
        ConfigError: it is none; ``path`` in ``source`` is named.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, path, source)
    if origin is Literal:
        if value not in args:
            raise refusal(value, suggest(value, args), path, source)
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise refusal(value, "a mapping is needed", path, source)
        return {str(key): convert(v, args[1], _join(path, key), source) for key, v in value.items()}
    if origin is tuple:
        return _convert_tuple(value, args, path, source)
    if kind in METHOD_KINDS:
        return _convert_method(value, kind, path, source)
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return _convert_dataclass(value, kind, path, source)
    if kind is Any:
        _require_plain(value, path, source)
        return value
    return convert_scalar(value, kind, path, source)


def _require_plain(value: Any, path: str, source: str) -> None:
    """Raise `ConfigError` unless YAML and JSON can hold ``value``."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            _require_plain(item, _join(path, key), source)
    elif isinstance(value, list | tuple):
        for item in value:
            _require_plain(item, path, source)
    elif isinstance(value, float) and not math.isfinite(value):
        raise refusal(value, "a finite number is needed", path, source)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise refusal(value, "plain data is needed, such as text or a number", path, source)


def _convert_union(value: Any, options: tuple[Any, ...], path: str, source: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    for option in options[:-1]:
        try:
            return convert(value, option, path, source)
        except ConfigError:
            continue
    return convert(value, options[-1], path, source)


def _convert_tuple(value: Any, args: tuple[Any, ...], path: str, source: str) -> Any:
    if not isinstance(value, list | tuple):
        raise refusal(value, "a list is needed, e.g. [0, 1]", path, source)
    if args[-1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(value) != len(args):
        raise refusal(value, f"a list of {len(args)} numbers is needed", path, source)
    items = enumerate(zip(value, args, strict=True))
    return tuple(convert(item, arg, f"{path}[{i}]", source) for i, (item, arg) in items)


def _convert_dataclass(value: Any, kind: type, path: str, source: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise refusal(value, "a mapping is needed", path, source)
    hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise _unknown_field(_join(path, str(key)), str(key), fields, source)
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            where = " in ".join(part for part in (path, source) if part)
            raise ConfigError(
                f"{where} lacks {name!r}, which has no default", field=_join(path, name)
            )
    return kind(
        **{key: convert(v, hints[key], _join(path, key), source) for key, v in value.items()}
    )


def _convert_method(value: Any, kind: type, path: str, source: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping) or "method" not in value:
        wanted = "a mapping with the key 'method' is needed, e.g. {method: kd, weight: 0.5}"
        raise refusal(value, wanted, path, source)
    cls = method_class(str(value["method"]))
    if not issubclass(cls, kind):
        raise refusal(value["method"], f"it is not {METHOD_KINDS[kind]}", path, source)
    rest = {key: item for key, item in value.items() if key != "method"}
    with _fields_below(path):
        return _convert_dataclass(rest, cls, path, source)


@contextmanager
def _fields_below(path: str) -> Iterator[None]:
    """Name the field of a `ConfigError` from the root of the recipe: a method knows its own part.

    An empty ``path`` changes nothing.
    """
    try:
        yield
    except ConfigError as error:
        if path and error.field and not error.field.startswith(f"{path}."):
            error.field = f"{path}.{error.field}"
        raise


def _unknown_field(path: str, name: str, known: Mapping[str, Any], source: str) -> ConfigError:
    return ConfigError(f"{source} has no field {path!r}", suggest(name, known), field=path)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


# --- replacing fields ----------------------------------------------------------------------------


def replace_fields(recipe: Recipe, values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """Return the recipe with the fields at dotted paths (``optim.lr``) replaced, all at once.

    Raises:
        ConfigError: a path or a value is wrong, or the whole no longer makes sense.
    """
    changes = {tuple(path.split(".")): value for path, value in values.items()}
    changed = _replaced(recipe, Recipe, changes, "", source)
    assert isinstance(changed, Recipe)
    return changed


Changes = Mapping[tuple[str, ...], Any]


def _replaced(node: Any, kind: Any, changes: Changes, path: str, source: str) -> Any:
    """Return ``node``, a ``kind`` at ``path``, with what lies at paths below it replaced."""
    if () in changes:
        return convert(changes[()], kind, path, source)
    below: dict[str, dict[tuple[str, ...], Any]] = {}
    for (name, *rest), value in changes.items():
        below.setdefault(name, {})[tuple(rest)] = value
    if not below:
        return node
    if node is None:
        raise ConfigError(f"{path} is null, so it has no {next(iter(below))!r}", _of_null(path))
    again = partial(_replaced, source=source)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        if "method" in below:  # another method, with the fields that are given beside it
            plain = {**to_dict(node), **{name: new.get(()) for name, new in below.items()}}
            return convert(plain, _kind_of(kind), path, source)
        hints = get_type_hints(type(node))
        known: Mapping[str, Any] = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    elif isinstance(node, dict):
        item = get_args(kind)[1] if get_origin(kind) is dict else Any
        known, hints = node, dict.fromkeys((*node, *below), item)
    else:
        known, hints = {}, {}
    open_ended = isinstance(node, dict) and get_origin(kind) is dict and get_args(kind)[1] is Any
    new = {}
    with _fields_below(path if isinstance(node, tuple(METHOD_KINDS)) else ""):
        for name, inner in below.items():
            if name not in known and not (open_ended and () in inner):
                raise _unknown_field(_join(path, name), name, known, source)
            new[name] = again(known.get(name), hints[name], inner, path=_join(path, name))
        if isinstance(node, dict):
            return {**node, **new}
        return dataclasses.replace(node, **new)


def _kind_of(kind: Any) -> Any:
    """Return the type in ``X | None``."""
    return next((arg for arg in get_args(kind) if arg is not type(None)), kind)


def _of_null(path: str) -> tuple[Fix, ...] | Fix:
    """Return what gives a value to a field that is null."""
    if path == "selector":
        return Add("maskedkd")
    if path == "masking":
        return Add("random_masking")
    return Set(path, "{to: 0}" if path.endswith(".schedule") else None)
