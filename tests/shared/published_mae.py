"""MAE's loss as it is published, over the patches of whole images."""

from torch import Tensor

from vitdistill.models.mae import patchify


def reconstruction_loss(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor,
    patch_size: tuple[int, int],
    norm_pix: bool = False,
) -> Tensor:
    """``mask`` is 1 at hidden patches; `forward_loss` of facebookresearch/mae@efb2a80."""
    target = patchify(images, patch_size)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (
            target.var(-1, keepdim=True) + 1e-6
        ).sqrt()
    error = (prediction - target).square().mean(-1)
    return (error * mask).sum() / mask.sum().clamp_min(1)
