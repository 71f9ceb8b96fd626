"""Recipes for any data, teacher and student: name the models on the command line."""

from dataclasses import replace

from ..data.augment import Augment
from ..methods.base import Objective
from ..methods.cross_entropy import CrossEntropy
from ..methods.kd import HardKD, SoftKD
from ..methods.maskedkd import MaskedKD
from ..methods.nkd import NKD
from ..methods.vitkd import ViTKD
from .config import DataConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig
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


# Fine-tuning is BEiT's and MAE's (arXiv 2106.08254, 2111.06377): a new head, a small learning rate,
# and one that falls from block to block towards the input. Batches of 32 give a small folder enough
# steps, and crops of at least 0.3 of an image keep what it shows.
_FINETUNE = Recipe(
    name="finetune",
    description="a big pretrained ViT fine-tuned on your own folder, 20 epochs: a teacher",
    student=StudentConfig(
        model="vit_base_patch16_224.augreg2_in21k_ft_in1k", pretrained=True, drop_path=0.1
    ),
    objectives={"ce": CE},
    data=DataConfig(workers=4, augment=Augment(scale=(0.3, 1.0), aa="rand-m9-mstd0.5-inc1")),
    optim=OptimConfig(lr=1e-4, layer_decay=0.75, warmup_epochs=1.0, min_lr=1e-6, clip_grad=1.0),
    train=TrainConfig(epochs=20, batch_size=32, log_every=20),
)
_DISTILL = replace(
    _FINETUNE,
    name="distill",
    description="a small pretrained ViT that learns your own folder from a fine-tuned teacher",
    student=StudentConfig(model="deit_tiny_patch16_224.fb_in1k", pretrained=True),
    teachers={"teacher": TeacherConfig()},
    objectives={"ce": HALF, "kd": SoftKD(weight=0.5, temperature=2.0)},
    selector=MaskedKD(keep_rate=0.5),
    optim=replace(_FINETUNE.optim, lr=3e-4),
    train=replace(_FINETUNE.train, epochs=40),
)


def make(name: str) -> Recipe:
    """Return a recipe of this family."""
    if name in ("finetune", "distill"):
        return _FINETUNE if name == "finetune" else _DISTILL
    description, objectives = _ROWS[name]
    return replace(
        IMAGENET,
        name=name,
        description=description,
        teachers={} if name == "alone" else {"teacher": TeacherConfig()},
        objectives=objectives,
        selector=MaskedKD(keep_rate=0.5) if name == "maskedkd" else None,
    )
