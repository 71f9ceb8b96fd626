"""YAML 1.2 as recipe files need it: plain data, no key twice."""

import re
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

from ..errors import ConfigError
from .config import Recipe
from .convert import from_dict, to_dict

_WORDS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
_PATTERNS = [(f"tag:yaml.org,2002:{k}", re.compile(f"^(?:{p})$")) for k, p in _WORDS.items()]
_TABLE = {None: _PATTERNS, "": _PATTERNS[:1]}


class _CoreSchema(VersionedResolver):
    """What words without quotes mean. ruamel.yaml adds dates, merge keys, 0x10 and 1_000 to YAML's
    core schema; folders have such names.
    """

    @property
    def versioned_resolver(self) -> Any:
        return _TABLE


class _Representer(SafeRepresenter):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_float(self, data: float) -> Any:
        text = repr(data)  # with a dot: readers of YAML 1.1 take 1e-06 for text
        text = text.replace("e", ".0e") if "e" in text and "." not in text else text
        return self.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(float, _Representer.represent_float)


def _yaml() -> Any:
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.Resolver = _CoreSchema
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = True
    yaml.width = 120
    return yaml


def parse_yaml(text: str, source: str) -> Any:
    """Return what the YAML document ``text`` holds; `ConfigError` names ``source`` and the line."""
    try:
        return _yaml().load(text)
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or error
        what = f"{source}{line} is not valid YAML: {' '.join(str(problem).split())}"
        raise ConfigError(what) from None


def read_mapping(path: str | Path) -> dict[Any, Any]:
    """Return the mapping a recipe file holds, unchecked; `ConfigError` names the wrong line."""
    source = f"the recipe {path}"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{source} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}") from None
    data = parse_yaml(text, source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source} is not a mapping of fields")
    return data


def dump_yaml(data: Any) -> str:
    """Return plain data as YAML that `parse_yaml` reads back to equal data."""
    stream = StringIO()
    _yaml().dump(data, stream)
    return stream.getvalue()


def load_recipe(path: str | Path) -> Recipe:
    """Read the recipe file of one run; `ConfigError` names the line or the field that is wrong."""
    return from_dict(read_mapping(path), str(path))


def dump_recipe(recipe: Any) -> str:
    """Return a recipe, of one run or of stages, as YAML that is read back to an equal one."""
    return dump_yaml(to_dict(recipe))
