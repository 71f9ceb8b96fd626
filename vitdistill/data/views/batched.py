"""Training views of images held in memory, made in batches on the device."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ... import keyed
from ...errors import ConfigError
from ...keyed import I64, Stream
from ..augment import Augment, InputSpec
from .geometry import CROP_UNIFORMS, crop_and_flip, random_boxes, resize_boxes
from .randaugment import Operation, Policy, apply_operations, draw_jitter


def can_batch(augment: Augment, spec: InputSpec) -> bool:
    """Whether `BatchViews` has every operation of ``augment``: all but AutoAugment, AugMix and
    timm's ``t`` sets.
    """
    return augment.aa is None or Policy.of(augment.aa, spec.mean, augment.interpolation) is not None


class BatchViews:
    """Training views of images held in memory, made in batches on a device.

    ``images`` are what `prepare` gives, all of one size, as uint8 (N, 3, H, W) or (N, H, W, 3) in
    the host's memory.
    """

    def __init__(
        self, images: UInt8[Tensor, "N a b c"], augment: Augment, spec: InputSpec, seed: int
    ) -> None:
        """Raises `ConfigError` when ``augment`` needs an operation that exists for single images
        only.
        """
        if not can_batch(augment, spec):
            raise ConfigError(
                f"aa={augment.aa!r} cannot run on batches in memory; set in_memory to false."
            )
        self.images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
        self.augment, self.spec, self.seed = augment, spec, seed
        self.policy = (
            Policy.of(augment.aa, spec.mean, augment.interpolation) if augment.aa else None
        )
        self.fill = torch.tensor([min(255, round(255 * m)) for m in spec.mean], dtype=torch.uint8)

    def __call__(
        self, sample_ids: I64, views: I64, device: torch.device | str = "cpu"
    ) -> UInt8[Tensor, "B 3 h w"]:
        """Views of the samples, before normalisation and erasing; ids and views are int64 (B,) on
        the host.
        """
        chosen = self.images[torch.from_numpy(sample_ids)]
        if torch.device(device).type == "cuda":
            chosen = chosen.pin_memory()
        images = self._crop(chosen.to(device, non_blocking=True), sample_ids, views)
        for operations in self._draw_colours(sample_ids, views):
            images = apply_operations(images, operations, self.fill, self.augment.interpolation)
        return images

    def _keys(self, sample_ids: I64, views: I64, stream: Stream) -> keyed.U64:
        return keyed.keys(self.seed, views, sample_ids, stream)

    def _crop(
        self, images: UInt8[Tensor, "B 3 H W"], sample_ids: I64, views: I64
    ) -> UInt8[Tensor, "B 3 h w"]:
        augment, device = self.augment, images.device
        flip = keyed.uniforms(self._keys(sample_ids, views, Stream.FLIP), 1)[:, 0] < augment.hflip
        keys = self._keys(sample_ids, views, Stream.CROP)
        offsets = np.zeros((2, len(sample_ids)), dtype=np.int64)
        padding = 0
        if augment.crop == "rrc":
            draws = keyed.uniforms(keys, CROP_UNIFORMS)
            boxes = np.stack(
                random_boxes(draws, images.shape[2], images.shape[3], augment.scale, augment.ratio),
                axis=1,
            )
            images = resize_boxes(
                images, _send(boxes, device), self.spec.image_size, augment.interpolation
            )
        elif augment.crop == "pad":
            padding = augment.crop_padding
            offsets = np.floor(keyed.uniforms(keys, 2) * (2 * padding + 1)).astype(np.int64).T
        top, left, mirrored = _send(np.stack([*offsets, flip.astype(np.int64)]), device)
        return crop_and_flip(images, top, left, mirrored, padding)

    def _draw_colours(self, sample_ids: I64, views: I64) -> list[Operation]:
        keys = self._keys(sample_ids, views, Stream.AUGMENT)
        if self.policy is not None:
            return self.policy.draw(keys)
        if self.augment.color_jitter:
            return draw_jitter(keys, self.augment.color_jitter)
        return []


def _send(array: I64, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
