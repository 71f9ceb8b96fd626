"""Logits to compare, and the softmax and divergence of plain lists to compare them by hand."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.data.batch import Batch

Case = tuple[Tensor, Tensor, Tensor]
temperatures = st.floats(0.5, 8)


@st.composite
def logit_cases(draw: st.DrawFn, least: int = 1) -> Case:
    """Student's and teacher's logits of ``least`` images or more, and labels."""
    batch, classes = draw(st.integers(least, 6)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    student, teacher = draw(st.floats(0.1, 5)) * torch.randn(2, batch, classes, generator=generator)
    return student, teacher, torch.randint(classes, (batch,), generator=generator)


def labelled(labels: Tensor, other: Tensor | None = None, lam: Tensor | None = None) -> Batch:
    return Batch(torch.zeros(len(labels), 3, 4, 4), labels, labels, labels, 0, other, lam)


def softmax(values: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in values]
    return [x / sum(powers) for x in powers]


def divergence(first: list[float], second: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(first, second, strict=True))
