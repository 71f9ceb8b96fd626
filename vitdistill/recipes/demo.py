"""The demo's runs: handwritten digits of 8 x 8 pixels, in 16 patches of 2 x 2."""

from dataclasses import replace

from ..data.augment import Augment
from ..methods.cross_entropy import CrossEntropy
from ..methods.kd import SoftKD
from ..methods.maskedkd import MaskedKD
from ..vit.patches import num_kept_patches
from .config import DataConfig, OptimConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig

KEEP_RATES = (0.75, 0.5)


def demo_recipes(images: str, teacher: str) -> dict[str, Recipe]:
    """Return the runs by the name of their folder: a teacher, and its students."""
    base = Recipe(
        description="teacher, 64 wide, 4 deep",
        student=_vit(64, 4, 4),
        objectives={"ce": CrossEntropy(smoothing=0.1)},
        data=DataConfig(
            dir=images, workers=0, augment=Augment(crop="pad", crop_padding=0, hflip=0.0)
        ),
        optim=OptimConfig(lr=2e-3, warmup_epochs=2.0, clip_grad=1.0),
        train=TrainConfig(
            epochs=24, batch_size=32, log_every=1000, eval_every=8, amp_dtype="float32"
        ),
    )
    alone = replace(
        base,
        description="student, 16 wide, 2 deep",
        student=_vit(16, 2, 2),
        optim=replace(base.optim, lr=6e-3),
    )
    taught = replace(
        alone,
        description="student, plain distillation",
        teachers={"teacher": TeacherConfig(model=teacher)},
        objectives={
            "ce": CrossEntropy(weight=0.5, smoothing=0.1),
            "kd": SoftKD(weight=0.5, temperature=2.0),
        },
    )
    recipes = {"teacher": base, "alone": alone, "kd": taught}
    for rate in KEEP_RATES:
        description = f"student, MaskedKD, {num_kept_patches(16, rate)} of 16 patches"
        masked = replace(taught, selector=MaskedKD(keep_rate=rate), description=description)
        recipes[f"maskedkd_{rate * 100:.0f}"] = masked
    return {name: replace(recipe, name=name) for name, recipe in recipes.items()}


def _vit(dim: int, depth: int, heads: int) -> StudentConfig:
    shape = {"embed_dim": dim, "depth": depth, "num_heads": heads}
    return StudentConfig(
        model="vit_tiny_patch16_224", model_args={"img_size": 8, "patch_size": 2, **shape}
    )
