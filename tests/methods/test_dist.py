"""DIST: correlations over classes and over images, and what becomes of rows that do not vary."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.methods.dist import dist_loss

Case = tuple[Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Student's and teacher's logits."""
    batch, classes = draw(st.integers(2, 8)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    student, teacher = draw(st.floats(0.5, 3)) * torch.randn(2, batch, classes, generator=generator)
    return student, teacher


temperatures = st.floats(0.5, 6)


def correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean of numpy's over rows, each damped by the authors' 1e-8."""
    values = []
    for s, t in zip(ours, theirs, strict=True):
        norms = math.sqrt(((s - s.mean()) ** 2).sum() * ((t - t.mean()) ** 2).sum())
        values.append(np.corrcoef(s, t)[0, 1] * norms / (norms + 1e-8))
    return float(np.mean(values))


@given(case=cases(), beta=st.floats(0, 3), gamma=st.floats(0, 3), temperature=temperatures)
def test_it_is_numpys_correlation(
    case: Case, beta: float, gamma: float, temperature: float
) -> None:
    student, teacher = ((x.double() / temperature).softmax(-1).numpy() for x in case)
    expected = beta * (1 - correlation(student, teacher)) + gamma * (
        1 - correlation(student.T, teacher.T)
    )
    assert dist_loss(*case, beta, gamma, temperature).item() / temperature**2 == pytest.approx(
        expected, rel=1e-3, abs=1e-4
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equal_logits_have_no_loss_and_no_gradient(temperature: float) -> None:
    teacher = torch.randn(8, 5)
    student = teacher.clone().requires_grad_()
    loss = dist_loss(student, teacher, temperature=temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-4
    assert student.grad is not None and student.grad.abs().max() < 1e-4


# --- where there is no correlation ---------------------------------------------------------------


def test_a_batch_of_one_has_the_constant_for_its_images() -> None:
    student, teacher = (x.clone().requires_grad_() for x in torch.randn(2, 1, 5))
    whole, over_classes = (
        dist_loss(student, teacher, 1.0, 0.5, 2.0),
        dist_loss(student, teacher, 1.0, 0.0, 2.0),
    )
    assert (whole - over_classes).item() == pytest.approx(0.5 * 4)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (whole, over_classes)]
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constant", ["student", "teacher", "both", "row", "column"])
def test_rows_that_do_not_vary_correlate_with_nothing(constant: str, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 4, 1000)
    if constant in ("student", "both"):
        student = torch.full_like(student, 0.7)
    if constant in ("teacher", "both"):
        teacher = torch.full_like(teacher, -0.3)
    if constant == "row":
        student[1] = teacher[2] = 0.1
    if constant == "column":
        student = student[:1].expand(4, 1000).clone()  # the same answer to every image
    student = student.to(dtype).requires_grad_()
    loss = dist_loss(student, teacher.to(dtype))
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()
    assert student.grad.abs().max() < 1  # rounding errors are not amplified by a norm of almost 0
    if constant in ("student", "teacher", "both"):
        assert loss.item() == 2 and not student.grad.any()
    if constant == "row":
        assert not student.grad[1].isnan().any() and student.grad[0].any()


def test_nan_stays_nan() -> None:
    """A loss of 0 for answers that are no numbers would hide them."""
    logits = torch.randn(3, 5)
    assert (
        dist_loss(logits * math.nan, logits).isnan()
        and dist_loss(logits, logits * math.nan).isnan()
    )
