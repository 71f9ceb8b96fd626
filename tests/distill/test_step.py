"""One step's losses: equal to a computation by hand, on the patches that were chosen, with no
gradient to a teacher.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import small_vits
import torch
import torch.nn.functional as F
from small_vits import teacher_of
from torch import Tensor, nn

from vitdistill.data.batch import Batch
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.distill.teacher import Teacher
from vitdistill.keyed import Stream
from vitdistill.methods.base import Masking, Objective, TokenSelector, WeightSchedule
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.maskedkd import MaskedKD, RandomPatches, TeacherGuided, resample_saliency
from vitdistill.methods.masking import RandomMasking
from vitdistill.methods.nkd import NKD
from vitdistill.methods.tokens import TokenFeatures
from vitdistill.methods.vitkd import ViTKD
from vitdistill.vit.families import describe_network
from vitdistill.vit.needs import Needs
from vitdistill.vit.output import ViTOutput
from vitdistill.vit.walk import run_vit

vit = partial(small_vits.vit, std=0.2, depth=2)


def batch_of(
    size: int = 4, side: int = 16, view: int = 0, seed: int = 0, run_seed: int = 0
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(size)
    images = torch.randn(size, 3, side, side, generator=generator)
    return Batch(images, ids % 5, ids, torch.full((size,), view), view, seed=run_seed)


def build(
    student: nn.Module,
    teachers: Mapping[str, Teacher],
    objectives: dict[str, Objective],
    selector: TokenSelector | None = None,
    masking: Masking | None = None,
) -> Distillation:
    network = describe_network(student, "student", "student", (16, 16))
    known = {name: teacher.network for name, teacher in teachers.items()}
    return Distillation(student, make_plan(network, known, objectives, selector, masking))


class Spy:
    """A teacher's own `run`, that remembers which patches it was shown in every pass."""

    def __init__(self, teacher: Teacher) -> None:
        self.passes: list[tuple[Needs, Tensor | None]] = []
        teacher.run = self

    def __call__(
        self, model: nn.Module, images: Tensor, needs: Needs, keep: Tensor | None = None
    ) -> ViTOutput:
        self.passes.append((needs, keep))
        return run_vit(model, images, needs, keep)


def test_the_losses_are_those_computed_by_hand() -> None:
    student, model, batch = vit(), vit(1, embed_dim=36, depth=3), batch_of()
    objectives: dict[str, Objective] = {
        "ce": CrossEntropy(weight=0.3, smoothing=0.1),
        "kd": SoftKD(weight=0.7, temperature=2.0),
    }
    teachers = {"teacher": teacher_of(model)}
    losses = build(student, teachers, objectives)(batch, teachers)
    logits, target = student(batch.images), model(batch.images)
    ce = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
    log_probs = ((values / 2).log_softmax(-1) for values in (logits, target))
    kd = 4 * F.kl_div(*log_probs, reduction="batchmean", log_target=True)
    assert list(losses) == ["ce", "kd", "loss", "ce_unweighted", "kd_unweighted"]
    assert losses["kd_unweighted"].item() == pytest.approx(kd.item(), rel=1e-5)
    assert losses["ce"].item() == pytest.approx(0.3 * ce.item(), rel=1e-5)
    assert losses["kd"].item() == pytest.approx(0.7 * kd.item(), rel=1e-5)
    assert losses["loss"].item() == pytest.approx(0.3 * ce.item() + 0.7 * kd.item(), rel=1e-5)


POOLED, TWO = {"global_pool": "avg", "class_token": False}, {"name": small_vits.DISTILLED}
FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    (POOLED, {"reg_tokens": 2, "no_embed_class": True}),
    ({"global_pool": "avg"}, TWO),
    ({"reg_tokens": 3}, {"img_size": 24}),
    (TWO, {"img_size": 24}),
    ({"patch_size": 8}, {}),
    ({"patch_size": 2}, POOLED),
]


