"""Plain masked autoencoders (arXiv 2111.06377), ImageNet-1k at 224, without a teacher: 800 epochs
of pre-training, then fine-tuning.

The folder of their first stage, ``pretrain``, is a teacher for the DMAE recipes.

Source: PRETRAIN.md and FINETUNE.md of facebookresearch/mae@efb2a80. The accuracies are those of
1,600 epochs (``pretrain.train.epochs``). What differs is said in
`vitdistill.recipes.dmae`, whose stages these are.
"""

from dataclasses import replace

from ..methods.mae import PixelReconstruction
from .config import Recipe
from .dmae import fine_tuning, pretraining
from .stages import Stages


def _stages(name: str, description: str, model_args: dict[str, int], finetune: Recipe) -> Stages:
    taught = pretraining("base", "large", 0.75, first=True)
    pretrain = replace(
        taught,
        student=replace(taught.student, model_args=dict(model_args)),
        teachers={},
        objectives={"mae": PixelReconstruction(norm_pix=True)},
        train=replace(taught.train, epochs=800),
    )
    return Stages(
        name=name,
        description=f"MAE at 75% masked: {description} in the paper, after 1,600 epochs",
        stages={"pretrain": pretrain, "finetune": finetune},
    )


def mae_base() -> Stages:
    """ViT-B."""
    fine = fine_tuning(first=True)
    fine = replace(fine, optim=replace(fine.optim, layer_decay=0.65))
    return _stages("mae_base", "ViT-B, 800 epochs, then fine-tuned; 83.6 % top-1", {}, fine)


def mae_large() -> Stages:
    """ViT-L, which timm has under no name with ImageNet's normalisation alone: DeiT's ViT-B, deeper
    and wider.
    """
    fine = fine_tuning(first=True)
    fine = replace(
        fine,
        student=replace(fine.student, drop_path=0.2),
        optim=replace(fine.optim, lr=4e-3, layer_decay=0.75),  # 1e-3 for 256 images
        train=replace(fine.train, epochs=50),
    )
    shape = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _stages("mae_large", "ViT-L, 800 epochs, then fine-tuned; 85.9 % top-1", shape, fine)
