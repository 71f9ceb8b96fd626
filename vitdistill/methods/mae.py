"""Masked autoencoding: predict the pixels of hidden patches from features of the visible ones.

Source: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022, arXiv 2111.06377,
checked against facebookresearch/mae@efb2a80 and UCSC-VLAA/DMAE@a0f4959.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, Set
from ..models.mae import MAEDecoder, patchify, pixel_targets, unpatchify
from ..option import option
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import gather_patches
from .base import Objective, Scalar, Truth, require


@dataclass(frozen=True, kw_only=True)
class PixelReconstruction(Objective):
    """Pixels of hidden patches, predicted by a decoder that is dropped afterwards.

    Needs a masking. At high mask rates the decoder, which runs on every patch, costs more than the
    encoder: ``decoder_depth`` is the knob.
    """

    decoder_dim: int = option(512, "width of the decoder", at_least=4)
    decoder_depth: int = option(8, "its blocks; 8 in the paper", at_least=1)
    decoder_num_heads: int = option(16, "its heads; divides `decoder_dim`", at_least=1)
    norm_pix: bool = option(False, "predict each patch's pixels normalised, as MAE and not DMAE")

    reads_teacher: ClassVar[bool] = False
    needs_masking: ClassVar[bool] = True
    goes_with = ("random_masking",)
    formula = "|prediction - pixels|^2, mean over the pixels of hidden patches and the batch"
    paper = "MAE (He et al., CVPR 2022, arXiv 2111.06377)"
    use_when = "Pre-training without labels, alone or beside `dmae`; fine-tune afterwards."

    def __post_init__(self) -> None:
        super().__post_init__()
        dim, heads = self.decoder_dim, self.decoder_num_heads
        wanted = f"a multiple of 4 and of decoder_num_heads ({heads})"
        require(dim % heads == 0 and dim % 4 == 0, "decoder_dim", dim, wanted)

    def check(self, student: Network, teacher: None) -> None:
        (rows, columns), (height, width) = student.grid, student.patch_size
        if student.walks and (rows * height, columns * width) != student.image_size:
            what = f"the patches of {student.architecture} do not tile its images"
            fix = "take a plain ViT without a convolutional stem, whose patches fill the image"
            raise ConfigError(f"{what}, and mae predicts their pixels", fix, field="student.model")
        if student.walks and not student.final_norm:
            what = f"{student.architecture} norms its features after pooling, and mae reads them"
            rotary = "for rotary positions use_fc_norm=false"
            fixes = Set("student.model_args.fc_norm", False), rotary
            raise ConfigError(f"{what} before", fixes, field="student.model_args")

    def student_needs(self, student: Network) -> Needs:
        return Needs(features=True)

    def adapter(self, student: Network, teacher: None) -> MAEDecoder:
        return MAEDecoder(
            student.dim,
            student.grid,
            student.patch_size,
            self.decoder_dim,
            self.decoder_depth,
            self.decoder_num_heads,
        )

    def pictures(
        self, student: ViTOutput, batch: Truth, adapter: MAEDecoder
    ) -> dict[str, Float[Tensor, "B 3 h w"]]:
        """Return the visible patches on grey, and the image with its hidden patches predicted."""
        assert student.features is not None and student.keep is not None
        prediction = adapter(student.features, student.keep, student.num_prefix_tokens).float()
        target = patchify(batch.images.float(), adapter.patch_size)
        hidden = target.new_ones(target.shape[:2]).scatter(1, student.keep, 0.0).bool()[:, :, None]
        if self.norm_pix:  # there would be nothing to see without the true mean and deviation
            deviation = (target.var(-1, keepdim=True) + 1e-6).sqrt()
            prediction = prediction * deviation + target.mean(-1, keepdim=True)
        rows = {
            "visible": target.masked_fill(hidden, 0.0),
            "predicted": prediction.where(hidden, target),
        }
        return {
            name: unpatchify(patches, adapter.grid, adapter.patch_size)
            for name, patches in rows.items()
        }

    def loss(self, student: ViTOutput, teacher: None, batch: Truth, adapter: MAEDecoder) -> Scalar:
        assert student.features is not None and student.keep is not None
        prediction, hidden = adapter.decode_hidden(
            student.features, student.keep, student.num_prefix_tokens
        )
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        pixels = pixel_targets(batch.images.to(dtype), adapter.patch_size, self.norm_pix)
        target = gather_patches(pixels, hidden)
        return (prediction.to(dtype) - target).square().sum() / max(target.numel(), 1)
