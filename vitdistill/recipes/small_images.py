"""32 x 32 images (CIFAR and the like), sized to finish on a laptop: a ViT teacher trained on the
spot, and a student half as wide.
"""

from dataclasses import replace

from ..data.augment import AUGMENTS
from ..methods.cross_entropy import CrossEntropy
from ..methods.dmae import DMAE
from ..methods.kd import SoftKD
from ..methods.mae import PixelReconstruction
from ..methods.maskedkd import MaskedKD
from ..methods.masking import RandomMasking
from ..methods.nkd import NKD
from ..methods.vitkd import ViTKD
from .config import DataConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig
from .libkd import losses
from .stages import Stages


def _vit(dim: int, depth: int, heads: int) -> dict[str, int]:
    return {"img_size": 32, "patch_size": 4, "embed_dim": dim, "depth": depth, "num_heads": heads}


def small_images_alone() -> Recipe:
    """A ViT of width 96 and 6 blocks on 8 x 8 patches, alone."""
    return Recipe(
        name="small_images_alone",
        description="ViT 96 wide, 6 deep, on 32 x 32 images, alone, 30 epochs",
        student=StudentConfig(model="vit_tiny_patch16_224", model_args=_vit(96, 6, 3)),
        objectives={"ce": CrossEntropy(smoothing=0.1)},
        data=DataConfig(workers=0, augment=AUGMENTS["small"]),
        optim=OptimConfig(
            opt="adamw", lr=1e-3, weight_decay=0.05, warmup_epochs=2.0, min_lr=1e-5, clip_grad=1.0
        ),
        train=TrainConfig(epochs=30, batch_size=128, log_every=20),
    )


def small_images_teacher() -> Recipe:
    """The teacher: twice as wide, four times the compute."""
    recipe = small_images_alone()
    return replace(
        recipe,
        name="small_images_teacher",
        description=(
            "ViT 192 wide, 6 deep, on 32 x 32 images: a teacher for the other small_images recipes"
        ),
        student=StudentConfig(
            model="vit_tiny_patch16_224", drop_path=0.1, model_args=_vit(192, 6, 3)
        ),
    )


def small_images_kd() -> Recipe:
    """The same student by plain KD from a teacher run."""
    return replace(
        small_images_alone(),
        name="small_images_kd",
        description=("the small_images student by plain KD from a teacher run"),
        teachers={"teacher": TeacherConfig()},
        objectives={
            "ce": CrossEntropy(weight=0.5, smoothing=0.1),
            "kd": SoftKD(weight=0.5, temperature=2.0),
        },
    )


def small_images_maskedkd() -> Recipe:
    """The same student by MaskedKD, half of the teacher's patches."""
    return replace(
        small_images_kd(),
        name="small_images_maskedkd",
        description=("the small_images student by MaskedKD from a teacher run"),
        selector=MaskedKD(keep_rate=0.5),
    )


def small_images_nkd() -> Recipe:
    """The same student by NKD."""
    return replace(
        small_images_kd(),
        name="small_images_nkd",
        description=("the small_images student by NKD from a teacher run"),
        objectives={"ce": CrossEntropy(smoothing=0.1), "nkd": NKD()},
    )


def small_images_vitkd() -> Recipe:
    """The same student by ViTKD, with weights on means: the published ones are meant for 196
    patches.
    """
    return replace(
        small_images_kd(),
        name="small_images_vitkd",
        description=("the small_images student by ViTKD (features) from a teacher run"),
        objectives={"ce": CrossEntropy(smoothing=0.1), "vitkd": ViTKD(reduction="mean")},
    )


def small_images_vitkd_nkd() -> Recipe:
    """The same student by ViTKD and NKD."""
    return replace(
        small_images_kd(),
        name="small_images_vitkd_nkd",
        description=("the small_images student by ViTKD and NKD from a teacher run"),
        objectives={
            "ce": CrossEntropy(smoothing=0.1),
            "nkd": NKD(),
            "vitkd": ViTKD(reduction="mean"),
        },
    )


def small_images_masked_vitkd_nkd() -> Recipe:
    """ViTKD and NKD with half of the teacher's patches."""
    return replace(
        small_images_vitkd_nkd(),
        name="small_images_masked_vitkd_nkd",
        description=("the small_images student by ViTKD and NKD under MaskedKD from a teacher run"),
        selector=MaskedKD(keep_rate=0.5),
    )


