"""Training views of images held in memory, made in batches on the device."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ... import keyed
from ...keyed import Stream
from ..augment import Augment, InputSpec
from ..order import Samples
from .geometry import CROP_UNIFORMS, crop_and_flip, random_boxes, resize_boxes, send, send_images
from .randaugment import Policy, apply_operation


def can_batch(augment: Augment) -> bool:
    """Whether `BatchViews` supports all of ``augment``: RandAugment, but no colour jitter."""
    return Policy.of(augment.aa) is not None if augment.aa else augment.color_jitter == 0.0


class BatchViews:
    """Training views of images held in memory, a pure function of (seed, view, sample id).

    ``images`` are what `prepare` gives, all of one size, on the host; `can_batch` must hold.
    """

    def __init__(self, images: UInt8[Tensor, "N 3 H W"], augment: Augment, spec: InputSpec) -> None:
        self.images, self.augment, self.spec = images, augment, spec
        self._policy = Policy.of(augment.aa) if augment.aa else None
        self._fill = torch.tensor([min(255, round(255 * m)) for m in spec.mean], dtype=torch.uint8)

    def __call__(self, shown: Samples, device: torch.device) -> UInt8[Tensor, "B 3 h w"]:
        """Make views on ``device``, before normalisation and erasing."""
        images = self._crop(send_images(self.images[torch.from_numpy(shown.ids)], device), shown)
        if self._policy is not None:
            for operation in self._policy.draw(shown.keys(Stream.AUGMENT)):
                images = apply_operation(images, operation, self._fill, self.augment.interpolation)
        return images

    def _crop(self, images: UInt8[Tensor, "B 3 H W"], shown: Samples) -> UInt8[Tensor, "B 3 h w"]:
        augment, device = self.augment, images.device
        flip = keyed.uniforms(shown.keys(Stream.FLIP), 1)[:, 0] < augment.hflip
        keys = shown.keys(Stream.CROP)
        offsets, padding = np.zeros((2, len(keys)), dtype=np.int64), 0
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