@pytest.mark.parametrize(("student_form", "teacher_form"), FORMS)
def test_the_teacher_sees_the_patches_the_student_attends_to(
    student_form: dict[str, Any], teacher_form: dict[str, Any]
) -> None:
    student, model = vit(**student_form), vit(1, depth=3, **teacher_form)
    side = teacher_form.get("img_size", 16)
    teacher, batch = teacher_of(model, side=side), batch_of()
    spy = Spy(teacher)
    teachers, objectives = {"teacher": teacher}, {"kd": SoftKD(head="all")}
    losses = build(student, teachers, objectives, MaskedKD(keep_rate=0.25))(batch, teachers)
    ((needs, keep),) = spy.passes
    output = run_vit(student, batch.images, Needs(logits=True, attention=frozenset({-1})))
    saliency = output.attention[1][:, :, output.num_prefix_tokens :].mean(1)
    moved = resample_saliency(saliency, output.grid, teacher.network.grid)
    expected = moved.topk(teacher.network.num_patches // 4).indices
    assert needs == Needs(logits=True) and keep is not None and torch.equal(keep, expected)
    answer = run_vit(model, teacher.prepare(batch.images), Needs(logits=True), expected).logits
    mine = output.logits
    by_hand = F.kl_div(mine.log_softmax(-1), answer.softmax(-1), reduction="batchmean")
    assert losses["kd"].item() == pytest.approx(by_hand.item(), rel=1e-4, abs=1e-6)


# --- random and teacher-guided patches -----------------------------------------------------------


def test_a_batch_s_numbers_depend_on_seed_view_sample_and_purpose_alone() -> None:
    whole, order = batch_of(8, run_seed=3), torch.tensor([3, 0, 7])
    noise = whole.uniforms(16)
    part = Batch(whole.images[order], order, order, whole.views[order], 0, seed=3)
    assert torch.equal(part.uniforms(16), noise[order])
    for other in (
        batch_of(8, run_seed=4).uniforms(16),
        batch_of(8, view=1, run_seed=3).uniforms(16),
        whole.uniforms(16, Stream.PATCHES),
    ):
        assert not (other == noise).any()


def test_random_patches_reach_the_teacher() -> None:
    student, teacher, batch = vit(), teacher_of(vit(1)), batch_of()
    spy = Spy(teacher)
    distillation = build(
        student, {"teacher": teacher}, {"kd": SoftKD()}, RandomPatches(keep_rate=0.25)
    )
    first, second = (distillation(batch, {"teacher": teacher})["kd"] for _ in range(2))
    assert torch.equal(first, second)
    (_, keep), (_, again) = spy.passes
    assert keep is not None and again is not None and torch.equal(keep, again)
    assert torch.equal(keep, batch.uniforms(16, Stream.PATCHES).topk(4).indices)
    assert distillation.plan.student_needs == Needs(logits=True)


def test_teacher_guided_runs_the_teacher_twice() -> None:
    student, model, batch = vit(), vit(1, depth=3), batch_of()
    teacher = teacher_of(model)
    spy = Spy(teacher)
    build(student, {"teacher": teacher}, {"kd": SoftKD()}, TeacherGuided(keep_rate=0.25))(
        batch, {"teacher": teacher}
    )
    (guide, everything), (needs, keep) = spy.passes
    assert guide == Needs(attention=frozenset({2})) and needs == Needs(logits=True)
    assert everything is None
    attention = run_vit(model, batch.images, guide).attention[2]
    assert keep is not None and torch.equal(keep, attention[:, :, 1:].mean(1).topk(4).indices)


# --- several teachers, gradients -----------------------------------------------------------------


def test_two_teachers_see_their_own_patches_of_one_choice() -> None:
    student, batch = vit(), batch_of()
    teachers = {"a": teacher_of(vit(1), "a"), "b": teacher_of(vit(2, img_size=24), "b", 24)}
    spies = {name: Spy(teacher) for name, teacher in teachers.items()}
    objectives: dict[str, Objective] = {
        "x": SoftKD(teacher="a"),
        "y": HardKD(teacher="b", weight=2.0),
        "ce": CrossEntropy(),
    }
    losses = build(student, teachers, objectives, MaskedKD(keep_rate=0.25))(batch, teachers)
    assert list(losses)[:4] == ["x", "y", "ce", "loss"]
    kept = {name: spy.passes[0][1] for name, spy in spies.items()}
    assert kept["a"] is not None and kept["a"].shape == (4, 4)
    assert kept["b"] is not None and kept["b"].shape == (4, 9)
    total = sum(losses[name].item() for name in objectives)
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


def test_a_teacher_is_no_part_of_the_module() -> None:
    student, model = vit(), vit(1)
    distillation = build(student, {"teacher": teacher_of(model)}, {"kd": SoftKD()})
    names = {name.removeprefix("student.") for name in distillation.state_dict()}
    distillation.train()
    assert names == set(student.state_dict()) and not model.training


@pytest.mark.whole
def test_a_step_of_logits_features_and_chosen_patches_is_one_graph() -> None:
    student, batch = vit(), batch_of()
    teachers = {"teacher": teacher_of(vit(1, embed_dim=36, depth=3))}
    objectives: dict[str, Objective] = {"ce": CrossEntropy(), "nkd": NKD(), "vitkd": ViTKD()}
    distillation = build(student, teachers, objectives, MaskedKD(keep_rate=0.5))
    expected = distillation(batch, teachers)
    torch.compiler.reset()
    losses = torch.compile(
        lambda batch: distillation(batch, teachers), fullgraph=True, backend="eager"
    )(batch)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-4
    )
    losses["loss"].backward()
    assert all(p.grad is not None for p in distillation.parameters())


