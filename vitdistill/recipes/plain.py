"""Recipes for any data, teacher and student: name the models on the command line."""

from dataclasses import replace

from ..methods.base import Objective
from ..methods.cross_entropy import CrossEntropy
from ..methods.kd import HardKD, SoftKD
from ..methods.maskedkd import MaskedKD
from ..methods.nkd import NKD
from ..methods.vitkd import ViTKD
from .config import Recipe, TeacherConfig
from .deit import IMAGENET

CE = CrossEntropy(smoothing=0.1)
HALF = CrossEntropy(weight=0.5, smoothing=0.1)
# The paper's weight of ViTKD is for sums over 196 patches; means fit any resolution and width.
VITKD = ViTKD(reduction="mean")

_ROWS: dict[str, tuple[str, dict[str, Objective]]] = {
    "alone": ("a ViT without a teacher, DeiT's training recipe", {"ce": CE}),
    "kd": ("plain logit distillation from a teacher", {"ce": HALF, "kd": SoftKD(weight=0.5)}),
    "hard_kd": (
        "distillation from the top class of a teacher (give a student with a distillation token"
        " for DeiT's form)",
        {"ce": HALF, "kd": HardKD(weight=0.5)},
    ),
    "maskedkd": (
        "MaskedKD from a teacher that sees half of its patches",
        {"ce": HALF, "kd": SoftKD(weight=0.5)},
    ),
    "nkd": ("NKD from a teacher", {"ce": CE, "nkd": NKD()}),
    "vitkd": ("ViTKD (features) from a teacher", {"ce": CE, "vitkd": VITKD}),
    "vitkd_nkd": (
        "ViTKD (features) and NKD (logits) from a teacher",
        {"ce": CE, "nkd": NKD(), "vitkd": VITKD},
    ),
}


def make(name: str) -> Recipe:
    """Return a recipe of this family."""
    description, objectives = _ROWS[name]
    return replace(
        IMAGENET,
        name=name,
        description=description,
        teachers={} if name == "alone" else {"teacher": TeacherConfig()},
        objectives=objectives,
        selector=MaskedKD(keep_rate=0.5) if name == "maskedkd" else None,
    )
