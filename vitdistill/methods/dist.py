"""DIST: the student's probabilities need only correlate with the teacher's.

They correlate over the classes of an image, and over the images of a class.

Source: "Knowledge Distillation from A Stronger Teacher", Huang et al., NeurIPS 2022, arXiv
2205.10536, checked against hunto/DIST_KD@6d93ca0 (segmentation, without a temperature) and its
first author's hunto/LocalMamba@45dbff7 (classification, with T^2).
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..option import option
from .base import Scalar, Truth
from .kd import Logits, SoftLogitObjective, check_logits


def pearson(student: Float[Tensor, "R M"], teacher: Float[Tensor, "R M"]) -> Float[Tensor, " R"]:
    """Return the correlation of each row of ``student`` with the same row of ``teacher``.

    Constant rows give 0 and no gradient, which would only be that of rounding errors. As in the
    authors' code, 1e-8 is added to the product of the norms, so rows of very small variance count
    less.
    """
    a, b = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    norm_a, norm_b = a.norm(dim=-1), b.norm(dim=-1)
    # False for NaN, which stays NaN.
    constant = (norm_a <= 1e-6 * student.norm(dim=-1)) | (norm_b <= 1e-6 * teacher.norm(dim=-1))
    return ((a * b).sum(-1) / (norm_a * norm_b + 1e-8)).masked_fill(constant, 0.0)


def dist_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Scalar:
    """Return ``T^2 (beta (1 - mean_b r_b) + gamma (1 - mean_c r_c))``, in float32.

    It lies between 0 and 2 T^2 (beta + gamma). r_b is the Pearson correlation of the two networks'
    probabilities over the classes of image b, r_c over the images of class c; the probabilities are
    a softmax at temperature T. The second term compares the images of a batch, so the loss depends
    on what shares a batch; in a batch of 1 that term is the constant ``gamma T^2``. No gradient
    reaches the teacher.
    """
    check_logits(student_logits, teacher_logits, temperature)
    student = (student_logits.float() / temperature).softmax(-1)
    teacher = (teacher_logits.detach().float() / temperature).softmax(-1)
    over_classes = 1 - pearson(student, teacher).mean()
    over_images = 1 - pearson(student.T, teacher.T).mean()
    return temperature**2 * (beta * over_classes + gamma * over_images)


@dataclass(frozen=True, kw_only=True)
class DIST(SoftLogitObjective):
    """Distillation by correlation, for teachers too strong to be matched."""

    beta: float = option(1.0, "weight of the correlation over an image's classes", at_least=0)
    gamma: float = option(1.0, "weight of that over a micro-batch's images", at_least=0)

    couples_images: ClassVar[bool] = True
    terms = ("beta", "gamma")
    formula = "T^2 (beta (1 - correlation over classes) + gamma (1 - correlation over the images))"
    paper = "DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536)"
    use_when = (
        "In place of kd when the teacher is much stronger and micro-batches large: published 82.3 %"
        " against 81.5 % (Swin-T from Swin-L)."
    )

    def compare(self, student: Logits, teacher: Logits, batch: Truth) -> Scalar:
        return dist_loss(student, teacher, self.beta, self.gamma, self.temperature)
