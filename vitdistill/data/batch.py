"""A batch of training views."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import keyed
from ..keyed import I64

TargetReader = Callable[[I64, I64, npt.NDArray[np.uint32] | None, torch.device], Any]
"""``read(views, ids, checksums, device)`` returns what is stored of views, for the training step;
it checks their checksums where they are given."""


@dataclass(frozen=True)
class TeacherBatch:
    """Whole training images, mixed as a student would see them, for a teacher to label.

    Attributes:
        images: float32, in the student's normalisation, on the device.
        ids: the samples' numbers in the source, int64 (B,).
        checksums: of the views, uint32 (B,), see `view_checksums`.
    """

    images: Float[Tensor, "B 3 H W"]
    ids: I64
    checksums: npt.NDArray[np.uint32]


@dataclass
class Batch:
    """A micro-batch, all of it on the training device.

    Attributes:
        images: float32, normalised for the network.
        labels: int64, -1 where unlabelled.
        ids: the samples' numbers in the source, int64.
        views: which view of each sample this is, int64; the epoch, unless augmentation is repeated.
        view: the epoch.
        mixed_labels: the labels of the images mixed in, or None.
        lam: the weight of ``labels`` against ``mixed_labels``, or None.
        seed: the seed of the run's data, which keys `uniforms`.
        targets: what the `TargetReader` of each teacher with labels returned, on the device.
    """

    images: Float[Tensor, "B 3 H W"]
    labels: Int[Tensor, " B"]
    ids: Int[Tensor, " B"]
    views: Int[Tensor, " B"]
    view: int
    mixed_labels: Int[Tensor, " B"] | None = None
    lam: Float[Tensor, " B"] | None = None
    seed: int = 0
    targets: dict[str, Any] = field(default_factory=dict)

    def uniforms(
        self, count: int, stream: keyed.Stream = keyed.Stream.OBJECTIVE
    ) -> Float[Tensor, "B {count}"]:
        """Draw numbers in [0, 1) on the device, by seed, view, sample and stream alone."""
        keys = keyed.torch_keys(self.seed, self.views, self.ids, stream)
        return keyed.torch_uniforms(keys, count)
