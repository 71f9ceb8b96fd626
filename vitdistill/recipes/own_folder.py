"""From a folder of photos to a small network: a big pretrained ViT is fine-tuned on it, and teaches
a small pretrained one.

Fine-tuning is BEiT's and MAE's (arXiv 2106.08254, 2111.06377): a new head, a small learning rate,
and one that falls from block to block towards the input. Batches of 32 give a small folder enough
steps, and crops of at least 0.3 of an image keep what it shows.
"""

from dataclasses import replace

from ..data.augment import Augment
from ..methods.kd import SoftKD
from ..methods.maskedkd import MaskedKD
from .config import DataConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig
from .plain import CE, HALF

_FINETUNE = Recipe(
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
    return replace(_FINETUNE if name == "finetune" else _DISTILL, name=name)
