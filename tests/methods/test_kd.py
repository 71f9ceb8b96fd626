"""Logit distillation: what its formula promises, whatever the logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.data.batch import Batch
from vitdistill.methods.kd import HardKD, SoftKD, kd_loss
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput


def logits(seed: int, batch: int = 3, classes: int = 5, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))


def batch_of(labels: Tensor) -> Batch:
    return Batch(torch.zeros(len(labels), 3, 4, 4), labels, labels, labels, 0)


seeds = st.integers(0, 10**6)
temperatures = st.floats(0.25, 8)


def test_the_formula_by_hand() -> None:
    student, teacher = (
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        torch.tensor([[0.0, 1.0], [3.0, -1.0]]),
    )
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(x / 2) / sum(math.exp(y / 2) for y in t) for x in t]
        q = [math.exp(x / 2) / sum(math.exp(y / 2) for y in s) for x in s]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kd_loss(student, teacher, 2.0).item() == pytest.approx(4 * total / 2, abs=1e-6)


@given(seed=seeds, temperature=temperatures)
def test_the_gradient_is_the_difference_of_the_softmaxes(seed: int, temperature: float) -> None:
    student, teacher = logits(seed).requires_grad_(), logits(seed + 1)
    kd_loss(student, teacher, temperature).backward()
    expected = (
        temperature
        * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
        / len(student)
    )
    assert student.grad is not None and torch.allclose(student.grad, expected, atol=1e-5)


# --- as objectives -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SoftKD, HardKD])
@given(
    order=st.permutations(["class", "conv", "inv", "distillation"]),
    teacher=st.sampled_from(["conv", "inv", "other"]),
)
def test_a_teacher_trains_the_head_called_like_it(
    method: type[SoftKD | HardKD], order: list[str], teacher: str
) -> None:
    heads, answer = torch.stack([logits(i) for i in range(4)], dim=1), ViTOutput(logits=logits(9))
    student, batch = (
        ViTOutput(logits=heads.mean(1), head_logits=heads, network=Network(heads=tuple(order))),
        batch_of(torch.tensor([0, 1, 2])),
    )
    expected = method(
        teacher=teacher,
        head="conv" if teacher == "conv" else "inv" if teacher == "inv" else "distillation",
    )
    assert torch.equal(
        method(teacher=teacher).loss(student, answer, batch, None),
        expected.loss(student, answer, batch, None),
    )
    for i, head in enumerate(order):
        alone = method(teacher=teacher).loss(ViTOutput(logits=heads[:, i]), answer, batch, None)
        assert torch.equal(
            method(teacher=teacher, head=head).loss(student, answer, batch, None), alone
        )


def test_hard_distillation_is_the_cross_entropy_with_the_top_class() -> None:
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    loss = HardKD().loss(
        ViTOutput(logits=student),
        ViTOutput(logits=teacher),
        batch_of(torch.tensor([0, 1, 2])),
        None,
    )
    assert torch.equal(loss, F.cross_entropy(student, teacher.argmax(-1)))
    loss.backward()
    assert student.grad is not None and teacher.grad is None
