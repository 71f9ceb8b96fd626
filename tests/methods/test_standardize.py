"""Standardised logits: of mean 0 and deviation 1 over the classes, in every objective on logits."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cases import labelled
from small_vits import STUDENT, TEACHER, randn
from torch import Tensor

from vitdistill.distill.plan import make_plan
from vitdistill.errors import ConfigError
from vitdistill.labels.encoding import LogitEncoding
from vitdistill.labels.layout import Layout
from vitdistill.methods import METHODS, method_class
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import HardKD, LogitObjective, SoftKD, standardize
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput

LOGIT_METHODS = [name for name in METHODS if issubclass(method_class(name), LogitObjective)]
LABELS = torch.tensor([0, 2, 4])
seeds = st.integers(0, 10**6)


def loss_of(objective: Any, student: Tensor, teacher: Tensor) -> Tensor:
    output = ViTOutput(logits=student, network=Network())
    return objective.loss(output, ViTOutput(logits=teacher), labelled(LABELS), None)


def test_the_published_loss_by_hand() -> None:
    """``T^2 KL`` at T 2 of (1, 2, 3) from (0, 0, 9), whose standardised logits are (-1, 0, 1) and
    (-1, -1, 2) / sqrt(3).
    """
    student, teacher = np.array([-1.0, 0.0, 1.0]) / 2, np.array([-1.0, -1.0, 2.0]) / 3**0.5 / 2
    p, q = (np.exp(z) / np.exp(z).sum() for z in (teacher, student))
    expected = 4 * (p * np.log(p / q)).sum()
    objective = SoftKD(temperature=2.0, standardize=True)
    output = ViTOutput(logits=torch.tensor([[1.0, 2.0, 3.0]]), network=Network())
    answer = ViTOutput(logits=torch.tensor([[0.0, 0.0, 9.0]]))
    loss = objective.loss(output, answer, labelled(LABELS[:1]), None)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@given(seed=seeds, classes=st.integers(2, 50), scale=st.sampled_from([1e-2, 1.0, 1e3]))
def test_logits_are_standardised_by_their_unbiased_deviation(
    seed: int, classes: int, scale: float
) -> None:
    logits = scale * randn(seed, 4, classes)
    v = logits.double().numpy()
    expected = (v - v.mean(1, keepdims=True)) / (v.std(1, ddof=1, keepdims=True) + 1e-7)
    np.testing.assert_allclose(standardize(logits).numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LOGIT_METHODS)
@given(seed=seeds, scale=st.sampled_from([0.1, 3.0, 40.0]), shift=st.floats(-5, 5))
def test_scale_and_shift_of_logits_do_not_matter(
    name: str, seed: int, scale: float, shift: float
) -> None:
    objective = method_class(name)(standardize=True)
    student, teacher = randn(seed, 3, 5), randn(seed + 1, 3, 5)
    loss = loss_of(objective, student, teacher)
    torch.testing.assert_close(
        loss_of(objective, scale * student + shift, teacher), loss, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        loss_of(objective, student, scale * teacher + shift), loss, rtol=1e-3, atol=1e-4
    )
    plain = method_class(name)()
    expected = loss_of(plain, standardize(student), standardize(teacher))
    assert torch.equal(loss, expected) and not torch.equal(loss, loss_of(plain, student, teacher))


@pytest.mark.parametrize("name", LOGIT_METHODS)
@pytest.mark.parametrize("equal", ["student", "teacher", "both"])
def test_equal_logits_stay_finite(name: str, equal: str) -> None:
    student, teacher = (
        torch.full((3, 5), 2.0) if equal in (who, "both") else randn(i, 3, 5)
        for i, who in enumerate(("student", "teacher"))
    )
    student.requires_grad_()
    loss = loss_of(method_class(name)(standardize=True), student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


def plan_of(objective: LogitObjective, encoding: LogitEncoding | None, classes: int = 10) -> Any:
    student, teacher = (
        Network(**{**vars(network), "num_classes": classes}) for network in (STUDENT, TEACHER)
    )
    labels = {} if encoding is None else {"teacher": Layout(logits=encoding)}
    objectives = {"ce": CrossEntropy(), "kd": objective}
    return make_plan(student, {"teacher": teacher}, objectives, None, None, labels)


SPARSE = LogitEncoding(kind="topk", num_classes=10, k=3, temperatures=(1.0, 2.0))
DENSE = LogitEncoding(kind="float16", num_classes=10)


@pytest.mark.parametrize("name", LOGIT_METHODS)
def test_labels_of_some_classes_have_no_mean_of_all(name: str) -> None:
    objective = method_class(name)(standardize=True)
    assert plan_of(objective, DENSE).temperatures == {"kd": None}
    if name == "hard_kd":  # whose teacher gives the order alone
        assert plan_of(objective, SPARSE).temperatures == {"kd": 1.0}
        return
    with pytest.raises(ConfigError) as refused:
        plan_of(objective, SPARSE)
    assert refused.value.field == "teachers.teacher.labels"
    assert plan_of(SoftKD(temperature=2.0), SPARSE).temperatures == {"kd": 2.0}


@pytest.mark.parametrize("objective", [SoftKD(standardize=True), HardKD(standardize=True)])
def test_two_classes_are_refused(objective: LogitObjective) -> None:
    assert torch.allclose(standardize(randn(0, 9, 2)).abs(), torch.tensor(0.5**0.5))
    with pytest.raises(ConfigError) as refused:
        plan_of(objective, None, classes=2)
    assert refused.value.field == "objectives.kd.standardize"
    assert "standardised" in plan_of(objective, None, classes=3).notes["kd"]