def small_images_mae() -> Recipe:
    """The same student, pre-trained as a masked autoencoder; a teacher for small_images_dmae when
    it is made wider.
    """
    recipe = small_images_alone()
    return replace(
        recipe,
        name="small_images_mae",
        description=(
            "the small_images student pre-trained by MAE at 75 % masked: no labels, 30 epochs"
        ),
        student=replace(recipe.student, init="mae"),
        objectives={
            "mae": PixelReconstruction(
                decoder_dim=64, decoder_depth=1, decoder_num_heads=4, norm_pix=True
            )
        },
        masking=RandomMasking(mask_rate=0.75),
        data=DataConfig(
            workers=0, augment=replace(AUGMENTS["small"], crop="rrc", scale=(0.2, 1.0))
        ),
        optim=replace(
            recipe.optim, opt_args={"betas": [0.9, 0.95]}, min_lr=0.0, warmup_prefix=True
        ),
        train=replace(recipe.train, eval_every=5),
    )


def small_images_mae_finetuned() -> Stages:
    """MAE, then fine-tuning: what DMAE is compared with."""
    fine = replace(small_images_alone(), name="finetune", description="")
    fine = replace(
        fine, student=StudentConfig(model="stage:pretrain", model_args={"global_pool": "avg"})
    )
    fine = replace(fine, optim=replace(fine.optim, layer_decay=0.75))
    return Stages(
        name="small_images_mae_finetuned",
        description="the small_images student pre-trained by MAE, then fine-tuned, 30 epochs each",
        stages={
            "pretrain": replace(small_images_mae(), name="pretrain", description=""),
            "finetune": fine,
        },
    )


def small_images_dmae() -> Stages:
    """DMAE, then fine-tuning from the run of a wider MAE."""
    plain = small_images_mae_finetuned()
    pretrain = plain.stages["pretrain"]
    taught = replace(
        pretrain,
        teachers={"teacher": TeacherConfig()},
        objectives={**pretrain.objectives, "dmae": DMAE()},
    )
    return replace(
        plain,
        name="small_images_dmae",
        description=("the same by DMAE from the run of a wider small_images_mae"),
        stages={**plain.stages, "pretrain": taught},
    )


def small_images_conv_teacher() -> Recipe:
    """A convolutional teacher: a narrow ResNet of 1.2 M parameters that sees 64 x 64 pixels, half
    the compute of the student.
    """
    return replace(
        small_images_alone(),
        name="small_images_conv_teacher",
        description=(
            "a narrow ResNet at 64 x 64, 30 epochs: the convolutional teacher of small_images_libkd"
        ),
        student=StudentConfig(
            model="resnet18",
            image_size=64,
            model_args={
                "layers": [1, 1, 1, 1],
                "channels": [32, 64, 128, 256],
                "stem_type": "deep",
                "stem_width": 16,
            },
        ),
    )


def small_images_inv_teacher() -> Recipe:
    """An involutional teacher: a narrow RedNet of 1.2 M parameters that sees 64 x 64 pixels."""
    return replace(
        small_images_alone(),
        name="small_images_inv_teacher",
        description=(
            "a narrow RedNet at 64 x 64, 30 epochs: the involutional teacher of small_images_libkd"
        ),
        student=StudentConfig(
            model="rednet26",
            image_size=64,
            model_args={"layers": [1, 2, 2, 1], "channels": [32, 64, 128, 192], "stem_width": 16},
        ),
    )


def small_images_libkd() -> Recipe:
    """The same student with a learned token for each of two teachers, by Co-advise's losses."""
    recipe = small_images_alone()
    return replace(
        recipe,
        name="small_images_libkd",
        description=(
            "the small_images student with a token for each of two teachers, conv and inv"
        ),
        student=replace(
            recipe.student,
            model="advised_vit",
            model_args={
                "base": "vit_tiny_patch16_224",
                "teachers": ["conv", "inv"],
                **_vit(96, 6, 3),
            },
        ),
        teachers={"conv": TeacherConfig(), "inv": TeacherConfig()},
        objectives=losses(),
    )


def small_images_cit() -> Recipe:
    """The same with Co-advise's two stems, whose tokens' means are the teachers' tokens."""
    recipe = small_images_libkd()
    return replace(
        recipe,
        name="small_images_cit",
        description=(
            "small_images_libkd with Co-advise's convolutional and involutional stems in the place"
            " of the patch embedding"
        ),
        student=StudentConfig(model="cit_tiny_patch16_224", model_args=_vit(96, 6, 3)),
    )
