"""One paper, one file; `METHODS` is the table of them all, one line a method, imported only when
used.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from ..errors import ConfigError
from .base import Masking, Objective, TokenSelector

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
    "mae": "vitdistill.methods.mae:PixelReconstruction",
    "dmae": "vitdistill.methods.dmae:DMAE",
    "random_masking": "vitdistill.methods.masking:RandomMasking",
    "maskedkd": "vitdistill.methods.maskedkd:MaskedKD",
    "random_patches": "vitdistill.methods.maskedkd:RandomPatches",
    "teacher_guided": "vitdistill.methods.maskedkd:TeacherGuided",
}


def method_names() -> dict[str, str]:
    """Every known method by name: the table above and the ``vitdistill.methods`` entry points of
    installed packages.
    """
    return {**_outside(), **METHODS}


@cache
def _outside() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group="vitdistill.methods")}


def method_class(name: str) -> type[Objective] | type[TokenSelector] | type[Masking]:
    """The class behind a method's name; raises `ConfigError` with a suggestion for an unknown
    one.
    """
    from difflib import get_close_matches

    names = method_names()
    if name not in names:
        close = get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(sorted(names))}"
        raise ConfigError(f"there is no method {name!r}: {hint}")
    module, _, attribute = names[name].partition(":")
    try:
        found: type[Objective] | type[TokenSelector] | type[Masking] = getattr(
            import_module(module), attribute
        )
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the method {name!r} is registered as {names[name]}, which cannot be imported: {error}"
        ) from error
    return found


def method_name(method: Objective | TokenSelector | Masking) -> str:
    """The name under which a method's class stands in the table; raises `ConfigError` if it stands
    nowhere.
    """
    path = f"{type(method).__module__}:{type(method).__qualname__}"
    for name, target in method_names().items():
        if target == path:
            return name
    raise ConfigError(
        f"{type(method).__qualname__} is not in the table of methods: add it, or register an entry"
        " point for it"
    )
