"""A batch of training views."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
    """Whole training images, mixed as a student would see them, for a teacher to label."""

    images: Float[Tensor, "B 3 H W"]  # in the student's normalisation, on the device
    ids: I64  # the samples' numbers in the source
    checksums: npt.NDArray[np.uint32]  # of the views, by `view_checksums`


@dataclass
class Batch:
    """A micro-batch, all of it on the training device."""

    images: Float[Tensor, "B 3 H W"]  # normalised for the network
    labels: Int[Tensor, " B"]  # -1 where unlabelled
    ids: Int[Tensor, " B"]  # the samples' numbers in the source
    views: Int[Tensor, " B"]  # of each sample: the epoch, unless augmentation is repeated
    view: int  # the epoch
    mixed_labels: Int[Tensor, " B"] | None = None  # of the images mixed in
    lam: Float[Tensor, " B"] | None = None  # the weight of ``labels`` against ``mixed_labels``
    labelled: Int[Tensor, " L"] | None = None  # the rows with labels; None: all
    seed: int = 0  # of the run's data, which keys `uniforms`
    targets: dict[str, Any] = field(default_factory=dict)  # what each `TargetReader` returned

    def rows(self, index: Int[Tensor, " L"]) -> "Batch":
        """Return some of the images, without their stored targets."""
        names = ("images", "labels", "ids", "views", "mixed_labels", "lam")
        taken: Any = {x: held[index] for x in names if (held := getattr(self, x)) is not None}
        return replace(self, **taken, labelled=None, targets={})

    def uniforms(
        self, count: int, stream: keyed.Stream = keyed.Stream.OBJECTIVE
    ) -> Float[Tensor, "B {count}"]:
        """Draw numbers in [0, 1) on the device, by seed, view, sample and stream alone."""
        keys = keyed.torch_keys(self.seed, self.views, self.ids, stream)
        return keyed.torch_uniforms(keys, count)
