"""What every objective promises. A method is held to this by being listed in `METHODS`, and a family
of networks by being listed in `small_vits.WALKED`.
"""

from dataclasses import replace

import pytest
import torch
from method_cases import (
    NUM_CLASSES,
    NUM_IMAGES,
    OBJECTIVES,
    SEEN,
    Case,
    case_if_possible,
    changed,
    everything,
    poisoned,
    spoilt_one_by_one,
)
from small_vits import TEACHER, WALKED
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitdistill.distill.step import blank_batch
from vitdistill.explain.cost import cost_of
from vitdistill.methods import method_class
from vitdistill.vit.needs import Needs

PAIRS = [
    (torch.float32, "labels", "whole", "alike"),
    (torch.bfloat16, "mixed", "whole", "unlike"),
    (torch.float32, "mixed", "kept", "unlike"),
    (torch.bfloat16, "labels", "kept", "alike"),
    (torch.bfloat16, "mixed", "masked", "alike"),
    (torch.float32, "labels", "masked", "unlike"),
]
"""Every two of these settings together once."""


def families(name: str) -> list[str]:
    """The families of networks to hold an objective to; of those on logits alone, `kd`."""
    method = method_class(name)()
    read = method.student_needs(TEACHER) | method.teacher_needs(TEACHER)
    return [*WALKED] if name == "kd" or read != Needs(logits=True) else []


OF_FAMILIES = [(name, family) for name in OBJECTIVES for family in families(name)]


@pytest.mark.parametrize(
    ("name", "dtype", "labels", "seen", "shapes"),
    [
        *((name, *pair) for name in OBJECTIVES for pair in PAIRS),
        *((name, torch.float32, "mixed", "kept", family) for name, family in OF_FAMILIES),
        *((name, torch.bfloat16, "labels", "masked", family) for name, family in OF_FAMILIES),
    ],
)
def test_a_loss_is_a_finite_float32_scalar(
    name: str, dtype: torch.dtype, labels: str, seen: str, shapes: str
) -> None:
    case = case_if_possible(name, labels == "mixed", seen, shapes)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        losses = case.module(case.batch, case.teachers)
    for value in losses.values():
        assert value.shape == () and value.dtype is torch.float32 and value.isfinite()
    losses["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in case.module.parameters())


@pytest.mark.parametrize(
    ("name", "seen", "shapes"),
    [
        *((name, seen, "alike") for name in OBJECTIVES for seen in SEEN),
        *((name, "kept", family) for name, family in OF_FAMILIES),
    ],
)
def test_the_gradient_reaches_what_the_loss_reads_and_no_teacher(
    name: str, seen: str, shapes: str
) -> None:
    case = case_if_possible(name, seen=seen, shapes=shapes)
    output = case.student_output()
    recorded: list[Tensor] = []
    changed(output, lambda kind, _, t: recorded.append(t) or t)
    named = dict(case.student.named_parameters())
    reach = torch.autograd.grad(
        [t.sum() for t in recorded], list(named.values()), allow_unused=True
    )
    expected = {key for key, gradient in zip(named, reach, strict=True) if gradient is not None}
    case.module.train()(case.batch, case.teachers)["loss"].backward()
    assert {key for key, p in named.items() if p.grad is not None} == expected
    # So a run asks blank images once which parameters no step will reach.
    loss = case.module.eval()(blank_batch(case.plan, 2, "cpu"), case.teachers)["loss"]
    trained = [p for p in case.module.parameters() if p.requires_grad]
    blank = torch.autograd.grad(loss, trained, allow_unused=True)
    assert [grad is None for grad in blank] == [p.grad is None for p in trained]
    assert all(p.grad is not None for p in case.module.adapters.parameters() if p.requires_grad)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in named.values())
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_reads_all_that_it_declares_and_nothing_else(name: str) -> None:
    case = Case(name)
    student, teacher = case.student_output(), case.teacher_output()
    loss = case.loss(student, teacher)
    assert loss.isfinite()
    whole = poisoned(case.student_output(everything(4)), case.plan.student_needs)
    rest = case.teacher_output(everything(5))
    again = case.loss(whole, None if rest is None else poisoned(rest, case.plan.live["teacher"]))
    assert again.item() == pytest.approx(loss.item(), rel=1e-4)
    assert all(case.loss(bad, teacher).isnan() for bad in spoilt_one_by_one(student))
    # The top class of NaN is a class: the step checks the teacher's answer itself.
    if case.method.reads_teacher and name != "hard_kd":
        assert all(case.loss(student, bad).isnan() for bad in spoilt_one_by_one(teacher))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_labels_are_read_if_and_only_if_declared(name: str) -> None:
    case = Case(name)
    student, teacher = case.student_output(), case.teacher_output()
    other = replace(case.batch, labels=(case.batch.labels + 1) % NUM_CLASSES)
    changed = not torch.equal(case.loss(student, teacher), case.loss(student, teacher, other))
    assert changed == case.method.reads_labels


