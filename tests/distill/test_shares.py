"""What each objective weighs at the start of a run."""

from typing import Any

import pytest
import timm
import torch
from small_vits import batch_of, network, teacher_of, vit
from torch import nn

from vitdistill.distill.plan import make_plan
from vitdistill.distill.shares import LEAST, describe_shares, measure_shares
from vitdistill.distill.step import Distillation
from vitdistill.methods import METHODS, method_class
from vitdistill.methods.base import Objective, TeacherObjective, WeightSchedule
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD

TAUGHT = [name for name in METHODS if issubclass(method_class(name), TeacherObjective)]


def build(objectives: dict[str, Objective], student: nn.Module, **teacher: Any) -> Any:
    model = vit(1, embed_dim=36, **teacher)
    plan = make_plan(network(student, "student"), {"teacher": network(model)}, objectives)
    return Distillation(student, plan), {"teacher": teacher_of(model)}


@pytest.mark.parametrize("weight", [1e-4, 0.1, 1.0, 3.0, 1e4])
def test_shares_are_those_of_losses_and_of_the_norms_of_gradients(weight: float) -> None:
    student, objectives = vit(0), {"ce": CrossEntropy(), "kd": SoftKD(weight=weight)}
    module, teachers = build(objectives, student)
    losses, sizes, norms = module(batch_of(), teachers), {}, {}
    for name in objectives:
        student.zero_grad()
        losses[name].backward(retain_graph=True)
        sizes[name] = losses[name].item()
        norms[name] = torch.cat([p.grad.flatten() for p in student.parameters()]).norm().item()
    student.zero_grad()
    shares = measure_shares(module, batch_of(), teachers)
    for name, (loss, gradient) in shares.items():
        assert loss == pytest.approx(sizes[name] / sum(sizes.values()), rel=1e-4)
        assert gradient == pytest.approx(norms[name] / sum(norms.values()), rel=1e-4)
    assert all(p.grad is None for p in student.parameters())
    nothing = [name for name, (_, gradient) in shares.items() if gradient < LEAST]
    assert len(describe_shares(shares)) == 1 + len(nothing)
    assert nothing == {1e-4: ["kd"], 1e4: ["ce"]}.get(weight, [])


@pytest.mark.parametrize("name", TAUGHT)
def test_no_method_is_nothing_or_everything_beside_the_labels(name: str) -> None:
    """With its defaults, between small networks of unequal widths."""
    method: Any = method_class(name)()
    heads = {} if method.teacher_needs(network(vit(1))).logits else {"num_classes": 0}
    module, teachers = build({"ce": CrossEntropy(), "it": method}, vit(0), **heads)
    shares = measure_shares(module, batch_of(5), teachers)
    assert LEAST < shares["it"][1] < 1 - LEAST, shares


def test_a_weight_that_rises_from_0_has_no_share_and_one_loss_says_nothing() -> None:
    rising = SoftKD(weight=0.0, schedule=WeightSchedule(to=1.0))
    module, teachers = build({"ce": CrossEntropy(), "kd": rising}, vit(0))
    assert measure_shares(module, batch_of(), teachers) == {"ce": (1.0, 1.0)}
    assert describe_shares({"ce": (1.0, 1.0)}) == []
    module, teachers = build({"kd": rising}, vit(0))
    assert measure_shares(module, batch_of(), teachers) == {}


def test_batch_norm_forgets_the_batch() -> None:
    student = timm.create_model("resnet10t", num_classes=5).train()
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    module, teachers = build({"ce": CrossEntropy(), "kd": SoftKD()}, student)
    measure_shares(module.train(), batch_of(), teachers)
    assert all(torch.equal(buffer, before[name]) for name, buffer in student.named_buffers())


def test_networks_that_are_compiled_are_not_so_for_the_shares() -> None:
    module, teachers = build({"ce": CrossEntropy(), "kd": SoftKD()}, vit(0))
    expected, seen = measure_shares(module, batch_of(), teachers), []

    def watch(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph

    for part in (module, *teachers.values()):
        part.run = torch.compile(part.run, backend=watch)
    assert measure_shares(module, batch_of(), teachers) == expected and not seen
    module(batch_of(), teachers)
    assert seen
