"""DKD: its two terms, and that they are the ordinary divergence taken apart. What it shares with
NKD is in test_nkd.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.methods.dkd import dkd_loss

Case = tuple[Tensor, Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Student's and teacher's logits, and labels."""
    batch, classes = draw(st.integers(1, 6)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    student, teacher = draw(st.floats(0.1, 5)) * torch.randn(2, batch, classes, generator=generator)
    return student, teacher, torch.randint(classes, (batch,), generator=generator)


temperatures = st.floats(0.25, 8)


def by_hand(
    student: list[float],
    teacher: list[float],
    label: int,
    alpha: float,
    beta: float,
    temperature: float,
) -> float:
    def softmax(values: list[float]) -> list[float]:
        return [
            math.exp(x / temperature) / sum(math.exp(y / temperature) for y in values)
            for x in values
        ]

    def divergence(first: list[float], second: list[float]) -> float:
        return sum(p * math.log(p / q) for p, q in zip(first, second, strict=True))

    t, s = softmax(teacher)[label], softmax(student)[label]
    rest = [[x for i, x in enumerate(values) if i != label] for values in (teacher, student)]
    return temperature**2 * (
        alpha * divergence([t, 1 - t], [s, 1 - s])
        + beta * divergence(softmax(rest[0]), softmax(rest[1]))
    )


@given(case=cases(), alpha=st.floats(0, 3), beta=st.floats(0, 9), temperature=st.floats(1, 8))
def test_the_formula_by_hand(case: Case, alpha: float, beta: float, temperature: float) -> None:
    rows = zip(*(values.tolist() for values in case), strict=True)
    expected = [
        by_hand(student, teacher, label, alpha, beta, temperature)
        for student, teacher, label in rows
    ]
    assert dkd_loss(*case, alpha, beta, temperature).item() == pytest.approx(
        sum(expected) / len(expected), rel=1e-4, abs=1e-4
    )


@given(case=cases(), alpha=st.floats(0, 3), beta=st.floats(0, 9), temperature=temperatures)
def test_the_gradient_in_closed_form(
    case: Case, alpha: float, beta: float, temperature: float
) -> None:
    """alpha T (s - t) (onehot - (1 - onehot) q_S) of the target, where s and t are p[y]; beta T
    (q_S - q_T) of the rest.
    """
    student, teacher, labels = case
    student.requires_grad_()
    dkd_loss(student, teacher, labels, alpha, beta, temperature).backward()
    label = F.one_hot(labels, student.shape[1])
    ours, theirs = ((x.detach() / temperature) for x in (student, teacher))
    q_ours, q_theirs = (x.masked_fill(label.bool(), -math.inf).softmax(-1) for x in (ours, theirs))
    gap = (ours.softmax(-1) - theirs.softmax(-1)).gather(1, labels[:, None])
    expected = (
        temperature * (alpha * gap * (label - q_ours) + beta * (q_ours - q_theirs)) / len(labels)
    )
    assert student.grad is not None and torch.allclose(student.grad, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("margin", [20.0, 100.0, 1e4])
def test_a_label_that_is_all_but_certain_keeps_its_digits(margin: float) -> None:
    """1 - p_y is 0 in float32 from a margin of 17 on; the true divergence is p_T[y]'s doubt times
    the margin.
    """
    student, teacher = (
        torch.tensor([[margin, 0.0, 0.0]], requires_grad=True),
        torch.tensor([[0.0, 0.0, 0.0]]),
    )
    loss = dkd_loss(student, teacher, torch.tensor([0]), 1.0, 0.0, 1.0)
    loss.backward()
    third = 1 / 3  # of the teacher's p; the student's is 1 and exp(-margin) twice
    expected = third * math.log(third) + 2 * third * (math.log(2 * third) - (math.log(2) - margin))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert student.grad is not None and student.grad[0].tolist() == pytest.approx(
        [2 / 3, -1 / 3, -1 / 3], rel=1e-3
    )
