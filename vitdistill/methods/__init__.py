"""One paper, one file; `METHODS` names them all, one line each, imported only when used."""

from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any

from ..errors import ConfigError
from ..messages import suggest

METHODS: dict[str, str] = {
    "ce": "vitdistill.methods.cross_entropy:CrossEntropy",
    "kd": "vitdistill.methods.kd:SoftKD",
    "hard_kd": "vitdistill.methods.kd:HardKD",
    "dist": "vitdistill.methods.dist:DIST",
    "dkd": "vitdistill.methods.dkd:DKD",
    "nkd": "vitdistill.methods.nkd:NKD",
    "wttm": "vitdistill.methods.wttm:WTTM",
    "vitkd": "vitdistill.methods.vitkd:ViTKD",
    "attention_maps": "vitdistill.methods.attention_maps:AttentionMaps",
    "relations": "vitdistill.methods.relations:Relations",
    "manifold": "vitdistill.methods.manifold:Manifold",
    "tokens": "vitdistill.methods.tokens:TokenFeatures",
    "guidance": "vitdistill.methods.guidance:LocalityGuidance",
    "mae": "vitdistill.methods.mae:PixelReconstruction",
    "dmae": "vitdistill.methods.dmae:DMAE",
    "random_masking": "vitdistill.methods.masking:RandomMasking",
    "maskedkd": "vitdistill.methods.maskedkd:MaskedKD",
    "random_patches": "vitdistill.methods.maskedkd:RandomPatches",
    "teacher_guided": "vitdistill.methods.maskedkd:TeacherGuided",
}


_NAMES = {place.partition(":")[2]: name for name, place in METHODS.items()}


def __getattr__(name: str) -> Any:
    """Import the class of a method: ``from vitdistill.methods import SoftKD``."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return method_class(_NAMES[name])


@cache
def method_names() -> dict[str, str]:
    """Return every method's class by name, those of installed packages' entry points included."""
    outside = {point.name: point.value for point in entry_points(group="vitdistill.methods")}
    return {**outside, **METHODS}


def check_method(name: str) -> None:
    """Raise `ConfigError` for an unknown name; imports nothing."""
    if name not in method_names():
        raise ConfigError(f"there is no method {name!r}", suggest(name, sorted(method_names())))


def method_class(name: str) -> type[Any]:
    """Return the class behind a method's name; raise `ConfigError` for an unknown one."""
    check_method(name)
    place = method_names()[name]
    try:
        found: type[Any] = resolve_name(place)
    except (ImportError, AttributeError) as error:
        what = f"the method {name!r} is registered as {place}, which cannot be imported"
        raise ConfigError(f"{what}: {error}") from error
    return found


def method_name(method: object) -> str:
    """Return the name of a method's class in the table; raise `ConfigError` if it has none."""
    path = f"{type(method).__module__}:{type(method).__qualname__}"
    for name, target in method_names().items():
        if target == path:
            return name
    what = f"{type(method).__qualname__} is not in the table of methods"
    raise ConfigError(what, "add it, or register an entry point for it")
