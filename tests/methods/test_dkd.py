"""DKD: its two terms by hand. What it shares with NKD is in test_nkd.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cases import Case, divergence, logit_cases, softmax, temperatures

from vitdistill.methods.dkd import dkd_loss


@given(case=logit_cases(), alpha=st.floats(0, 3), beta=st.floats(0, 9), temperature=temperatures)
def test_the_formula_by_hand(case: Case, alpha: float, beta: float, temperature: float) -> None:
    total = 0.0
    for student, teacher, label in zip(*(values.tolist() for values in case), strict=True):
        t, s = softmax(teacher, temperature)[label], softmax(student, temperature)[label]
        others = [[x for i, x in enumerate(v) if i != label] for v in (teacher, student)]
        rest = divergence(*(softmax(values, temperature) for values in others))
        total += alpha * divergence([t, 1 - t], [s, 1 - s]) + beta * rest
    expected = temperature**2 * total / len(case[2])
    loss = dkd_loss(*case, alpha, beta, temperature).item()
    assert loss == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("margin", [20.0, 100.0, 1e4])
def test_a_label_that_is_all_but_certain_keeps_its_digits(margin: float) -> None:
    """1 - p_y is 0 in float32 from a margin of 17 on; the divergence is the doubt times it."""
    student = torch.tensor([[margin, 0.0, 0.0]], requires_grad=True)
    loss = dkd_loss(student, torch.zeros(1, 3), torch.tensor([0]), 1.0, 0.0, 1.0)
    loss.backward()
    third = 1 / 3  # of the teacher's p; the student's is 1 and exp(-margin) twice
    expected = third * math.log(third) + 2 * third * (math.log(2 * third) - (math.log(2) - margin))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    gradient = pytest.approx([2 / 3, -1 / 3, -1 / 3], rel=1e-3)
    assert student.grad is not None and student.grad[0].tolist() == gradient
