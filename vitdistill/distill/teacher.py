"""A frozen teacher: a plain object that is never saved, never trained and never wrapped for
distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..data.views import InputSpec
from ..errors import ConfigError
from ..methods.base import Network
from ..vit.walk import Needs, ViTOutput, run_vit


class Teacher:
    """A network in evaluation mode, without gradients, with its own input contract.

    Args:
        model: moved to ``device`` and frozen in place.
        network: its description, with the number of classes it answers with after matching.
        spec: the image size and normalisation it was trained with.
        images_spec: those of the images it will be given; they are renormalised, and resized if the
            sizes differ.
        class_index: ``(C,)`` positions of the data set's classes among its own; None: as they are.
        dtype: precision of its weights and arithmetic; None: float32, or the autocast the caller is
            in.
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
        self.spec = spec
        self.dtype = dtype
        self.device = torch.device(device)
        self.model = model.to(device=self.device, dtype=dtype).eval().requires_grad_(False)
        self.class_index = None if class_index is None else class_index.to(self.device)
        self.run = run_vit
        scale = [ours / its for ours, its in zip(images_spec.std, spec.std, strict=True)]
        shift = [
            (ours - its) / std
            for ours, its, std in zip(images_spec.mean, spec.mean, spec.std, strict=True)
        ]
        same = images_spec.mean == spec.mean and images_spec.std == spec.std
        self._scale = None if same else torch.tensor(scale, device=self.device).view(1, 3, 1, 1)
        self._shift = torch.tensor(shift, device=self.device).view(1, 3, 1, 1)

    def prepare(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images as this teacher expects them: its own mean and std, its own size (bicubic,
        antialiased).
        """
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
        """Its answer to images in the student's normalisation; ``keep`` indexes its own patch
        grid.
        """
        device = self.device.type
        with torch.autocast(
            device, enabled=self.dtype is None and torch.is_autocast_enabled(device)
        ):
            output = self.run(self.model, self.prepare(images), needs, keep)
        if self.class_index is not None and output.logits is not None:
            output = replace(output, logits=output.logits[:, self.class_index], head_logits=None)
        return output


@dataclass(frozen=True)
class ClassMatch:
    """How a teacher's classes answer for the data set's: positions to pick (None: as they are), and
    a remark for the user.

    ``classes`` are the names it then answers with, in order; empty when it carries none.
    """

    index: tuple[int, ...] | None
    remark: str
    classes: tuple[str, ...] = ()


_FLAGS = {
    "teacher": {
        "model": "--teacher-model",
        "checkpoint": "--teacher-path",
        "pretrained": "--teacher-pretrained",
        "image_size": "--teacher-img-size",
        "precision": "--teacher-precision",
        "reorder_classes": "--reorder-classes",
    },
    "model": {  # that of `eval`
        "checkpoint": "--model-path",
        "pretrained": "--pretrained",
        "image_size": "--img-size",
        "reorder_classes": "--reorder-classes",
    },
}


def setting(name: str, field: str, value: str = "") -> str:
    """How a field of the teacher of this name is given on the command line: flags are for the one
    called ``teacher``.

    Without a value it is switched on.

    Example:
        >>> setting("teacher", "checkpoint", "FILE"), setting("conv", "pretrained")
        ('--teacher-path FILE', '--set teachers.conv.pretrained=true')
    """
    flag = _FLAGS.get(name, {}).get(field)
    return (
        f"--set teachers.{name}.{field}={value or 'true'}"
        if flag is None
        else f"{flag} {value}".rstrip()
    )


def match_classes(
    name: str,
    teacher_classes: Sequence[str] | None,
    teacher_count: int,
    classes: Sequence[str],
    reorder: bool,
    source: str = "",
) -> ClassMatch:
    """Match a teacher's classes to the data set's by name; ``source`` is the file its answers are
    in, where it does not run.

    A teacher that knows more classes answers for the data set's alone. Names in another order are
    used only when ``reorder`` is set, so that a surprise is seen. A teacher that carries no class
    names is taken at its count, and the preflight proves its order.

    Raises:
        ConfigError: a class is missing, the order differs, or the counts do.
    """
    who, ours = f"the {name} of {source}" if source else f"the {name}", tuple(classes)
    if teacher_classes is None:
        if teacher_count != len(ours):
            raise ConfigError(
                f"{who} answers with {teacher_count} classes and the data set has {len(ours)}:"
                " train or fine-tune a teacher on these classes, or give one whose config.json"
                " names its classes (label_names)"
            )
        return ClassMatch(
            None, "it carries no class names: their order is proved by its accuracy", ours
        )
    its = tuple(teacher_classes)
    if len(its) != teacher_count:
        raise ConfigError(
            f"{who} names {len(its)} classes but answers with {teacher_count}: its config.json is"
            " wrong"
        )
    if its == ours:
        return ClassMatch(None, "its classes are the data set's, in order", ours)
    position = {label: i for i, label in enumerate(its)}
    missing = [label for label in ours if label not in position]
    if missing:
        shown = ", ".join(repr(label) for label in missing[:3]) + (
            ", ..." if len(missing) > 3 else ""
        )
        raise ConfigError(
            f"{who} does not know {len(missing)} of the data set's {len(ours)} classes ({shown}):"
            " give a teacher trained on them"
        )
    index = tuple(position[label] for label in ours)
    twice = (
        next((label for label in ours if its.count(label) > 1), None)
        if len(position) < len(its)
        else None
    )
    if twice is not None:
        raise ConfigError(
            f"{who} has two classes called {twice!r}, and one is meant: give them different names"
            " in its config.json"
        )
    if len(its) == len(ours) and not reorder:
        first = next(
            i for i, (our, other) in enumerate(zip(ours, its, strict=True)) if our != other
        )
        raise ConfigError(
            f"{who} has the data set's classes in another order (class {first} is {ours[first]!r}"
            f" in the data set and {its[first]!r} in {who}): pass"
            f" {setting(name, 'reorder_classes')} to match them by name"
        )
    kind = (
        "are reordered by name"
        if len(its) == len(ours)
        else f"are {len(ours)} of its {len(its)}, by name"
    )
    return ClassMatch(index, f"the data set's classes {kind}", ours)
