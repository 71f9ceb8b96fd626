"""The teacher-student pairs of the MaskedKD paper (arXiv 2302.10494), ImageNet-1k at 224, 300
epochs.

All pairs share one recipe: DeiT's, with soft distillation at temperature 1 and equal weights
(DeiT's alpha 0.5). The accuracies named are the paper's table; the teachers are timm's ImageNet-1k
weights.
"""

from dataclasses import replace

from ..methods.cross_entropy import CrossEntropy
from ..methods.kd import SoftKD
from ..methods.maskedkd import MaskedKD
from .config import Recipe, StudentConfig, TeacherConfig
from .deit import IMAGENET

_PAPER = {
    "deit_tiny_from_deit_small": ("75.2", "75.0 % with the whole teacher, 72.0 % alone"),
    "deit_tiny_from_deit3_small": ("75.2", "75.1 % whole teacher; 74.8 % at 25 %"),
    "deit_tiny_from_deit3_base": ("74.7", "74.4 % whole teacher; 74.7 % at 25 %"),
    "deit_small_from_deit_base": ("81.0", "80.8 % whole teacher, 79.9 % alone; 80.9 % at 75 %"),
    "deit_small_from_deit3_base": ("81.3", "81.3 % whole teacher; 81.4 % at 75 %"),
    "deit_base_from_deit3_large": ("83.6", "83.5 % whole teacher, 81.8 % alone; 83.5 % at 75 %"),
}


def make(name: str) -> Recipe:
    """Return a recipe of this family; its name is that of both networks."""
    student, _, teacher = name.partition("_from_")
    top1, others = _PAPER[name]
    weights = f"{teacher}_patch16_224.fb_in1k"
    return replace(
        IMAGENET,
        name=name,
        description=f"MaskedKD at 50 %: {top1} % top-1 in the paper ({others})",
        student=StudentConfig(model=f"{student}_patch16_224", drop_path=0.1),
        teachers={"teacher": TeacherConfig(model=weights, pretrained=True)},
        objectives={
            "ce": CrossEntropy(weight=0.5, smoothing=0.1),
            "kd": SoftKD(weight=0.5, temperature=1.0),
        },
        selector=MaskedKD(keep_rate=0.5),
    )