@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixed"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_order_of_the_images_does_not_change_a_loss(name: str, mixed: bool) -> None:
    case = Case(name, mixed)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    student, teacher = case.student_output(), case.teacher_output()
    moved = case.loss_of(order, student, teacher)
    assert moved.item() == pytest.approx(case.loss(student, teacher).item(), rel=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_is_a_mean_over_the_batch(name: str) -> None:
    """So that accumulated micro-batches and processes, which are averaged, give what one big batch
    gives; or it says it is not.
    """
    case = Case(name)
    student, teacher = case.student_output(), case.teacher_output()
    parts = torch.arange(NUM_IMAGES).chunk(2)
    halves = [case.loss_of(part, student, teacher).item() for part in parts]
    same = sum(halves) / 2 == pytest.approx(case.loss(student, teacher).item(), rel=1e-4)
    assert same != case.method.couples_images
    assert ("micro-batch" in case.plan.notes.get("it", "")) == case.method.couples_images


@pytest.mark.parametrize(
    ("name", "shapes"), [*((name, "alike") for name in OBJECTIVES), *OF_FAMILIES]
)
def test_a_teacher_may_see_its_patches_in_any_order(name: str, shapes: str) -> None:
    """And all of them are the whole image."""
    case = Case(name, shapes=shapes)
    if not case.teachers or case.plan.masking is not None:
        return
    needs, student = case.plan.live["teacher"], case.student_output()

    def loss(keep: Tensor | None) -> float:
        return case.loss(student, case.teacher(case.batch.images, needs, keep)).item()

    everything = torch.stack([torch.randperm(16) for _ in range(NUM_IMAGES)])
    assert loss(everything) == pytest.approx(loss(None), rel=1e-4)
    some = everything[:, :7].contiguous()
    assert loss(some.flip(1)) == pytest.approx(loss(some), rel=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_is_traced_without_a_graph_break(name: str) -> None:
    case = Case(name, mixed=True, shapes="unlike")
    keep = torch.stack([torch.randperm(16)[:7] for _ in range(NUM_IMAGES)])
    with torch.no_grad():
        student, teacher = case.student_output(), case.teacher_output()
        if teacher is not None and case.keep is None:
            teacher = case.teacher(case.batch.images, case.plan.live["teacher"], keep)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda student, teacher, batch: case.method.loss(student, teacher, batch, case.adapter),
        fullgraph=True,
        backend="eager",
    )
    torch.manual_seed(5)
    assert torch.allclose(
        compiled(student, teacher, case.batch), case.loss(student, teacher), rtol=1e-5
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_cost_of_an_objective_is_known_beforehand(name: str) -> None:
    """But for what an attention kernel computes again backward."""
    case = Case(name)
    models = {key: teacher.model for key, teacher in case.teachers.items()}
    cost = cost_of(case.plan, case.student, models, NUM_IMAGES)
    with FlopCounterMode(display=False) as counter:
        case.module.train()(case.batch, case.teachers)["loss"].backward()
    assert counter.get_total_flops() == pytest.approx(cost.step * NUM_IMAGES, rel=0.03)
    expected = 0 if case.adapter is None else sum(p.numel() for p in case.adapter.parameters())
    assert cost.adapters.get("it", 0) == expected and cost.activations > 0
