"""What all losses between logits promise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_cases import labelled
from torch import Tensor

from vitdistill.methods.dist import DIST, dist_loss
from vitdistill.methods.dkd import DKD, dkd_loss
from vitdistill.methods.kd import SoftKD, kd_loss
from vitdistill.methods.nkd import NKD, nkd_loss
from vitdistill.methods.wttm import WTTM, wttm_loss
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput

LABELS = torch.tensor([0, 2, 4])
LOSSES: dict[str, Callable[..., Tensor]] = {
    "kd": kd_loss,
    "dist": dist_loss,
    "wttm": wttm_loss,
    "nkd": lambda student, teacher, **args: nkd_loss(student, teacher, LABELS, **args),
    "dkd": lambda student, teacher, **args: dkd_loss(student, teacher, LABELS, **args),
}
METHODS: dict[str, tuple[Any, dict[str, float]]] = {
    "kd": (SoftKD, {"temperature": 2.0}),
    "dist": (DIST, {"beta": 2.0, "gamma": 0.5, "temperature": 3.0}),
    "wttm": (WTTM, {"temperature": 3.0}),
    "nkd": (NKD, {"gamma": 2.0, "temperature": 3.0}),
    "dkd": (DKD, {"alpha": 0.5, "beta": 2.0, "temperature": 3.0}),
}
LOGITS = [torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize("name", LOSSES)
def test_the_student_learns_and_the_teacher_does_not(name: str) -> None:
    student, teacher = (logits.clone().requires_grad_() for logits in LOGITS)
    LOSSES[name](student, teacher).backward()
    assert student.grad is not None and student.grad.abs().max() > 0 and teacher.grad is None


@pytest.mark.parametrize("name", METHODS)
def test_an_objective_gives_its_loss_the_head_of_the_teacher_and_its_settings(name: str) -> None:
    method, settings = METHODS[name]
    heads, teacher = torch.stack([LOGITS[0], LOGITS[0].flip(1)], dim=1), LOGITS[1]
    network = Network(heads=("class", "distillation"))
    student = ViTOutput(logits=heads.mean(1), head_logits=heads, network=network)
    chosen = {"auto": heads[:, 1], "class": heads[:, 0], "all": heads.mean(1)}
    for head, logits in chosen.items():
        objective = method(head=head, **settings)
        loss = objective.loss(student, ViTOutput(logits=teacher), labelled(LABELS), None)
        assert torch.equal(loss, LOSSES[name](logits, teacher, **settings))


@pytest.mark.parametrize("name", LOSSES)
@given(
    scale=st.sampled_from([1e-30, 1.0, 1e3, 1e4]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    seed=st.integers(0, 10**6),
)
def test_extreme_logits_stay_finite(name: str, scale: float, temperature: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(3, 5, generator=draw) for _ in range(2))
    student.requires_grad_()
    loss = LOSSES[name](student, teacher, temperature=temperature)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_compared_in_float32(name: str) -> None:
    half = [logits.bfloat16() for logits in LOGITS]
    loss = LOSSES[name](*half)
    assert loss.dtype is torch.float32
    assert torch.equal(loss, LOSSES[name](*(logits.float() for logits in half)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(1, 5), (3, 1), (5,)])
def test_shapes_that_would_broadcast_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(Exception, match=r"differ|do not fit|Type-check"):
        LOSSES[name](LOGITS[0], torch.zeros(shape))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_above_0(name: str, temperature: Any) -> None:
    with pytest.raises(ValueError, match="temperature"):
        LOSSES[name](*LOGITS, temperature=temperature)
