"""Training views of images held in memory, made in batches on the device."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ... import keyed
from ...keyed import I64, Stream
from ..augment import Augment, InputSpec
from .geometry import CROP_UNIFORMS, crop_and_flip, random_boxes, resize_boxes, send
from .randaugment import Policy, apply_operation


def can_batch(augment: Augment) -> bool:
    """Whether `BatchViews` has all of ``augment``: RandAugment, and no jitter of colours."""
    return Policy.of(augment.aa) is not None if augment.aa else augment.color_jitter == 0.0


class BatchViews:
    """Training views of images held in memory, a pure function of (seed, view, sample id).

    ``images`` are what `prepare` gives, all of one size, on the host; `can_batch` must hold.
    """

    def __init__(
        self, images: UInt8[Tensor, "N 3 H W"], augment: Augment, spec: InputSpec, seed: int
    ) -> None:
        self.images, self.augment, self.spec, self.seed = images, augment, spec, seed
        self._policy = Policy.of(augment.aa) if augment.aa else None
        self._fill = torch.tensor([min(255, round(255 * m)) for m in spec.mean], dtype=torch.uint8)

    def __call__(
        self, sample_ids: I64, views: I64, device: torch.device | str = "cpu"
    ) -> UInt8[Tensor, "B 3 h w"]:
        """Make views on ``device``, before normalisation and erasing; ids and views int64 (B,)."""
        chosen = self.images[torch.from_numpy(sample_ids)]
        if torch.device(device).type == "cuda":
            chosen = chosen.pin_memory()
        images = self._crop(chosen.to(device, non_blocking=True), sample_ids, views)
        if self._policy is not None:
            for operation in self._policy.draw(self._keys(sample_ids, views, Stream.AUGMENT)):
                images = apply_operation(images, operation, self._fill, self.augment.interpolation)
        return images

    def _keys(self, sample_ids: I64, views: I64, stream: Stream) -> keyed.U64:
        return keyed.keys(self.seed, views, sample_ids, stream)

    def _crop(
        self, images: UInt8[Tensor, "B 3 H W"], sample_ids: I64, views: I64
    ) -> UInt8[Tensor, "B 3 h w"]:
        augment, device = self.augment, images.device
        flip = keyed.uniforms(self._keys(sample_ids, views, Stream.FLIP), 1)[:, 0] < augment.hflip
        keys = self._keys(sample_ids, views, Stream.CROP)
        offsets, padding = np.zeros((2, len(sample_ids)), dtype=np.int64), 0
        if augment.crop == "rrc":
            draws = keyed.uniforms(keys, CROP_UNIFORMS)
            height, width = images.shape[2:]
            boxes = random_boxes(draws, height, width, augment.scale, augment.ratio)
            place = send(np.stack(boxes, axis=1), device)
            images = resize_boxes(images, place, self.spec.image_size, augment.interpolation)
        elif augment.crop == "pad":
            padding = augment.crop_padding
            offsets = np.floor(keyed.uniforms(keys, 2) * (2 * padding + 1)).astype(np.int64).T
        top, left, mirrored = send(np.stack([*offsets, flip.astype(np.int64)]), device)
        return crop_and_flip(images, top, left, mirrored, padding)
