"""The teacher-student pairs of the MaskedKD paper (arXiv 2302.10494), ImageNet-1k at 224, 300
epochs.

All pairs share one recipe: DeiT's, with soft distillation at temperature 1 and equal weights
(DeiT's alpha 0.5). The teachers are timm's ImageNet-1k weights.
"""

from dataclasses import replace

from . import plain
from .config import Recipe, StudentConfig, TeacherConfig


def make(name: str) -> Recipe:
    """Return a recipe of this family; its name is that of both networks."""
    student, _, teacher = name.partition("_from_")
    weights = f"{teacher}_patch16_224.fb_in1k"
    return replace(
        plain.make("maskedkd"),
        student=StudentConfig(model=f"{student}_patch16_224", drop_path=0.1),
        teachers={"teacher": TeacherConfig(model=weights, pretrained=True)},
    )
