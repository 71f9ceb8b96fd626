"""Feature distillation without labels: projected class token and patches after the final norm.

Source: "Accessing Vision Foundation Models via ImageNet-1K", Zhang et al., ICLR 2025, arXiv
2407.10366 (Proteus), checked against BeSpontaneous/Proteus-pytorch@d2f87ec
(pretrain/models_proteus_dinov2.py). What differs: its third term, on the masked patches of a second
pass of the student on a masked image, is left out (an objective receives one pass); its feature
term counts the class token as one more patch, which here is in the class term alone; networks
without a class token, unequal grids, and teachers that see some of their patches.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..option import option
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from .base import Scalar, TeacherObjective, Truth

Kind = Literal["mse", "smooth_l1", "cosine"]


class TokenAdapter(nn.Module):
    """The projections to the teacher's width: LayerNorm, then Linear; ``classes`` and ``patches``
    say whether there is a ``class_head`` and a ``patch_head``.
    """

    def __init__(
        self, student: Network, teacher: Network, *, classes: bool = True, patches: bool = True
    ) -> None:
        super().__init__()
        if classes:
            self.class_head = _projection(student.dims[-1], teacher.dims[-1])
        if patches:
            self.patch_head = _projection(student.dims[-1], teacher.dims[-1])


def _projection(student_dim: int, teacher_dim: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(student_dim), nn.Linear(student_dim, teacher_dim))


def class_vector(output: ViTOutput) -> Float[Tensor, "B D"]:
    """Return the class token after the final norm, or else the mean of the recorded patches."""
    assert output.features is not None
    if output.has_class_token:
        return output.features[:, 0]
    return output.feature_patches.vectors.mean(1)


def feature_loss(
    student: Float[Tensor, "*tokens D"], teacher: Float[Tensor, "*tokens D"], kind: Kind = "mse"
) -> Scalar:
    """Compare vectors of the same tokens, in float32, mean over tokens and batch.

    No gradient reaches the teacher. ``mse``: squared difference, mean over channels. ``smooth_l1``:
    half of it where the difference is below 1, else its size less a half. ``cosine``: one minus the
    cosine.
    """
    student, teacher = student.float(), teacher.detach().float()
    if kind == "cosine":
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
    return F.mse_loss(student, teacher) if kind == "mse" else F.smooth_l1_loss(student, teacher)


@dataclass(frozen=True, kw_only=True)
class TokenFeatures(TeacherObjective):
    """Feature distillation after the final norm; needs no head and no labels.

    The mean of the patches stands in for a missing class token (of those both saw, if the teacher
    sees more than the student). Networks that are run whole give the last feature map, after the
    final norm if they have one, and the class token where timm's features have it (CaiT, XCiT, not
    CNNs). Between unequal grids the student's features are resampled to
    the teacher's by position.
    """

    class_weight: float = option(1.0, "weight of the class token's term; 0: left out", at_least=0)
    patch_weight: float = option(
        1.0, "weight of the term on patches both saw; 0: left out", at_least=0
    )
    kind: Kind = option("mse", "of both: `mse`, `smooth_l1` or `cosine` (one minus it)")

    terms = ("class_weight", "patch_weight")
    formula = "class_weight |P(class) - class|^2 + patch_weight |P'(patches) - patches|^2, means"
    paper = "Proteus (Zhang et al., ICLR 2025, arXiv 2407.10366) without its masked term"
    use_when = "Pre-training a backbone without labels from a self-supervised teacher (DINOv2)."

    def student_needs(self, student: Network) -> Needs:
        return Needs(features=True)

    def teacher_needs(self, teacher: Network) -> Needs:
        return Needs(features=True)

    def adapter(self, student: Network, teacher: Network) -> TokenAdapter:
        return TokenAdapter(
            student, teacher, classes=self.class_weight > 0, patches=self.patch_weight > 0
        )

    def loss(
        self, student: ViTOutput, teacher: ViTOutput, batch: Truth, adapter: TokenAdapter
    ) -> Scalar:
        terms = []
        if self.class_weight > 0:
            projected = adapter.class_head(class_vector(student))
            term = feature_loss(projected, class_vector(teacher), self.kind)
            terms.append(self.class_weight * term)
        if self.patch_weight > 0:
            places = teacher.feature_patches
            projected = adapter.patch_head(student.feature_patches.at(places))
            terms.append(self.patch_weight * feature_loss(projected, places.vectors, self.kind))
        return torch.stack(terms).sum()
