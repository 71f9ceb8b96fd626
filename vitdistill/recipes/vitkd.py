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
from .config import DataConfig, Recipe, StudentConfig, TeacherConfig
from .deit import IMAGENET

_TEACHERS = {"tiny": "small", "small": "base", "base": "large"}


def make(name: str) -> Recipe:
    """Return the recipe ``deit_SIZE_METHOD``."""
    _, size, method = name.split("_", 2)
    objectives: dict[str, Objective] = {"ce": CrossEntropy(smoothing=0.1)}
    if "nkd" in method.split("_"):
        objectives["nkd"] = NKD(gamma=1.0, temperature=1.0)
    if "vitkd" in method:
        objectives["vitkd"] = ViTKD()
    base = size == "base"
    weights = f"deit3_{_TEACHERS[size]}_patch16_224.fb_in22k_ft_in1k"
    return replace(
        IMAGENET,
        student=StudentConfig(model=f"deit_{size}_patch16_224", drop_path=0.1 if base else 0.0),
        teachers={"teacher": TeacherConfig(model=weights, pretrained=True)},
        objectives=objectives,
        data=DataConfig(workers=8, augment=replace(AUGMENTS["deit"], repeated_aug=1)),
        optim=replace(
            IMAGENET.optim,
            opt_args={"betas": [0.9, 0.999], "eps": 1e-8},
            clip_grad=5.0,
            warmup_epochs=20.0,
        ),
        train=replace(IMAGENET.train, ema_decay=1 - 4e-5 if base else None),
    )
