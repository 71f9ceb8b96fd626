"""WTTM: a temperature on the teacher's side alone, and images weighted by its doubt."""

import math

import pytest
import torch
from hypothesis import given
from logit_cases import Case, divergence, logit_cases, softmax, temperatures

from vitdistill.methods.wttm import wttm_loss


@given(case=logit_cases(), temperature=temperatures)
def test_the_formula_by_hand(case: Case, temperature: float) -> None:
    """By the paper's powers of probabilities, not by a softmax at a temperature."""
    total = 0.0
    for student, teacher in zip(case[0].tolist(), case[1].tolist(), strict=True):
        powers = [p ** (1 / temperature) for p in softmax(teacher)]
        transformed = [x / sum(powers) for x in powers]
        total += sum(powers) * divergence(transformed, softmax(student))
    loss = wttm_loss(*case[:2], temperature).item()
    assert loss == pytest.approx(total / len(case[0]), rel=1e-4, abs=1e-5)


def test_an_image_of_which_the_teacher_knows_nothing_counts_most() -> None:
    """The weight is C^(1 - 1/T) there, and 1 where the teacher is sure."""
    student = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    unsure, sure = torch.zeros(1, 4), torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    doubted = 2 * (math.log(1 / 4) - student.log_softmax(-1)).mean().item()
    assert wttm_loss(student, unsure, 2.0).item() == pytest.approx(doubted, rel=1e-5)
    certain = -student.log_softmax(-1)[0, 0].item()
    assert wttm_loss(student, sure, 2.0).item() == pytest.approx(certain, rel=1e-5)
