"""DIST: correlations over classes and over images, and what becomes of rows that do not vary."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cases import Case, logit_cases, temperatures

from vitdistill.methods.dist import dist_loss


def correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean of numpy's over rows, each damped by the authors' 1e-8."""
    values = []
    for s, t in zip(ours, theirs, strict=True):
        norms = math.sqrt(((s - s.mean()) ** 2).sum() * ((t - t.mean()) ** 2).sum())
        values.append(np.corrcoef(s, t)[0, 1] * norms / (norms + 1e-8))
    return float(np.mean(values))


@given(
    case=logit_cases(least=2),
    beta=st.floats(0, 3),
    gamma=st.floats(0, 3),
    temperature=temperatures,
)
def test_it_is_numpys_correlation(
    case: Case, beta: float, gamma: float, temperature: float
) -> None:
    p, q = ((x.double() / temperature).softmax(-1).numpy() for x in case[:2])
    expected = beta * (1 - correlation(p, q)) + gamma * (1 - correlation(p.T, q.T))
    loss = dist_loss(*case[:2], beta, gamma, temperature).item() / temperature**2
    assert loss == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_a_batch_of_one_has_the_constant_for_its_images() -> None:
    student, teacher = (x.clone().requires_grad_() for x in torch.randn(2, 1, 5))
    whole, over_classes = (dist_loss(student, teacher, 1.0, gamma, 2.0) for gamma in (0.5, 0.0))
    assert (whole - over_classes).item() == pytest.approx(0.5 * 4)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (whole, over_classes)]
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constant", ["student", "teacher", "column"])
def test_rows_that_do_not_vary_correlate_with_nothing(constant: str, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 4, 1000)
    if constant == "student":
        student = torch.full_like(student, 0.7)
    elif constant == "teacher":
        teacher = torch.full_like(teacher, -0.3)
    else:
        student = student[:1].expand(4, 1000).clone()  # the same answer to every image
    student = student.to(dtype).requires_grad_()
    loss = dist_loss(student, teacher.to(dtype))
    loss.backward()
    assert student.grad is not None and student.grad.isfinite().all()
    assert student.grad.abs().max() < 1  # rounding errors are not amplified by a norm of almost 0
    assert constant == "column" or (loss.item() == 2 and not student.grad.any())


def test_nan_stays_nan() -> None:
    """A loss of 0 for answers that are no numbers would hide them."""
    logits = torch.randn(3, 5)
    for pair in ((logits * math.nan, logits), (logits, logits * math.nan)):
        assert dist_loss(*pair).isnan()
