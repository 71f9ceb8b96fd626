"""Recipes for any data, teacher and student: name the models on the command line."""

from dataclasses import replace

from ..methods.cross_entropy import CrossEntropy
from ..methods.kd import HardKD, SoftKD
from ..methods.maskedkd import MaskedKD
from ..methods.nkd import NKD
from ..methods.vitkd import ViTKD
from .config import Recipe, TeacherConfig
from .deit import deit_tiny


def alone() -> Recipe:
    """A ViT without a teacher."""
    return replace(
        deit_tiny(), name="alone", description="a ViT without a teacher, DeiT's training recipe"
    )


def kd() -> Recipe:
    """Plain logit distillation: the whole teacher on the whole image."""
    return replace(
        alone(),
        name="kd",
        description="plain logit distillation from a teacher",
        teachers={"teacher": TeacherConfig()},
        objectives={"ce": CrossEntropy(weight=0.5, smoothing=0.1), "kd": SoftKD(weight=0.5)},
    )


def hard_kd() -> Recipe:
    """Distillation from the teacher's top class."""
    return replace(
        kd(),
        name="hard_kd",
        description=(
            "distillation from the top class of a teacher (give a student with a distillation"
            " token for DeiT's form)"
        ),
        objectives={"ce": CrossEntropy(weight=0.5, smoothing=0.1), "kd": HardKD(weight=0.5)},
    )


def maskedkd() -> Recipe:
    """MaskedKD: the teacher sees the half of the patches the student attends to."""
    return replace(
        kd(),
        name="maskedkd",
        description="MaskedKD from a teacher that sees half of its patches",
        selector=MaskedKD(keep_rate=0.5),
    )


def nkd() -> Recipe:
    """NKD: the label's class and the rest of the teacher's answer, each with a loss of its own."""
    return replace(
        kd(),
        name="nkd",
        description="NKD from a teacher",
        objectives={"ce": CrossEntropy(smoothing=0.1), "nkd": NKD()},
    )


def vitkd() -> Recipe:
    """ViTKD: the teacher's first blocks mimicked, its last features generated; weights that fit any
    resolution and width.
    """
    return replace(
        kd(),
        name="vitkd",
        description="ViTKD (features) from a teacher",
        objectives={"ce": CrossEntropy(smoothing=0.1), "vitkd": ViTKD(reduction="mean")},
    )


def vitkd_nkd() -> Recipe:
    """ViTKD and NKD together, the combination with the largest published gains."""
    return replace(
        kd(),
        name="vitkd_nkd",
        description="ViTKD (features) and NKD (logits) from a teacher",
        objectives={
            "ce": CrossEntropy(smoothing=0.1),
            "nkd": NKD(),
            "vitkd": ViTKD(reduction="mean"),
        },
    )
