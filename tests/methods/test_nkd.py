"""NKD: what its formula promises, whatever the logits; and which class of a mixed image counts."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.data.batch import Batch
from vitdistill.methods.dkd import DKD, dkd_loss
from vitdistill.methods.nkd import NKD, TargetObjective, nkd_loss, of_label, of_rest
from vitdistill.vit.output import ViTOutput

Case = tuple[Tensor, Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Student's and teacher's logits, and labels."""
    batch, classes = draw(st.integers(1, 6)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    student, teacher = draw(st.floats(0.1, 5)) * torch.randn(2, batch, classes, generator=generator)
    return student, teacher, torch.randint(classes, (batch,), generator=generator)


gammas, temperatures = st.floats(0, 4), st.floats(0.25, 8)


def batch_of(labels: Tensor, other: Tensor | None = None, lam: Tensor | None = None) -> Batch:
    return Batch(torch.zeros(len(labels), 3, 4, 4), labels, labels, labels, 0, other, lam)


def by_hand(
    student: list[float], teacher: list[float], label: int, gamma: float, temperature: float
) -> float:
    def softmax(values: list[float]) -> list[float]:
        return [math.exp(x) / sum(math.exp(y) for y in values) for x in values]

    target = softmax(teacher)[label] * math.log(softmax(student)[label])
    rest = [
        [x / temperature for i, x in enumerate(values) if i != label]
        for values in (student, teacher)
    ]
    others = sum(t * math.log(s) for s, t in zip(*map(softmax, rest), strict=True))
    return -target - gamma * temperature**2 * others


@given(case=cases(), gamma=gammas, temperature=temperatures)
def test_the_formula_by_hand(case: Case, gamma: float, temperature: float) -> None:
    rows = zip(*(values.tolist() for values in case), strict=True)
    expected = [
        by_hand(student, teacher, label, gamma, temperature) for student, teacher, label in rows
    ]
    assert nkd_loss(*case, gamma, temperature).item() == pytest.approx(
        sum(expected) / len(expected), rel=1e-4, abs=1e-5
    )


@given(case=cases())
def test_label_and_rest_are_all_classes_in_their_order(case: Case) -> None:
    logits, _, labels = case
    for row, label, mine, rest in zip(
        logits.tolist(),
        labels.tolist(),
        of_label(logits, labels).tolist(),
        of_rest(logits, labels).tolist(),
        strict=True,
    ):
        assert [*rest[:label], mine, *rest[label:]] == row


@given(case=cases(), gamma=gammas, temperature=temperatures)
def test_the_gradient_in_closed_form(case: Case, gamma: float, temperature: float) -> None:
    """p_T[y] (p_S - onehot) of the target, gamma T (q_S - q_T) of the rest."""
    student, teacher, labels = case
    student.requires_grad_()
    nkd_loss(student, teacher, labels, gamma, temperature).backward()
    label = F.one_hot(labels, student.shape[1])
    without = [
        (x.detach() / temperature).masked_fill(label.bool(), -math.inf).softmax(-1)
        for x in (student, teacher)
    ]
    target = teacher.softmax(-1).gather(1, labels[:, None]) * (student.detach().softmax(-1) - label)
    expected = (target + gamma * temperature * (without[0] - without[1])) / len(labels)
    assert student.grad is not None and torch.allclose(student.grad, expected, atol=1e-5, rtol=1e-4)


# --- soft labels and mixed images, of every such method ------------------------------------------

LOSSES = [pytest.param(NKD(gamma=2.0, temperature=3.0), id="nkd"), pytest.param(DKD(), id="dkd")]


def value(method: TargetObjective, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    return method.loss(ViTOutput(logits=student), ViTOutput(logits=teacher), batch, None)


@pytest.mark.parametrize("loss", [nkd_loss, dkd_loss])
def test_the_class_of_a_soft_label_is_the_largest_and_of_equals_the_first(loss: Any) -> None:
    student, teacher = torch.randn(2, 4, 5)
    soft = torch.tensor([[0, 0.4, 0, 0.6, 0], [0.5, 0, 0.5, 0, 0], [0, 0, 0, 0.5, 0.5], [0.2] * 5])
    assert torch.equal(
        loss(student, teacher, soft), loss(student, teacher, torch.tensor([3, 0, 3, 0]))
    )
    assert torch.equal(loss(student, teacher, soft.half()), loss(student, teacher, soft))


@pytest.mark.parametrize("loss", [nkd_loss, dkd_loss])
def test_labels_may_be_of_any_whole_type(loss: Any) -> None:
    student, teacher = torch.randn(2, 3, 5)
    labels = torch.tensor([4, 0, 2])
    assert torch.equal(loss(student, teacher, labels.int()), loss(student, teacher, labels))


@pytest.mark.parametrize("method", LOSSES)
@given(case=cases(), seed=st.integers(0, 99))
def test_the_dominant_class_is_the_argmax_of_the_soft_label(
    method: TargetObjective, case: Case, seed: int
) -> None:
    """As the authors train: what a loader with soft labels would give the function."""
    student, teacher, labels = case
    generator = torch.Generator().manual_seed(seed)
    other = labels[torch.randperm(len(labels), generator=generator)]
    lam = torch.randint(11, (len(labels),), generator=generator) / 10  # 0.5 among them
    soft = (
        torch.zeros_like(student)
        .scatter_add(1, labels[:, None], lam[:, None])
        .scatter_add(1, other[:, None], 1 - lam[:, None])
    )
    mixed = value(method, student, teacher, batch_of(labels, other, lam))
    assert torch.equal(mixed, value(method, student, teacher, batch_of(soft.argmax(-1))))


@pytest.mark.parametrize(
    "method", [NKD(mixed="both", gamma=2.0), DKD(mixed="both")], ids=["nkd", "dkd"]
)
def test_both_classes_count_by_their_share_image_by_image(method: TargetObjective) -> None:
    student, teacher = torch.randn(2, 4, 5)
    labels, other = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 1, 0, 2])
    lam = torch.tensor([0.1, 0.3, 0.8, 1.0])
    expected = 0.0
    for i, share in enumerate(lam.tolist()):
        one, two = (
            value(method, student[i : i + 1], teacher[i : i + 1], batch_of(x[i : i + 1])).item()
            for x in (labels, other)
        )
        expected += (share * one + (1 - share) * two) / 4
    assert value(method, student, teacher, batch_of(labels, other, lam)).item() == pytest.approx(
        expected, rel=1e-5
    )
    whole = batch_of(labels, other, torch.ones(4))
    assert torch.equal(
        value(method, student, teacher, whole), value(method, student, teacher, batch_of(labels))
    )


# --- at the edges --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [nkd_loss, dkd_loss])
@pytest.mark.parametrize(
    ("teacher", "labels"),
    [
        ((1, 5), (3,)),
        ((3, 1), (3,)),
        ((3, 6), (3,)),
        ((3, 5), (2,)),
        ((3, 5), (1,)),
        ((3, 5), (3, 4)),
        ((3, 5), (3, 1)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    loss: Any, teacher: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    label = torch.zeros(labels, dtype=torch.int64 if len(labels) == 1 else torch.float32)
    unchecked = getattr(
        loss, "__wrapped__", loss
    )  # as users call it: without the annotations' shape checks
    for call in (loss, unchecked):
        with pytest.raises(Exception, match=r"differ|do not fit|Type-check"):
            call(torch.randn(3, 5), torch.randn(teacher), label)


@pytest.mark.parametrize("loss", [nkd_loss, dkd_loss])
def test_one_class_has_no_rest(loss: Any) -> None:
    with pytest.raises(ValueError, match="one class"):
        loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
