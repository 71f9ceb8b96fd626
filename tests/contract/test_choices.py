"""What every selector and every masking promises, by being listed in `METHODS`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_cases import (
    GRID,
    MASKINGS,
    NUM_IMAGES,
    SELECTORS,
    Case,
    everything,
    permuted,
    poisoned,
)
from small_vits import WALKED
from torch import Tensor

from vitdistill.methods import method_class
from vitdistill.vit.needs import Needs
from vitdistill.vit.output import ViTOutput


def selector_inputs(
    name: str, shapes: str = "alike"
) -> tuple[Case, ViTOutput, ViTOutput | None, Tensor | None]:
    case = Case(name, shapes=shapes)
    guide = case.teacher_output(case.plan.guides["teacher"]) if case.plan.guides else None
    return case, case.student_output(), guide, case.noise()


@pytest.mark.parametrize(
    ("dtype", "shapes"),
    [
        (torch.float32, "alike"),
        (torch.bfloat16, "alike"),
        *((torch.float32, family) for family in WALKED),
    ],
)
@pytest.mark.parametrize("name", SELECTORS)
def test_a_choice_is_of_different_patches_of_the_grid(
    name: str, dtype: torch.dtype, shapes: str
) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        case, student, guide, noise = selector_inputs(name, shapes)
        keep = case.select(student, guide, noise)
        losses = case.module(case.batch, case.teachers)
    assert keep.shape == (NUM_IMAGES, 5) and keep.dtype is torch.int64
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 16 for row in keep.tolist())
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(p.grad is not None for p in case.student.parameters())
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("name", SELECTORS)
def test_a_choice_reads_all_that_it_declares_and_nothing_else(name: str) -> None:
    case, student, guide, noise = selector_inputs(name)
    keep = case.select(student, guide, noise)
    whole = poisoned(case.student_output(everything(4)), case.plan.student_needs)
    rest = poisoned(
        case.teacher(case.batch.images, everything(5)), case.plan.guides.get("teacher", Needs())
    )
    assert torch.equal(case.select(whole, rest, noise), keep)

    def turned(output: ViTOutput | None) -> ViTOutput | None:
        rows = {} if output is None else output.attention
        return output and replace(output, attention={i: t.flip(-1) for i, t in rows.items()})

    read = [
        bool(case.method.student_needs(case.plan.student)),
        bool(case.plan.guides),
        case.method.reads_noise,
    ]
    other = [(turned(student), guide, noise), (student, turned(guide), noise)]
    other += [(student, guide, None if noise is None else noise.flip(-1))]
    changes = [not torch.equal(case.select(*inputs), keep) for inputs in other]
    assert changes == read and any(read)


@pytest.mark.parametrize("name", SELECTORS)
def test_each_image_has_its_own_choice(name: str) -> None:
    case, student, guide, noise = selector_inputs(name)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    noises = None if noise is None else noise[order]
    moved = case.select(permuted(student, order), permuted(guide, order), noises)
    keep = case.select(student, guide, noise)
    assert torch.equal(moved, keep[order])
    assert len({frozenset(row) for row in keep.tolist()}) > 1


@pytest.mark.parametrize("name", SELECTORS)
def test_a_choice_carries_no_gradient_and_is_traced_without_a_graph_break(name: str) -> None:
    case, student, guide, noise = selector_inputs(name)
    keep = case.select(student, guide, noise)
    with torch.no_grad():
        case, student, guide, noise = selector_inputs(name)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda student, guide, noise: case.method.select(GRID, 5, student, guide, noise),
        fullgraph=True,
        backend="eager",
    )
    assert torch.equal(compiled(student, guide, noise), keep) and not keep.requires_grad


# --- maskings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKINGS)
def test_a_masking_puts_all_patches_in_an_order_of_each_image_alone(name: str) -> None:
    masking: Any = method_class(name)()
    noise = torch.rand(NUM_IMAGES, 16, generator=torch.Generator().manual_seed(2))
    order = masking.order(noise)
    assert all(sorted(row) == list(range(16)) for row in order.tolist())
    assert torch.equal(masking.order(noise.flip(0)), order.flip(0))
    assert len(set(map(tuple, order.tolist()))) == NUM_IMAGES
    assert 1 <= masking.count(16) <= masking.teacher_count(16) <= 16
    torch.compiler.reset()
    assert torch.equal(torch.compile(masking.order, fullgraph=True, backend="eager")(noise), order)


@pytest.mark.parametrize("name", MASKINGS)
def test_under_a_masking_student_and_teacher_see_the_same_and_nothing_else(name: str) -> None:
    case = Case(name)
    student, answers = case.module.answer(case.batch, case.teachers)
    answer = answers["teacher"]
    assert student.keep is answer.keep
    assert student.keep.shape == (NUM_IMAGES, case.plan.student_keep)
    losses = case.module(case.batch, case.teachers)
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(p.grad is not None for p in case.student.parameters())
    hidden = torch.ones(NUM_IMAGES, 16).scatter(1, student.keep, 0.0).bool().unflatten(1, GRID)
    images = case.batch.images.masked_fill(
        hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None], 1e4
    )
    again = case.module(replace(case.batch, images=images), case.teachers)
    assert again["loss"].item() == losses["loss"].item()
