"""Recipes for any data, teacher and student: name the models on the command line."""

from dataclasses import replace

from ..data.augment import Augment
from ..methods.base import Objective
from ..methods.cross_entropy import CrossEntropy
from ..methods.guidance import LocalityGuidance
from ..methods.kd import HardKD, SoftKD
from ..methods.maskedkd import MaskedKD
from ..methods.nkd import NKD
from ..methods.vitkd import ViTKD
from .config import DataConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig
from .deit import IMAGENET

CE = CrossEntropy(smoothing=0.1)
HALF = CrossEntropy(weight=0.5, smoothing=0.1)
# The paper's weight of ViTKD is for sums over 196 patches; means fit any resolution and width.
_VITKD = ViTKD(reduction="mean")

_SOFT: dict[str, Objective] = {"ce": HALF, "kd": SoftKD(weight=0.5)}
OBJECTIVES: dict[str, dict[str, Objective]] = {
    "alone": {"ce": CE},
    "kd": _SOFT,
    "hard_kd": {"ce": HALF, "kd": HardKD(weight=0.5)},
    "maskedkd": _SOFT,
    # Weights as published: the first beside a cross-entropy of weight 0.1, the second of 1.
    "standardized_kd": {"ce": CE, "kd": SoftKD(weight=9.0, temperature=2.0, standardize=True)},
    "guidance": {"ce": CE, "guidance": LocalityGuidance(weight=2.5, normalize=True)},
    "nkd": {"ce": CE, "nkd": NKD()},
    "vitkd": {"ce": CE, "vitkd": _VITKD},
    "vitkd_nkd": {"ce": CE, "nkd": NKD(), "vitkd": _VITKD},
}

# Fine-tuning is BEiT's and MAE's (arXiv 2106.08254, 2111.06377): a new head, a small learning rate,
# and one that falls from block to block towards the input. Batches of 32 give a small folder enough
# steps, and crops of at least 0.3 of an image keep what it shows.
_FINETUNE = Recipe(
    student=StudentConfig(
        model="vit_base_patch16_224.augreg2_in21k_ft_in1k", pretrained=True, drop_path=0.1
    ),
    objectives={"ce": CE},
    data=DataConfig(workers=4, augment=Augment(scale=(0.3, 1.0), aa="rand-m9-mstd0.5-inc1")),
    optim=OptimConfig(lr=1e-4, layer_decay=0.75, warmup_epochs=1.0, min_lr=1e-6, clip_grad=1.0),
    train=TrainConfig(epochs=20, batch_size=32, log_every=20),
)
# A CNN needs a larger learning rate, the same in all blocks (LOG.md).
_FINETUNE_CNN = replace(
    _FINETUNE,
    student=StudentConfig(model="tf_efficientnet_lite0.in1k", pretrained=True),
    optim=replace(_FINETUNE.optim, lr=1e-3, layer_decay=None),
)
_DISTILL = replace(
    _FINETUNE,
    student=StudentConfig(model="deit_tiny_patch16_224.fb_in1k", pretrained=True),
    teachers={"teacher": TeacherConfig()},
    objectives={"ce": HALF, "kd": SoftKD(weight=0.5, temperature=2.0)},
    selector=MaskedKD(keep_rate=0.5),
    optim=replace(_FINETUNE.optim, lr=3e-4),
    train=replace(_FINETUNE.train, epochs=40),
)
# The teacher answers to four views of an image, shown in turn, whatever the epochs.
_FEW_LABELS = replace(
    _DISTILL,
    objectives=OBJECTIVES["standardized_kd"],
    selector=None,
    data=replace(_DISTILL.data, views=4),
)
_FOLDERS = {
    "finetune": _FINETUNE,
    "finetune_cnn": _FINETUNE_CNN,
    "distill": _DISTILL,
    "few_labels": _FEW_LABELS,
}


def make(name: str) -> Recipe:
    if name in _FOLDERS:
        return _FOLDERS[name]
    return replace(
        IMAGENET,
        teachers={} if name == "alone" else {"teacher": TeacherConfig()},
        objectives=OBJECTIVES[name],
        selector=MaskedKD(keep_rate=0.5) if name == "maskedkd" else None,
    )
