"""Several teachers of different inductive bias and one student with a token for each: Co-advise and
LIB-KD, ImageNet-1k.

Co-advise (arXiv 2106.12378) trains `cit_tiny` and `cit_small` from RegNetY-4GF and RedNet-101, one
epoch after another with both running. Source: ``config.py`` and ``main.py`` of
OliverRensu/co-advise@8049918. Its own are the student, the teachers, the losses and their unit
weights at temperature 1, the augmentation, and the optimizer with its schedule and its clipping at
15. What differs: stochastic depth is on as their configuration has it, which their code never hands
to the model; Mixup and CutMix draw their ratio for every pair of images, where theirs draws one for
the whole batch; the schedule moves every update; float32 there, bfloat16 here. Their teachers'
files cannot be had from a registry: the convolutional one here is timm's, the involutional one is
yours to give.

LIB-KD (arXiv 2310.00369) published no code: of its method the abstract alone is fixed, light
teachers, one convolutional and one involutional, whose logits are stored and teach one ViT
together. `libkd` is that with Co-advise's losses, on a plain ViT with learned tokens; everything
its abstract leaves open is Co-advise's or ours.
"""

from dataclasses import replace

from ..data.augment import AUGMENTS
from ..methods.base import Objective
from ..methods.cross_entropy import CrossEntropy
from ..methods.kd import SoftKD
from .config import DataConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig


def losses() -> dict[str, Objective]:
    """Co-advise's: labels for the class token, each teacher's soft answers for its own, all of
    weight 1 at temperature 1.
    """
    return {
        "ce": CrossEntropy(smoothing=0.1),
        "kd_conv": SoftKD(teacher="conv"),
        "kd_inv": SoftKD(teacher="inv"),
    }


def libkd_cit_tiny() -> Recipe:
    """CiT-Ti from RegNetY-4GF and RedNet-101."""
    return Recipe(
        name="libkd_cit_tiny",
        description=(
            "Co-advise's CiT-Ti from RegNetY-4GF (timm's weights) and RedNet-101 (give its weights:"
            " teachers.inv.checkpoint)"
        ),
        student=StudentConfig(model="cit_tiny_patch16_224", drop_path=0.1),
        teachers={
            "conv": TeacherConfig(model="regnety_040.ra3_in1k", pretrained=True, image_size=224),
            "inv": TeacherConfig(model="rednet101"),
        },
        objectives=losses(),
        data=DataConfig(workers=8, augment=replace(AUGMENTS["deit"], repeated_aug=1)),
        optim=OptimConfig(
            opt="adamw",
            lr=1e-3,  # 5e-4 for 512 images
            weight_decay=0.05,
            clip_grad=15.0,  # 5 for each loss
            warmup_epochs=20.0,
            warmup_lr=1e-6,
            min_lr=1e-5,
        ),
        train=TrainConfig(epochs=300, batch_size=1024),
    )


def libkd_cit_small() -> Recipe:
    """CiT-S from RegNetY-4GF and RedNet-101."""
    return replace(
        libkd_cit_tiny(),
        name="libkd_cit_small",
        description=(
            "Co-advise's CiT-S from RegNetY-4GF (timm's weights) and RedNet-101 (give its weights:"
            " teachers.inv.checkpoint)"
        ),
        student=StudentConfig(model="cit_small_patch16_224", drop_path=0.1),
    )


def libkd() -> Recipe:
    """DeiT-Ti with a learned token for each of two teachers, which are yours to name."""
    return replace(
        libkd_cit_tiny(),
        name="libkd",
        description=("DeiT-Ti with a token for each of two teachers, conv and inv"),
        student=StudentConfig(
            model="advised_vit",
            drop_path=0.1,
            model_args={"base": "deit_tiny_patch16_224", "teachers": ["conv", "inv"]},
        ),
        teachers={"conv": TeacherConfig(), "inv": TeacherConfig()},
    )
