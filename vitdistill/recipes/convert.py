"""Recipes to and from plain data: dicts, lists, text, numbers, booleans, None."""

import dataclasses
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import Add, ConfigError, Set, fields_below
from ..messages import suggest
from ..methods import method_class, method_name
from ..methods.base import Masking, Objective, TokenSelector
from ..option import convert_scalar, refusal, unknown_field
from .config import Recipe

Made = TypeVar("Made")
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
    """Return the recipe that plain data describes.

    Raises:
        ConfigError: a key is unknown, or a value is wrong; ``source`` is named.
    """
    return from_plain(data, Recipe, source)


def from_plain(data: Any, kind: type[Made], source: str = "") -> Made:
    """Return what plain data describes, as `from_dict`."""
    try:
        made = convert(data, kind, "", source or "the recipe")
    except ConfigError as error:
        if source not in error.what:
            error.what = f"{source}: {error.what}"
        raise
    assert isinstance(made, kind)
    return made


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
    elif isinstance(value, float):
        convert_scalar(value, float, path, source)
    elif not isinstance(value, bool | int | str | None):
        raise refusal(value, "plain data is needed, such as text or a number", path, source)


def _convert_union(value: Any, options: tuple[Any, ...], path: str, source: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    for option in options[:-1]:
        with suppress(ConfigError):
            return convert(value, option, path, source)
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
            raise unknown_field(_join(path, str(key)), fields, source)
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise refusal(dict(value), f"it lacks {name!r}", _join(path, name), source)
    parts = {key: convert(v, hints[key], _join(path, key), source) for key, v in value.items()}
    return kind(**parts)


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
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    with fields_below(path, names):
        return _convert_dataclass(rest, cls, path, source)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


# --- replacing fields ----------------------------------------------------------------------------


def replace_fields(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the fields at dotted paths (``optim.lr``) replaced, all at once.

    Raises:
        ConfigError: a path or a value is wrong, or the whole no longer makes sense.
    """
    data = to_dict(recipe)
    for path, value in values.items():
        node, walked, (*parents, last) = data, "", path.split(".")
        for name in parents:
            node, walked = _enter(node, walked, name), _join(walked, name)
        if not isinstance(node, dict):
            raise unknown_field(path, ())
        node[last] = to_dict(value)
    return from_dict(data)


def _enter(node: Any, path: str, name: str) -> Any:
    """Return what ``name`` is in the mapping ``node`` at ``path``."""
    inner = _join(path, name)
    if not isinstance(node, dict) or name not in node:
        raise unknown_field(inner, node if isinstance(node, dict) else ())
    if node[name] is None:
        fix = Add(NULL_METHODS[name]) if inner in NULL_METHODS else Set(inner)
        raise ConfigError(f"{inner} is null", fix, field=inner)
    return node[name]
