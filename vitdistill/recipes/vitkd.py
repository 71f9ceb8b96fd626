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

_TEACHERS = {"tiny": ("small", "74.4"), "small": ("base", "80.6"), "base": ("large", "81.8")}
"""The teacher of each student, and what the student reaches alone."""
_TOP1 = {
    "deit_tiny_nkd": "76.7",
    "deit_tiny_vitkd": "76.1",
    "deit_tiny_vitkd_nkd": "77.8",
    "deit_small_vitkd": "82.0",
    "deit_small_vitkd_nkd": "83.6",
    "deit_base_nkd": "85.0",
    "deit_base_vitkd": "83.5",
    "deit_base_vitkd_nkd": "85.4",
}
"""Published accuracies."""


def make(name: str) -> Recipe:
    """Return the recipe ``deit_SIZE_METHOD``."""
    _, size, method = name.split("_", 2)
    teacher, alone = _TEACHERS[size]
    losses = method.replace("_", " + ").replace("vitkd", "ViTKD").replace("nkd", "NKD")
    pair = f"DeiT-{size[0].upper()} from DeiT III-{teacher[0].upper()} (21k)"
    top1 = f"{_TOP1[name]} % top-1 in the paper" if name in _TOP1 else "no number was published"
    objectives: dict[str, Objective] = {"ce": CrossEntropy(smoothing=0.1)}
    if "nkd" in method.split("_"):
        objectives["nkd"] = NKD(gamma=1.0, temperature=1.0)
    if "vitkd" in method:
        objectives["vitkd"] = ViTKD()
    base = size == "base"
    weights = f"deit3_{teacher}_patch16_224.fb_in22k_ft_in1k"
    return replace(
        IMAGENET,
        name=name,
        description=f"{losses}: {pair}; {top1}, {alone} % alone",
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
