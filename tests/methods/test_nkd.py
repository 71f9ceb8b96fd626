"""NKD by hand; and which class of a soft label or a mixed image counts, for DKD too."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cases import Case, labelled, logit_cases, softmax, temperatures
from torch import Tensor

from vitdistill.data.batch import Batch
from vitdistill.methods.dkd import DKD, dkd_loss
from vitdistill.methods.nkd import NKD, TargetObjective, nkd_loss
from vitdistill.vit.output import ViTOutput


@given(case=logit_cases(), gamma=st.floats(0, 4), temperature=temperatures)
def test_the_formula_by_hand(case: Case, gamma: float, temperature: float) -> None:
    total = 0.0
    for student, teacher, label in zip(*(values.tolist() for values in case), strict=True):
        total -= softmax(teacher)[label] * math.log(softmax(student)[label])
        others = [[x for i, x in enumerate(v) if i != label] for v in (student, teacher)]
        s, t = (softmax(values, temperature) for values in others)
        total -= gamma * temperature**2 * sum(q * math.log(p) for p, q in zip(s, t, strict=True))
    loss = nkd_loss(*case, gamma, temperature).item()
    assert loss == pytest.approx(total / len(case[2]), rel=1e-4, abs=1e-4)


# --- soft labels and mixed images, of every such method ------------------------------------------

LOSSES = pytest.mark.parametrize("loss", [nkd_loss, dkd_loss])


def value(method: TargetObjective, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    return method.loss(ViTOutput(logits=student), ViTOutput(logits=teacher), batch, None)


@LOSSES
def test_the_class_of_a_soft_label_is_the_largest_and_of_equals_the_first(loss: Any) -> None:
    student, teacher = torch.randn(2, 4, 5)
    soft = torch.tensor([[0, 0.4, 0, 0.6, 0], [0.5, 0, 0.5, 0, 0], [0, 0, 0, 0.5, 0.5], [0.2] * 5])
    expected = loss(student, teacher, torch.tensor([3, 0, 3, 0]))
    assert torch.equal(loss(student, teacher, soft), expected)
    assert torch.equal(loss(student, teacher, soft.half()), expected)


@pytest.mark.parametrize("method", [NKD(gamma=2.0, temperature=3.0), DKD()], ids=["nkd", "dkd"])
@given(case=logit_cases(), seed=st.integers(0, 99))
def test_the_dominant_class_is_the_argmax_of_the_soft_label(
    method: TargetObjective, case: Case, seed: int
) -> None:
    """As the authors train: what a loader with soft labels would give the function."""
    student, teacher, labels = case
    generator = torch.Generator().manual_seed(seed)
    other = labels[torch.randperm(len(labels), generator=generator)]
    lam = torch.randint(11, (len(labels),), generator=generator) / 10  # 0.5 among them
    soft = torch.zeros_like(student).scatter_add(1, labels[:, None], lam[:, None])
    soft = soft.scatter_add(1, other[:, None], 1 - lam[:, None])
    mixed = value(method, student, teacher, labelled(labels, other, lam))
    assert torch.equal(mixed, value(method, student, teacher, labelled(soft.argmax(-1))))


@pytest.mark.parametrize(
    "method", [NKD(mixed="both", gamma=2.0), DKD(mixed="both")], ids=["nkd", "dkd"]
)
def test_both_classes_count_by_their_share_image_by_image(method: TargetObjective) -> None:
    student, teacher = torch.randn(2, 4, 5)
    labels, other = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 1, 0, 2])
    lam = torch.tensor([0.1, 0.3, 0.8, 1.0])
    expected = 0.0
    for i, share in enumerate(lam.tolist()):
        row = slice(i, i + 1)
        one, two = (
            value(method, student[row], teacher[row], labelled(x[row])) for x in (labels, other)
        )
        expected += (share * one + (1 - share) * two).item() / 4
    mixed = value(method, student, teacher, labelled(labels, other, lam))
    assert mixed.item() == pytest.approx(expected, rel=1e-5)


@LOSSES
@pytest.mark.parametrize("labels", [(2,), (1,), (3, 4), (3, 1)])
def test_labels_that_do_not_fit_are_refused(loss: Any, labels: tuple[int, ...]) -> None:
    label = torch.zeros(labels, dtype=torch.int64 if len(labels) == 1 else torch.float32)
    unchecked = getattr(loss, "__wrapped__", loss)  # as users call it, without checks of shapes
    with pytest.raises(Exception, match=r"do not fit|Type-check"):
        unchecked(torch.randn(3, 5), torch.randn(3, 5), label)


@LOSSES
def test_one_class_has_no_rest(loss: Any) -> None:
    with pytest.raises(ValueError, match="one class"):
        loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
