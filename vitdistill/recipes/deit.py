"""DeiT's training recipe (arXiv 2012.12877), the base of the MaskedKD paper's pairs, and DeiT's own
distillation token.

Source: the defaults of effl-lab/MaskedKD@96d052d, which are those of facebookresearch/deit. Two
differences, both on purpose: the schedule moves every update, where theirs moves every epoch and so
runs the first two epochs at the warm-up rate; and Mixup and CutMix draw their ratio for every pair
of images, where theirs draws one for the whole batch, so that an image's view does not depend on
who shares its batch.
"""

from dataclasses import replace

from ..data.augment import AUGMENTS
from ..methods.cross_entropy import CrossEntropy
from ..methods.kd import HardKD
from .config import DataConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig

IMAGENET = Recipe(
    student=StudentConfig(model="deit_tiny_patch16_224", drop_path=0.1),
    objectives={"ce": CrossEntropy(smoothing=0.1)},
    data=DataConfig(workers=8, augment=AUGMENTS["deit"]),
    optim=OptimConfig(lr=1e-3, weight_decay=0.05, warmup_epochs=5.0, warmup_lr=1e-6, min_lr=1e-5),
    train=TrainConfig(epochs=300, batch_size=1024),
)
"""The base of other papers' recipes too."""


def make(name: str) -> Recipe:
    if name == "deit_tiny":
        return IMAGENET
    return replace(
        IMAGENET,
        student=StudentConfig(model="deit_tiny_distilled_patch16_224", drop_path=0.1),
        teachers={"teacher": TeacherConfig(model="regnety_160.deit_in1k", pretrained=True)},
        objectives={"ce": CrossEntropy(weight=0.5, smoothing=0.1), "kd": HardKD(weight=0.5)},
    )
