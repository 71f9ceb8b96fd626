"""Logit distillation by hand, and which head of the student a teacher trains."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from logit_cases import Case, divergence, labelled, logit_cases, softmax, temperatures

from vitdistill.methods.kd import HardKD, SoftKD, kd_loss
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput


@given(case=logit_cases(), temperature=temperatures)
def test_the_formula_by_hand(case: Case, temperature: float) -> None:
    rows = [
        divergence(softmax(teacher, temperature), softmax(student, temperature))
        for student, teacher in zip(case[0].tolist(), case[1].tolist(), strict=True)
    ]
    expected = temperature**2 * sum(rows) / len(rows)
    assert kd_loss(*case[:2], temperature).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("method", [SoftKD, HardKD])
@given(
    order=st.permutations(["class", "conv", "inv", "distillation"]),
    teacher=st.sampled_from(["conv", "inv", "other"]),
)
def test_a_teacher_trains_the_head_called_like_it(
    method: type[SoftKD | HardKD], order: list[str], teacher: str
) -> None:
    heads, answer = torch.randn(3, 4, 5), ViTOutput(logits=torch.randn(3, 5))
    network = Network(heads=tuple(order))
    student = ViTOutput(logits=heads.mean(1), head_logits=heads, network=network)
    batch = labelled(torch.tensor([0, 1, 2]))
    head = order.index("distillation" if teacher == "other" else teacher)
    alone = method(teacher=teacher).loss(ViTOutput(logits=heads[:, head]), answer, batch, None)
    for objective in (method(teacher=teacher), method(teacher=teacher, head=order[head])):
        assert torch.equal(objective.loss(student, answer, batch, None), alone)


def test_hard_distillation_is_the_cross_entropy_with_the_top_class() -> None:
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    outputs = ViTOutput(logits=student), ViTOutput(logits=teacher)
    loss = HardKD().loss(*outputs, labelled(torch.tensor([0, 1, 2])), None)
    assert torch.equal(loss, F.cross_entropy(student, teacher.argmax(-1)))