def test_a_weight_follows_its_schedule() -> None:
    teacher = teacher_of(vit(1))
    kd = SoftKD(weight=2.0, schedule=WeightSchedule(to=0.0, shape="linear"))
    module = build(vit(), {"teacher": teacher}, {"ce": CrossEntropy(), "kd": kd})
    losses = [module(batch_of(), {"teacher": teacher}, done) for done in (0.0, 0.5, 1.0)]
    first, middle, last = (found["kd"].item() for found in losses)
    assert first > 0 and middle == pytest.approx(first / 2, rel=1e-5) and last == 0
    assert losses[2]["loss"].item() == losses[0]["ce"].item()


def test_an_answer_that_is_not_finite_makes_the_sum_nan_whatever_reads_it() -> None:
    teacher = teacher_of(vit(1))
    module = build(vit(), {"teacher": teacher}, {"kd": HardKD()})
    with torch.no_grad():
        teacher.model.head.bias[0] = torch.nan
    losses = module(batch_of(), {"teacher": teacher})
    assert losses["kd"].isfinite() and losses["loss"].isnan()


def test_a_teacher_sees_more_of_the_mask_and_is_compared_where_the_student_looks() -> None:
    teacher, batch = teacher_of(vit(1)), batch_of()
    spy = Spy(teacher)
    masking = RandomMasking(mask_rate=0.75, teacher_mask_rate=0.5)
    tokens = TokenFeatures(class_weight=0)
    module = build(vit(), {"teacher": teacher}, {"tokens": tokens}, masking=masking)
    student, answers = module.answer(batch, {"teacher": teacher})
    ((_, seen),) = spy.passes
    order = batch.uniforms(16, Stream.PATCHES).argsort(dim=1)
    assert seen is not None and torch.equal(seen, order[:, :8])
    assert student.keep is not None and torch.equal(student.keep, order[:, :4])
    answer = answers["teacher"]
    assert isinstance(answer, ViTOutput) and answer.features is not None
    assert answer.features.shape[1] == 1 + 4 and answer.keep is student.keep


@pytest.mark.parametrize("objective", [CrossEntropy(smoothing=0.1), NKD()])
def test_what_reads_labels_sees_the_images_with_labels_alone(objective: Objective) -> None:
    """And what does not, sees all."""
    teacher, batch = teacher_of(vit(1)), batch_of(6)
    batch.labels[[0, 3, 4]] = -1
    batch.labelled = torch.tensor([1, 2, 5])
    run = build(vit(0), {"teacher": teacher}, {"labels": objective, "kd": SoftKD()})
    found = run(batch, {"teacher": teacher})
    part = run(batch.rows(batch.labelled), {"teacher": teacher})
    whole = run(batch_of(6), {"teacher": teacher})
    torch.testing.assert_close(found["labels"], part["labels"])
    torch.testing.assert_close(found["kd"], whole["kd"])
    assert not torch.isclose(found["labels"], whole["labels"])
