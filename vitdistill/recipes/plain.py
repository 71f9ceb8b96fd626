"""Recipes for any data, teacher and student: name the models on the command line."""

from dataclasses import replace

from ..methods.base import Objective
from ..methods.cross_entropy import CrossEntropy
from ..methods.kd import HardKD, SoftKD
from ..methods.maskedkd import MaskedKD
from ..methods.nkd import NKD
from ..methods.vitkd import ViTKD
from .config import Recipe, TeacherConfig
from .deit import deit_tiny

_SOFT: dict[str, Objective] = {
    "ce": CrossEntropy(weight=0.5, smoothing=0.1),
    "kd": SoftKD(weight=0.5),
}
_CE: dict[str, Objective] = {"ce": CrossEntropy(smoothing=0.1)}
# The paper's weights of ViTKD are for sums over 196 patches; means fit any resolution and width.
_VITKD: dict[str, Objective] = {"vitkd": ViTKD(reduction="mean")}
_TAUGHT: dict[str, tuple[str, dict[str, Objective]]] = {
    "kd": ("plain logit distillation from a teacher", _SOFT),
    "hard_kd": (
        "distillation from the top class of a teacher (give a student with a distillation token"
        " for DeiT's form)",
        {**_SOFT, "kd": HardKD(weight=0.5)},
    ),
    "maskedkd": ("MaskedKD from a teacher that sees half of its patches", _SOFT),
    "nkd": ("NKD from a teacher", {**_CE, "nkd": NKD()}),
    "vitkd": ("ViTKD (features) from a teacher", {**_CE, **_VITKD}),
    "vitkd_nkd": (
        "ViTKD (features) and NKD (logits) from a teacher",
        {**_CE, "nkd": NKD(), **_VITKD},
    ),
}


def make(name: str) -> Recipe:
    """Return a recipe of this family."""
    recipe = replace(
        deit_tiny(), name=name, description="a ViT without a teacher, DeiT's training recipe"
    )
    if name == "alone":
        return recipe
    description, objectives = _TAUGHT[name]
    return replace(
        recipe,
        description=description,
        teachers={"teacher": TeacherConfig()},
        objectives=dict(objectives),
        selector=MaskedKD(keep_rate=0.5) if name == "maskedkd" else None,
    )
