"""The teacher-student pairs of the ViTKD and NKD papers (arXiv 2209.02432, 2303.13005), ImageNet-1k
at 224, 300 epochs.

Source: the DeiT distiller configurations of yzd-v/cls_KD@ad4876f, branch master, which produced the
papers' numbers (branch 1.0 loses Mixup and CutMix). Every objective has weight 1. Against DeiT's
own recipe: no repeated augmentation, 20 epochs of warm-up, gradients clipped at 5, drop path only
for the base student, whose weights are averaged (EMA of momentum 4e-5). The teachers are DeiT III
pre-trained on ImageNet-21k, as in the papers; the accuracies named are theirs. Mixup and CutMix
draw their ratio for every pair of images, as everywhere here, where theirs draws one for the whole
batch.
"""

from dataclasses import replace

from ..data.augment import AUGMENTS
from ..methods.base import Objective
from ..methods.cross_entropy import CrossEntropy
from ..methods.nkd import NKD
from ..methods.vitkd import ViTKD
from .config import DataConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig

_OBJECTIVES: dict[str, dict[str, Objective]] = {
    "nkd": {"nkd": NKD(gamma=1.0, temperature=1.0)},
    "vitkd": {"vitkd": ViTKD()},
    "vitkd_nkd": {"nkd": NKD(gamma=1.0, temperature=1.0), "vitkd": ViTKD()},
}


def _pair(size: str, method: str, teacher: str, top1: str) -> Recipe:
    base = size == "base"
    losses = method.replace("_", " + ").replace("vitkd", "ViTKD").replace("nkd", "NKD")
    return Recipe(
        name=f"deit_{size}_{method}",
        description=(
            f"{losses}: DeiT-{size[0].upper()} from DeiT III-{teacher[0].upper()} (21k); {top1}"
        ),
        student=StudentConfig(model=f"deit_{size}_patch16_224", drop_path=0.1 if base else 0.0),
        teachers={
            "teacher": TeacherConfig(
                model=f"deit3_{teacher}_patch16_224.fb_in22k_ft_in1k", pretrained=True
            )
        },
        objectives={"ce": CrossEntropy(smoothing=0.1), **_OBJECTIVES[method]},
        data=DataConfig(workers=8, augment=replace(AUGMENTS["deit"], repeated_aug=1)),
        optim=OptimConfig(
            opt="adamw",
            lr=1e-3,
            weight_decay=0.05,
            opt_args={"betas": [0.9, 0.999], "eps": 1e-8},
            clip_grad=5.0,
            sched="cosine",
            warmup_epochs=20.0,
            warmup_lr=1e-6,
            min_lr=1e-5,
        ),
        train=TrainConfig(epochs=300, batch_size=1024, ema_decay=1 - 4e-5 if base else None),
    )


def deit_tiny_nkd() -> Recipe:
    """DeiT-T from DeiT III-S by NKD."""
    return _pair("tiny", "nkd", "small", "76.7 % top-1 in the paper, 74.4 % alone")


def deit_tiny_vitkd() -> Recipe:
    """DeiT-T from DeiT III-S by ViTKD."""
    return _pair("tiny", "vitkd", "small", "76.1 % top-1 in the paper, 74.4 % alone")


def deit_tiny_vitkd_nkd() -> Recipe:
    """DeiT-T from DeiT III-S by ViTKD and NKD."""
    return _pair("tiny", "vitkd_nkd", "small", "77.8 % top-1 in the paper, 74.4 % alone")


def deit_small_nkd() -> Recipe:
    """DeiT-S from DeiT III-B by NKD."""
    return _pair("small", "nkd", "base", "no number was published, 80.6 % alone")


def deit_small_vitkd() -> Recipe:
    """DeiT-S from DeiT III-B by ViTKD."""
    return _pair("small", "vitkd", "base", "82.0 % top-1 in the paper, 80.6 % alone")


def deit_small_vitkd_nkd() -> Recipe:
    """DeiT-S from DeiT III-B by ViTKD and NKD."""
    return _pair("small", "vitkd_nkd", "base", "83.6 % top-1 in the paper, 80.6 % alone")


def deit_base_nkd() -> Recipe:
    """DeiT-B from DeiT III-L by NKD."""
    return _pair("base", "nkd", "large", "85.0 % top-1 in the paper, 81.8 % alone")


def deit_base_vitkd() -> Recipe:
    """DeiT-B from DeiT III-L by ViTKD."""
    return _pair("base", "vitkd", "large", "83.5 % top-1 in the paper, 81.8 % alone")


def deit_base_vitkd_nkd() -> Recipe:
    """DeiT-B from DeiT III-L by ViTKD and NKD."""
    return _pair("base", "vitkd_nkd", "large", "85.4 % top-1 in the paper, 81.8 % alone")
