"""WTTM: a temperature on the teacher's side alone, and images weighted by its doubt."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.data.batch import Batch
from vitdistill.methods.kd import kd_loss
from vitdistill.methods.wttm import WTTM, wttm_loss
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput

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


@given(case=cases())
def test_at_temperature_1_it_is_kd(case: Case) -> None:
    assert wttm_loss(*case, 1.0).item() == pytest.approx(
        kd_loss(*case, 1.0).item(), rel=1e-4, abs=1e-6
    )


@given(case=cases(), temperature=temperatures)
def test_the_student_that_it_asks_for_is_the_softened_teacher(
    case: Case, temperature: float
) -> None:
    teacher = case[1]
    student = (teacher / temperature).requires_grad_()
    loss = wttm_loss(student, teacher, temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert student.grad is not None and student.grad.abs().max() < 1e-5
    assert wttm_loss(case[0], teacher, temperature).item() > -1e-5


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


def test_it_is_a_mean_over_the_batch() -> None:
    student, teacher = torch.randn(2, 6, 5)
    images = [wttm_loss(student[i : i + 1], teacher[i : i + 1], 3.0).item() for i in range(6)]
    assert wttm_loss(student, teacher, 3.0).item() == pytest.approx(sum(images) / 6, rel=1e-5)


def test_the_objective_compares_the_head_that_learns_from_the_teacher() -> None:
    heads, teacher = torch.randn(3, 2, 5), torch.randn(3, 5)
    student, labels = (
        ViTOutput(
            logits=heads.mean(1),
            head_logits=heads,
            network=Network(heads=("class", "distillation")),
        ),
        torch.full((3,), -1),
    )
    method = WTTM(temperature=3.0)
    loss = method.loss(
        student,
        ViTOutput(logits=teacher),
        Batch(torch.zeros(3, 3, 4, 4), labels, labels, labels, 0),
        None,
    )
    assert not method.reads_labels and torch.equal(loss, wttm_loss(heads[:, 1], teacher, 3.0))
