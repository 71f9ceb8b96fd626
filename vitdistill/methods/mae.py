"""Masked autoencoding: the student's features of the visible patches, and a small decoder, predict
the pixels of the hidden ones.

Source: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022, arXiv 2111.06377,
checked against facebookresearch/mae@efb2a80 and UCSC-VLAA/DMAE@a0f4959.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..models.mae import MAEDecoder, patchify, pixel_targets, unpatchify
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.patches import gather_patches
from .base import Labelled, Objective


@dataclass(frozen=True, kw_only=True)
class PixelReconstruction(Objective):
    """The pixels of hidden patches, predicted from the visible ones by a decoder that is dropped
    afterwards. Needs a masking.

    At high mask rates the decoder, which runs on every patch, costs more than the encoder:
    ``decoder_depth`` is the knob.

    Args:
        decoder_dim: width of the decoder.
        decoder_depth: its blocks, at least 1; 8 in the paper.
        decoder_num_heads: its attention heads; has to divide ``decoder_dim``.
        norm_pix: predict each patch's pixels less their mean, over their standard deviation. MAE's
            own training has it; the DMAE repository's pre-training script had it in its first
            release and lost it the day after.
    """

    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    norm_pix: bool = False

    reads_teacher: ClassVar[bool] = False
    needs_masking: ClassVar[bool] = True
    goes_with: ClassVar[tuple[str, ...]] = ("random_masking",)
    formula: ClassVar[str] = (
        "|prediction - pixels|^2, mean over the pixels of hidden patches and the batch"
    )
    paper: ClassVar[str] = (
        "MAE (He et al., CVPR 2022, [2111.06377](https://arxiv.org/abs/2111.06377))"
    )
    use_when: ClassVar[str] = (
        "The student is pre-trained on images without labels, alone or beside `dmae`; it is"
        " fine-tuned afterwards."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decoder_dim", "decoder_depth", "decoder_num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}: give a whole number, at least 1"
                )
        if self.decoder_dim % self.decoder_num_heads or self.decoder_dim % 4:
            raise ConfigError(
                f"decoder_dim is {self.decoder_dim}: it has to be a multiple of 4 and of"
                f" decoder_num_heads ({self.decoder_num_heads})"
            )

    def check(self, student: Network, teacher: Network | None) -> None:
        if (
            student.walks
            and tuple(a * b for a, b in zip(student.grid, student.patch_size, strict=True))
            != student.image_size
        ):
            height, width = student.image_size
            raise ConfigError(
                f"masked autoencoding predicts pixels, and the patches of {student.architecture} do"
                f" not cut its images of {height} x {width} into pixels: take a plain ViT without a"
                " convolutional stem, whose patches fill the image"
            )
        if student.walks and not student.final_norm:
            remedy = "model_args.global_pool=token; it may pool when it is fine-tuned"
            if not student.has_class_token:  # whose features timm lets it pool alone
                remedy = "model_args.fc_norm=false"
            raise ConfigError(
                f"{student.architecture} norms its features after pooling, and masked autoencoding"
                f" reads them before: pre-train it with {remedy}"
            )

    def student_needs(self, student: Network) -> Needs:
        return Needs(features=True)

    def adapter(self, student: Network, teacher: Network | None) -> nn.Module | None:
        return MAEDecoder(
            student.dim,
            student.grid,
            student.patch_size,
            self.decoder_dim,
            self.decoder_depth,
            self.decoder_num_heads,
        )

    def describe(self, student: Network, teacher: Network | None, num_keep: int | None) -> str:
        blocks = "1 block" if self.decoder_depth == 1 else f"{self.decoder_depth} blocks"
        target = (
            "pixels normalised patch by patch"
            if self.norm_pix
            else "pixels as the network sees them"
        )
        return f"decoder of {blocks}, {self.decoder_dim} wide; {target}"

    def pictures(
        self, student: ViTOutput, batch: Labelled, adapter: nn.Module | None
    ) -> dict[str, Float[Tensor, "B 3 h w"]]:
        """The visible patches on grey, and the image with its hidden patches predicted.

        Under ``norm_pix`` a predicted patch is given the true one's mean and deviation, without
        which there is nothing to see.
        """
        assert (
            isinstance(adapter, MAEDecoder)
            and student.features is not None
            and student.keep is not None
        )
        prediction = adapter(student.features, student.keep, student.num_prefix_tokens).float()
        target = patchify(batch.images.float(), adapter.patch_size)
        hidden = target.new_ones(target.shape[:2]).scatter(1, student.keep, 0.0).bool()[:, :, None]
        if self.norm_pix:
            prediction = prediction * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(
                -1, keepdim=True
            )
        rows = {
            "visible": target.masked_fill(hidden, 0.0),
            "predicted": prediction.where(hidden, target),
        }
        return {
            name: unpatchify(patches, adapter.grid, adapter.patch_size)
            for name, patches in rows.items()
        }

    def loss(
        self,
        student: ViTOutput,
        teacher: ViTOutput | None,
        batch: Labelled,
        adapter: nn.Module | None,
    ) -> Float[Tensor, ""]:
        assert (
            isinstance(adapter, MAEDecoder)
            and student.features is not None
            and student.keep is not None
        )
        prediction, hidden = adapter.decode_hidden(
            student.features, student.keep, student.num_prefix_tokens
        )
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        target = gather_patches(
            pixel_targets(batch.images.to(dtype), adapter.patch_size, self.norm_pix), hidden
        )
        return (prediction.to(dtype) - target).square().sum() / max(target.numel(), 1)
