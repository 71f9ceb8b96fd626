"""Turn a big Vision Transformer into a small, fast one, for the least compute.

The names below are the public list; each is imported when it is first used, so that ``import
vitdistill`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distill.distiller import Distiller as Distiller
    from .distill.step import Distillation as Distillation
    from .distill.teacher import Teacher as Teacher
    from .labels import LabelStore as LabelStore
    from .recipes.config import Recipe as Recipe
    from .runs.train import train as train
    from .vit import Needs as Needs
    from .vit import run_vit as run_vit
    from .weights.create import create_model as create_model
    from .weights.export import export_timm as export_timm

__version__ = "0.1.0"

_HOMES = {
    "Distillation": "distill.step",
    "Distiller": "distill.distiller",
    "LabelStore": "labels",
    "Needs": "vit",
    "Recipe": "recipes.config",
    "Teacher": "distill.teacher",
    "create_model": "weights.create",
    "export_timm": "weights.export",
    "run_vit": "vit",
    "train": "runs.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
