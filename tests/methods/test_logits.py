"""What all losses between logits promise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.methods.cross_entropy import cross_entropy_loss
from vitdistill.methods.dist import dist_loss
from vitdistill.methods.dkd import dkd_loss
from vitdistill.methods.kd import kd_loss
from vitdistill.methods.nkd import nkd_loss
from vitdistill.methods.wttm import wttm_loss

LABELS = torch.tensor([0, 2, 4])
LOSSES: dict[str, Callable[..., Tensor]] = {
    "kd": kd_loss,
    "dist": dist_loss,
    "wttm": wttm_loss,
    "nkd": lambda student, teacher, **args: nkd_loss(student, teacher, LABELS, **args),
    "dkd": lambda student, teacher, **args: dkd_loss(student, teacher, LABELS, **args),
}
LOGITS = [torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize("name", LOSSES)
def test_the_student_learns_and_the_teacher_does_not(name: str) -> None:
    student, teacher = (logits.clone().requires_grad_() for logits in LOGITS)
    LOSSES[name](student, teacher).backward()
    assert student.grad is not None and student.grad.abs().max() > 0 and teacher.grad is None


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
    assert cross_entropy_loss(student, LABELS, LABELS.flip(0), torch.full((3,), 0.3)).isfinite()


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
