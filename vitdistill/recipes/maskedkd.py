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
from .deit import deit_tiny


def _pair(name: str, student: str, teacher: str, description: str) -> Recipe:
    return replace(
        deit_tiny(),
        name=name,
        description=description,
        student=StudentConfig(model=student, drop_path=0.1),
        teachers={"teacher": TeacherConfig(model=teacher, pretrained=True)},
        objectives={
            "ce": CrossEntropy(weight=0.5, smoothing=0.1),
            "kd": SoftKD(weight=0.5, temperature=1.0),
        },
        selector=MaskedKD(keep_rate=0.5),
    )


def deit_tiny_from_deit_small() -> Recipe:
    """DeiT-Ti from DeiT-S, 98 of 196 patches."""
    return _pair(
        "deit_tiny_from_deit_small",
        "deit_tiny_patch16_224",
        "deit_small_patch16_224.fb_in1k",
        "MaskedKD at 50 %: 75.2 % top-1 in the paper (75.0 % with the whole teacher, 72.0 % alone)",
    )


def deit_tiny_from_deit3_small() -> Recipe:
    """DeiT-Ti from DeiT III-S, 98 of 196 patches."""
    return _pair(
        "deit_tiny_from_deit3_small",
        "deit_tiny_patch16_224",
        "deit3_small_patch16_224.fb_in1k",
        "MaskedKD at 50 %: 75.2 % top-1 in the paper (75.1 % whole teacher; 74.8 % at 25 %)",
    )


def deit_tiny_from_deit3_base() -> Recipe:
    """DeiT-Ti from DeiT III-B, 98 of 196 patches."""
    return _pair(
        "deit_tiny_from_deit3_base",
        "deit_tiny_patch16_224",
        "deit3_base_patch16_224.fb_in1k",
        "MaskedKD at 50 %: 74.7 % top-1 in the paper (74.4 % whole teacher; 74.7 % at 25 %)",
    )


def deit_small_from_deit_base() -> Recipe:
    """DeiT-S from DeiT-B, 98 of 196 patches."""
    return _pair(
        "deit_small_from_deit_base",
        "deit_small_patch16_224",
        "deit_base_patch16_224.fb_in1k",
        "MaskedKD at 50 %: 81.0 % top-1 in the paper (80.8 % whole teacher, 79.9 % alone; 80.9 % at"
        " 75 %)",
    )


def deit_small_from_deit3_base() -> Recipe:
    """DeiT-S from DeiT III-B, 98 of 196 patches."""
    return _pair(
        "deit_small_from_deit3_base",
        "deit_small_patch16_224",
        "deit3_base_patch16_224.fb_in1k",
        "MaskedKD at 50 %: 81.3 % top-1 in the paper (81.3 % whole teacher; 81.4 % at 75 %)",
    )


def deit_base_from_deit3_large() -> Recipe:
    """DeiT-B from DeiT III-L, 98 of 196 patches."""
    return _pair(
        "deit_base_from_deit3_large",
        "deit_base_patch16_224",
        "deit3_large_patch16_224.fb_in1k",
        "MaskedKD at 50 %: 83.6 % top-1 in the paper (83.5 % whole teacher, 81.8 % alone; 83.5 % at"
        " 75 %)",
    )
