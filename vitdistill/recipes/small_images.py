"""32 x 32 images (CIFAR and the like), sized to finish on a laptop: a ViT teacher trained on the
spot, and a student half as wide.
"""

from dataclasses import replace

from ..data.augment import AUGMENTS
from ..methods.base import Objective
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


_CE: dict[str, Objective] = {"ce": CrossEntropy(smoothing=0.1)}
_SOFT: dict[str, Objective] = {
    "ce": CrossEntropy(weight=0.5, smoothing=0.1),
    "kd": SoftKD(weight=0.5, temperature=2.0),
}
# The paper's weights of ViTKD are for sums over 196 patches; here they are on means.
_VITKD: dict[str, Objective] = {"vitkd": ViTKD(reduction="mean")}
_TAUGHT: dict[str, tuple[str, dict[str, Objective]]] = {
    "kd": ("plain KD", _SOFT),
    "maskedkd": ("MaskedKD", _SOFT),
    "nkd": ("NKD", {**_CE, "nkd": NKD()}),
    "vitkd": ("ViTKD (features)", {**_CE, **_VITKD}),
    "vitkd_nkd": ("ViTKD and NKD", {**_CE, "nkd": NKD(), **_VITKD}),
    "masked_vitkd_nkd": ("ViTKD and NKD under MaskedKD", {**_CE, "nkd": NKD(), **_VITKD}),
}
"""What the student learns by from a teacher run, and its objectives."""

_ALONE: dict[str, tuple[str, StudentConfig]] = {
    "alone": (
        "ViT 96 wide, 6 deep, on 32 x 32 images, alone, 30 epochs",
        StudentConfig(model="vit_tiny_patch16_224", model_args=_vit(96, 6, 3)),
    ),
    "teacher": (
        "ViT 192 wide, 6 deep, on 32 x 32 images: a teacher for the other small_images recipes",
        StudentConfig(model="vit_tiny_patch16_224", drop_path=0.1, model_args=_vit(192, 6, 3)),
    ),
    # 1.2 M parameters each, on 64 x 64 pixels: half the compute of the student.
    "conv_teacher": (
        "a narrow ResNet at 64 x 64, 30 epochs: the convolutional teacher of small_images_libkd",
        StudentConfig(
            model="resnet18",
            image_size=64,
            model_args={
                "layers": [1, 1, 1, 1],
                "channels": [32, 64, 128, 256],
                "stem_type": "deep",
                "stem_width": 16,
            },
        ),
    ),
    "inv_teacher": (
        "a narrow RedNet at 64 x 64, 30 epochs: the involutional teacher of small_images_libkd",
        StudentConfig(
            model="rednet26",
            image_size=64,
            model_args={"layers": [1, 2, 2, 1], "channels": [32, 64, 128, 192], "stem_width": 16},
        ),
    ),
}
_ADVISED: dict[str, tuple[str, StudentConfig]] = {
    "libkd": (
        "the small_images student with a token for each of two teachers, conv and inv",
        StudentConfig(
            model="advised_vit",
            model_args={
                "base": "vit_tiny_patch16_224",
                "teachers": ["conv", "inv"],
                **_vit(96, 6, 3),
            },
        ),
    ),
    "cit": (
        "small_images_libkd with Co-advise's convolutional and involutional stems in the place of"
        " the patch embedding",
        StudentConfig(model="cit_tiny_patch16_224", model_args=_vit(96, 6, 3)),
    ),
}


def make(name: str) -> Recipe | Stages:
    """Return a recipe of this family."""
    key = name.removeprefix("small_images_")
    if key in ("mae_finetuned", "dmae"):
        return _in_stages(name)
    recipe = _mae() if key == "mae" else _alone("alone")
    if key in _ALONE:
        recipe = _alone(key)
    elif key in _TAUGHT:
        method, objectives = _TAUGHT[key]
        recipe = replace(
            recipe,
            description=f"the small_images student by {method} from a teacher run",
            teachers={"teacher": TeacherConfig()},
            objectives=dict(objectives),
            selector=MaskedKD(keep_rate=0.5) if key.startswith("masked") else None,
        )
    elif key in _ADVISED:
        description, student = _ADVISED[key]
        recipe = replace(
            recipe,
            description=description,
            student=student,
            teachers={"conv": TeacherConfig(), "inv": TeacherConfig()},
            objectives=losses(),
        )
    return replace(recipe, name=name)


def _alone(key: str) -> Recipe:
    description, student = _ALONE[key]
    return Recipe(
        description=description,
        student=student,
        objectives=dict(_CE),
        data=DataConfig(workers=0, augment=AUGMENTS["small"]),
        optim=OptimConfig(
            opt="adamw", lr=1e-3, weight_decay=0.05, warmup_epochs=2.0, min_lr=1e-5, clip_grad=1.0
        ),
        train=TrainConfig(epochs=30, batch_size=128, log_every=20),
    )


def _mae() -> Recipe:
    recipe = _alone("alone")
    mae = PixelReconstruction(decoder_dim=64, decoder_depth=1, decoder_num_heads=4, norm_pix=True)
    augment = replace(AUGMENTS["small"], crop="rrc", scale=(0.2, 1.0))
    return replace(
        recipe,
        description=(
            "the small_images student pre-trained by MAE at 75 % masked: no labels, 30 epochs"
        ),
        student=replace(recipe.student, init="mae"),
        objectives={"mae": mae},
        masking=RandomMasking(mask_rate=0.75),
        data=DataConfig(workers=0, augment=augment),
        optim=replace(
            recipe.optim, opt_args={"betas": [0.9, 0.95]}, min_lr=0.0, warmup_prefix=True
        ),
        train=replace(recipe.train, eval_every=5),
    )


def _in_stages(name: str) -> Stages:
    """Return MAE, or DMAE from the run of a wider MAE, then fine-tuning."""
    pretrain, fine = replace(_mae(), description=""), replace(_alone("alone"), description="")
    description = "the small_images student pre-trained by MAE, then fine-tuned, 30 epochs each"
    if name == "small_images_dmae":
        description = "the same by DMAE from the run of a wider small_images_mae"
        pretrain = replace(
            pretrain,
            teachers={"teacher": TeacherConfig()},
            objectives={**pretrain.objectives, "dmae": DMAE()},
        )
    fine = replace(
        fine,
        student=StudentConfig(model="stage:pretrain", model_args={"global_pool": "avg"}),
        optim=replace(fine.optim, layer_decay=0.75),
    )
    return Stages(
        name=name, description=description, stages={"pretrain": pretrain, "finetune": fine}
    )
