"""A frozen teacher: a plain object, never saved, never trained, never wrapped for distribution."""

from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..data.augment import InputSpec
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..vit.walk import run_vit


class Teacher:
    """A network in evaluation mode, without gradients, with its own input contract.

    Args:
        model: moved to ``device`` and frozen in place.
        network: its description, with the number of classes it answers with after matching.
        spec: the image size and normalisation it was trained with.
        images_spec: those of the images it is given, which it renormalises and resizes.
        class_index: positions of the data set's classes among its own; None: as they are.
        dtype: precision of weights and arithmetic; None: float32, or the caller's autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        spec: InputSpec,
        images_spec: InputSpec,
        *,
        class_index: Int[Tensor, " C"] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.network = network
        self.dtype = dtype
        self.device = torch.device(device)
        self.model = model.to(device=self.device, dtype=dtype).eval().requires_grad_(False)
        self.class_index = None if class_index is None else class_index.to(self.device)
        self.run = run_vit
        self._images_spec = images_spec
        self._set_spec(spec)

    def with_spec(self, spec: InputSpec) -> "Teacher":
        """Return a teacher with the same weights and another input contract."""
        other = copy(self)
        plain = isinstance(self.model, VisionTransformer | Eva)
        if plain and spec.image_size != self.spec.image_size:
            # Copy only what depends on the size: parameters are shared.
            other.model = deepcopy(self.model, {id(p): p for p in self.model.parameters()})
            other.model.set_input_size(img_size=spec.image_size)  # type: ignore[operator]
        other._set_spec(spec)
        return other

    def _set_spec(self, spec: InputSpec) -> None:
        self.spec, images_spec = spec, self._images_spec
        # (x * std + mean - own mean) / own std, in one product and one sum.
        scale = [given / own for given, own in zip(images_spec.std, spec.std, strict=True)]
        shift = [
            (given - own) / std
            for given, own, std in zip(images_spec.mean, spec.mean, spec.std, strict=True)
        ]
        same = images_spec.mean == spec.mean and images_spec.std == spec.std
        self._scale = None if same else torch.tensor(scale, device=self.device).view(1, 3, 1, 1)
        self._shift = torch.tensor(shift, device=self.device).view(1, 3, 1, 1)

    def to(self, device: torch.device) -> None:
        """Move to ``device``, if it is elsewhere."""
        if device == self.device:
            return
        self.device = device
        self.model.to(device)
        self._shift = self._shift.to(device)
        if self._scale is not None:
            self._scale = self._scale.to(device)
        if self.class_index is not None:
            self.class_index = self.class_index.to(device)

    def prepare(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B 3 H W"]:
        """Return images with this teacher's own mean, std and size (bicubic, antialiased)."""
        images = images.float()
        if self._scale is not None:
            images = images * self._scale + self._shift
        if tuple(images.shape[-2:]) != tuple(self.spec.image_size):
            images = F.interpolate(
                images, self.spec.image_size, mode="bicubic", antialias=True, align_corners=False
            )
        return images if self.dtype is None else images.to(self.dtype)

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "B 3 h w"], needs: Needs, keep: Int[Tensor, "B K"] | None = None
    ) -> ViTOutput:
        """Answer images in the student's normalisation; ``keep`` indexes its own patch grid."""
        if self.model.training:  # the caller may have changed it since
            self.model.eval()
        # A teacher with its own precision ignores the caller's autocast.
        own = None if self.dtype is None else torch.autocast(self.device.type, enabled=False)
        with own or nullcontext():
            output = self.run(self.model, self.prepare(images), needs, keep)
        if self.class_index is not None and output.logits is not None:
            output = replace(output, logits=output.logits[:, self.class_index], head_logits=None)
        return output
