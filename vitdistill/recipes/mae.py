"""Plain masked autoencoders (arXiv 2111.06377), ImageNet-1k at 224, without a teacher: 800 epochs
of pre-training, then fine-tuning.

The folder of their first stage, ``pretrain``, is a teacher for the DMAE recipes.

Source: PRETRAIN.md and FINETUNE.md of facebookresearch/mae@efb2a80. The accuracies are those of
1,600 epochs (``pretrain.train.epochs``). What differs is said in
`vitdistill.recipes.dmae`, whose stages these are.
"""

from dataclasses import replace

from ..methods.mae import PixelReconstruction
from .dmae import fine_tuning, pretraining
from .stages import Stages


def make(name: str) -> Stages:
    """Return ``mae_base`` or ``mae_large``."""
    taught, fine = pretraining("base", "large", 0.75, first=True), fine_tuning(first=True)
    # timm has no ViT-L with ImageNet's normalisation: make DeiT's ViT-B deeper and wider.
    large = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
    pretrain = replace(
        taught,
        student=replace(taught.student, model_args=large if name == "mae_large" else {}),
        teachers={},
        objectives={"mae": PixelReconstruction(norm_pix=True)},
        train=replace(taught.train, epochs=800),
    )
    optim = replace(fine.optim, layer_decay=0.65)
    if name == "mae_large":
        optim = replace(fine.optim, lr=4e-3, layer_decay=0.75)  # 1e-3 for 256 images
        student, train = replace(fine.student, drop_path=0.2), replace(fine.train, epochs=50)
        fine = replace(fine, student=student, train=train)
    return Stages(stages={"pretrain": pretrain, "finetune": replace(fine, optim=optim)})
