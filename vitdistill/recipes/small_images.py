"""32 x 32 images (CIFAR and the like), sized to finish on a laptop: a ViT teacher trained on the
spot, and a student half as wide.
"""

from dataclasses import replace
from typing import Any

from ..data.augment import AUGMENTS
from ..methods.cross_entropy import CrossEntropy
from ..methods.dmae import DMAE
from ..methods.kd import SoftKD
from ..methods.mae import PixelReconstruction
from ..methods.maskedkd import MaskedKD
from ..methods.masking import RandomMasking
from .config import DataConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig
from .libkd import LOSSES
from .plain import CE, OBJECTIVES
from .stages import Stages

VIT = "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
_ADVISED = {"base": VIT, "teachers": ["conv", "inv"], **SHAPE}
# 1.2 M parameters each, on 64 x 64 pixels: half the compute of the student.
_DEEP = {"stem_type": "deep", "stem_width": 16}
_RESNET = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], **_DEEP}
_REDNET = {"layers": [1, 2, 2, 1], "channels": [32, 64, 128, 192], "stem_width": 16}

_BASE = Recipe(
    student=StudentConfig(model=VIT, model_args=SHAPE),
    objectives={"ce": CE},
    data=DataConfig(workers=0, augment=AUGMENTS["small"]),
    optim=OptimConfig(lr=1e-3, weight_decay=0.05, warmup_epochs=2.0, min_lr=1e-5, clip_grad=1.0),
    train=TrainConfig(epochs=30, batch_size=128, log_every=20),
)
_MAE = replace(
    _BASE,
    student=replace(_BASE.student, init="mae"),
    objectives={
        "mae": PixelReconstruction(
            decoder_dim=64, decoder_depth=1, decoder_num_heads=4, norm_pix=True
        )
    },
    masking=RandomMasking(mask_rate=0.75),
    data=DataConfig(workers=0, augment=replace(AUGMENTS["small"], crop="rrc", scale=(0.2, 1.0))),
    optim=replace(_BASE.optim, opt_args={"betas": [0.9, 0.95]}, min_lr=0.0, warmup_prefix=True),
    train=replace(_BASE.train, eval_every=5),
)
_FINE_TUNING = replace(
    _BASE,
    student=StudentConfig(model="stage:pretrain", model_args={"global_pool": "avg"}),
    optim=replace(_BASE.optim, layer_decay=0.75),
)
_ONE = {"teacher": TeacherConfig()}
_TWO = {"teachers": {"conv": TeacherConfig(), "inv": TeacherConfig()}, "objectives": LOSSES}
# As usual for CIFAR; at a temperature of 2 and halves it taught far less (LOG.md, few labels).
_SOFT = {
    "ce": CrossEntropy(weight=0.1, smoothing=0.1),
    "kd": SoftKD(weight=0.9, temperature=4.0),
}
_HALF_SEEN = MaskedKD(keep_rate=0.5)

_TAUGHT: dict[str, dict[str, Any]] = {
    "kd": {"objectives": _SOFT},
    "maskedkd": {"objectives": _SOFT, "selector": _HALF_SEEN},
    **{
        name: {"objectives": OBJECTIVES[name]}
        for name in ("standardized_kd", "nkd", "vitkd", "vitkd_nkd", "guidance")
    },
    "masked_vitkd_nkd": {"objectives": OBJECTIVES["vitkd_nkd"], "selector": _HALF_SEEN},
    "few_labels": {
        "student": replace(_BASE.student, model_args={**SHAPE, "patch_size": 8}),
        "objectives": OBJECTIVES["standardized_kd"],
        "data": replace(_BASE.data, views=4),
        "optim": replace(_BASE.optim, warmup_epochs=1.0),
        "train": replace(_BASE.train, epochs=24, eval_every=4),
    },
}
"""How the student learns from a teacher run."""

_WIDE = StudentConfig(model=VIT, drop_path=0.1, model_args={**SHAPE, "embed_dim": 192})
_OTHERS: dict[str, dict[str, Any]] = {
    "alone": {},
    "teacher": {"student": _WIDE},
    "conv_teacher": {"student": StudentConfig(model="resnet18", image_size=64, model_args=_RESNET)},
    "inv_teacher": {"student": StudentConfig(model="rednet26", image_size=64, model_args=_REDNET)},
    "libkd": {"student": StudentConfig(model="advised_vit", model_args=_ADVISED), **_TWO},
    "cit": {"student": StudentConfig(model="cit_tiny_patch16_224", model_args=SHAPE), **_TWO},
}


def make(name: str) -> Recipe | Stages:
    key = name.removeprefix("small_images_")
    if key in _TAUGHT:
        return replace(_BASE, teachers=_ONE, **_TAUGHT[key])
    if key in _OTHERS:
        return replace(_BASE, **_OTHERS[key])
    if key == "mae":
        return _MAE
    pretrain = _MAE
    if key == "dmae":
        pretrain = replace(_MAE, teachers=_ONE, objectives={**_MAE.objectives, "dmae": DMAE()})
    return Stages(stages={"pretrain": pretrain, "finetune": _FINE_TUNING})
