"""Several teachers of different inductive bias and one student with a token for each: Co-advise and
LIB-KD, ImageNet-1k.

Co-advise (arXiv 2106.12378) trains `cit_tiny` and `cit_small` from RegNetY-4GF and RedNet-101, one
epoch after another with both running. Source: ``config.py`` and ``main.py`` of
OliverRensu/co-advise@8049918. Its own are the student, the teachers, the losses and their unit
weights at temperature 1, the augmentation, and the optimizer with its schedule and its clipping at
15. What differs: stochastic depth is on as their configuration has it, which their code never hands
to the model; Mixup and CutMix draw their ratio for every pair of images, where theirs draws one for
the whole batch; the schedule moves every update; float32 there, bfloat16 here. Their teachers'
files are in no registry: the convolutional one here is timm's, the involutional one is
yours to give.

LIB-KD (arXiv 2310.00369) published no code: only its abstract fixes the method, light teachers, one
convolutional and one involutional, whose stored logits together teach one ViT. `libkd` is that with
Co-advise's losses, on a plain ViT with learned tokens; everything its abstract leaves open is
Co-advise's or ours.
"""

from dataclasses import replace

from ..data.augment import AUGMENTS
from ..methods.base import Objective
from ..methods.cross_entropy import CrossEntropy
from ..methods.kd import SoftKD
from .config import DataConfig, Recipe, StudentConfig, TeacherConfig
from .deit import IMAGENET

LOSSES: dict[str, Objective] = {
    "ce": CrossEntropy(smoothing=0.1),
    "kd_conv": SoftKD(teacher="conv"),
    "kd_inv": SoftKD(teacher="inv"),
}
"""Co-advise's objectives, of weight and temperature 1: labels are for the class token, each
teacher's soft answers for its own.
"""


def make(name: str) -> Recipe:
    recipe = replace(
        IMAGENET,
        student=StudentConfig(
            model="advised_vit",
            drop_path=0.1,
            model_args={"base": "deit_tiny_patch16_224", "teachers": ["conv", "inv"]},
        ),
        teachers={"conv": TeacherConfig(), "inv": TeacherConfig()},
        objectives=LOSSES,
        data=DataConfig(workers=8, augment=replace(AUGMENTS["deit"], repeated_aug=1)),
        # 15: 5 for each loss. The rate is 5e-4 for 512 images.
        optim=replace(IMAGENET.optim, clip_grad=15.0, warmup_epochs=20.0),
    )
    if name == "libkd":
        return recipe
    size = name.removeprefix("libkd_cit_")
    return replace(
        recipe,
        student=StudentConfig(model=f"cit_{size}_patch16_224", drop_path=0.1),
        teachers={
            "conv": TeacherConfig(model="regnety_040.ra3_in1k", pretrained=True, image_size=224),
            "inv": TeacherConfig(model="rednet101"),
        },
    )
