"""The pairs of the DMAE paper (arXiv 2208.12256), ImageNet-1k at 224: 100 epochs of pre-training,
then 100 of fine-tuning.

Source: pretrain.sh and finetune.sh of UCSC-VLAA/DMAE. Five of their settings changed between the
first release (31a002c) and the day after (f97af68, the last to touch them), silently, and nobody
says which gave the published numbers. Both are here, the last release by default, the first as
``NAME:first_release``:

======================================  =============  ============
setting                                 first release  last release
======================================  =============  ============
pretrain.objectives.mae.norm_pix        true           false
pretrain.optim.warmup_epochs            40             20
finetune.student.drop_path              0.1            0.15
finetune.optim.layer_decay              0.70           0.75
finetune.optim.warmup_epochs            5              20
======================================  =============  ============

The authors' teacher file is mae_visualize_vit_large.pth (raw pixels); the repository has scripts
for ViT-B from ViT-L alone, and for the smaller students the same settings are used here: a user who
ran those got 75.3 % for ViT-S where the paper has 79.3 % (issue 6 of their repository). What
differs: class token and mask token are decayed there, the class token is not here; their new head
starts at a standard deviation of 2e-5, timm's at 0.02; they evaluate on 224 of 256 pixels, timm's
DeiT on 0.9 of the image; float16 there, bfloat16 here.
"""

from dataclasses import replace

from ..data.augment import AUGMENTS, Augment
from ..methods.cross_entropy import CrossEntropy
from ..methods.dmae import DMAE
from ..methods.mae import PixelReconstruction
from ..methods.masking import RandomMasking
from .config import DataConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig
from .stages import Stages

_TEACHERS = {"large": "vit_large_patch16_224.mae", "base": "vit_base_patch16_224.mae"}


def pretraining(size: str, teacher: str, mask_rate: float, first: bool) -> Recipe:
    """The first stage; ``first``: as first released."""
    return Recipe(
        name="pretrain",
        student=StudentConfig(model=f"deit_{size}_patch16_224", init="mae"),
        teachers={"teacher": TeacherConfig(model=_TEACHERS[teacher])},
        objectives={"mae": PixelReconstruction(norm_pix=first), "dmae": DMAE()},
        masking=RandomMasking(mask_rate=mask_rate),
        data=DataConfig(workers=8, augment=Augment(scale=(0.2, 1.0))),
        optim=OptimConfig(
            opt="adamw",
            lr=2.4e-3,  # 1.5e-4 for 256 images
            weight_decay=0.05,
            opt_args={"betas": [0.9, 0.95]},
            warmup_epochs=40.0 if first else 20.0,
            warmup_prefix=True,
            warmup_lr=0.0,
            min_lr=0.0,
        ),
        train=TrainConfig(epochs=100, batch_size=4096, eval_every=10),
    )


def fine_tuning(first: bool) -> Recipe:
    """The second stage, of a student of any size; ``first``: as first released."""
    return Recipe(
        name="finetune",
        student=StudentConfig(
            model="stage:pretrain",
            drop_path=0.1 if first else 0.15,
            model_args={"global_pool": "avg"},
        ),
        objectives={"ce": CrossEntropy(smoothing=0.1)},
        data=DataConfig(workers=8, augment=replace(AUGMENTS["deit"], repeated_aug=1)),
        optim=OptimConfig(
            opt="adamw",
            lr=2e-3,  # 5e-4 for 256 images
            weight_decay=0.05,
            opt_args={"betas": [0.9, 0.999]},
            layer_decay=0.70 if first else 0.75,
            warmup_epochs=5.0 if first else 20.0,
            warmup_prefix=True,
            warmup_lr=0.0,
            min_lr=1e-6,
        ),
        train=TrainConfig(epochs=100, batch_size=1024),
    )


def _pair(size: str, teacher: str, top1: str, first: bool, mask_rate: float = 0.75) -> Stages:
    name = f"dmae_{size}_from_mae_{teacher}" + (
        "" if mask_rate == 0.75 else f"_{mask_rate:.0%}".rstrip("%")
    )
    release = "first release" if first else "last release"
    pair = f"ViT-{size[0].upper()} from MAE ViT-{teacher[0].upper()}"
    return Stages(
        name=name + ("_first_release" if first else ""),
        description=f"DMAE at {mask_rate:.0%} masked: {pair}, then fine-tuned; {top1}; {release}",
        stages={
            "pretrain": pretraining(size, teacher, mask_rate, first),
            "finetune": fine_tuning(first),
        },
    )


def dmae_base_from_mae_large(first_release: bool = False) -> Stages:
    """ViT-B from MAE ViT-L at 75 %."""
    return _pair("base", "large", "84.0 % top-1 in the paper", first_release)


def dmae_base_from_mae_large_90(first_release: bool = False) -> Stages:
    """ViT-B from MAE ViT-L at 90 %."""
    return _pair("base", "large", "no number is known", first_release, 0.9)


def dmae_base_from_mae_large_95(first_release: bool = False) -> Stages:
    """ViT-B from MAE ViT-L at 95 %."""
    return _pair("base", "large", "83.6 % top-1 in the paper", first_release, 0.95)


def dmae_base_from_mae_large_98(first_release: bool = False) -> Stages:
    """ViT-B from MAE ViT-L at 98 %."""
    return _pair("base", "large", "82.4 % top-1 in the paper", first_release, 0.98)


def dmae_small_from_mae_base(first_release: bool = False) -> Stages:
    """ViT-S from MAE ViT-B at 75 %."""
    top1 = "79.3 % top-1 in the paper, which others could not reproduce"
    return _pair("small", "base", top1, first_release)


def dmae_tiny_from_mae_base(first_release: bool = False) -> Stages:
    """ViT-Ti from MAE ViT-B at 75 %."""
    return _pair("tiny", "base", "no number is known", first_release)
