"""WTTM: a temperature on the teacher's side alone, and images weighted by its doubt."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.methods.wttm import wttm_loss

Case = tuple[Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Student's and teacher's logits."""
    batch, classes = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    student, teacher = draw(st.floats(0.1, 5)) * torch.randn(2, batch, classes, generator=generator)
    return student, teacher


temperatures = st.floats(0.5, 10)


def by_hand(student: list[float], teacher: list[float], temperature: float) -> float:
    """By the paper's powers of probabilities, not by a softmax at a temperature."""
    p, q = (
        [math.exp(x) / sum(math.exp(y) for y in values) for x in values]
        for values in (teacher, student)
    )
    powers = [x ** (1 / temperature) for x in p]
    transformed = [x / sum(powers) for x in powers]
    return sum(powers) * sum(t * math.log(t / s) for t, s in zip(transformed, q, strict=True))


@given(case=cases(), temperature=temperatures)
def test_the_formula_by_hand(case: Case, temperature: float) -> None:
    rows = zip(*(values.tolist() for values in case), strict=True)
    expected = [by_hand(student, teacher, temperature) for student, teacher in rows]
    assert wttm_loss(*case, temperature).item() == pytest.approx(
        sum(expected) / len(expected), rel=1e-4, abs=1e-5
    )


@given(case=cases(), temperature=temperatures)
def test_the_gradient_is_the_weighted_difference_of_the_softmaxes(
    case: Case, temperature: float
) -> None:
    """And so does not shrink with T: there is no T^2 to make up for it."""
    student, teacher = case
    student.requires_grad_()
    wttm_loss(student, teacher, temperature).backward()
    weight = (teacher.softmax(-1) ** (1 / temperature)).sum(-1, keepdim=True)
    expected = (
        weight * (student.detach().softmax(-1) - (teacher / temperature).softmax(-1)) / len(teacher)
    )
    assert student.grad is not None and torch.allclose(student.grad, expected, atol=1e-5, rtol=1e-4)


def test_an_image_of_which_the_teacher_knows_nothing_counts_most() -> None:
    """The weight is C^(1 - 1/T) there, and 1 where the teacher is sure."""
    student = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    unsure, sure = torch.zeros(1, 4), torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    divergence = (math.log(1 / 4) - student.log_softmax(-1)).mean().item()
    assert wttm_loss(student, unsure, 2.0).item() == pytest.approx(2 * divergence, rel=1e-5)
    assert wttm_loss(student, sure, 2.0).item() == pytest.approx(
        -student.log_softmax(-1)[0, 0].item(), rel=1e-5
    )
