"""What every method promises. A method is held to this by being listed in `METHODS`: there is
nothing to add here for a new one.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import small_vits
import torch
from small_vits import DISTILLED, ROTARY, network, teacher_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitdistill.data.batch import Batch
from vitdistill.distill.plan import Plan, make_plan
from vitdistill.distill.step import Distillation
from vitdistill.errors import ConfigError
from vitdistill.explain.cost import cost_of
from vitdistill.methods import METHODS, method_class
from vitdistill.methods.base import (
    Masking,
    Objective,
    TeacherObjective,
    TokenSelector,
    WeightSchedule,
)
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import RandomPatches
from vitdistill.methods.masking import RandomMasking
from vitdistill.option import options_of
from vitdistill.recipes.config import Recipe, TeacherConfig
from vitdistill.recipes.convert import from_dict, to_dict
from vitdistill.recipes.yaml import dump_recipe, load_recipe
from vitdistill.vit.needs import Needs
from vitdistill.vit.output import QKV, ViTOutput
from vitdistill.vit.walk import run_vit

NUM_CLASSES, NUM_IMAGES, GRID = 5, 6, (4, 4)
OBJECTIVES = [name for name in METHODS if issubclass(method_class(name), Objective)]
SELECTORS = [name for name in METHODS if issubclass(method_class(name), TokenSelector)]
MASKINGS = [name for name in METHODS if issubclass(method_class(name), Masking)]
SEEN = ["whole", "kept", "masked"]
"""How much student and teacher see: all; the teacher half of it; both half of it."""


def vit(
    seed: int, dim: int, depth: int, name: str = "vit_tiny_patch16_224", **args: Any
) -> nn.Module:
    return small_vits.vit(seed, name, std=0.2, embed_dim=dim, depth=depth, **args)


class Case:
    """A student, a teacher, a batch, and the method between them.

    ``shapes``: two plain ViTs ``alike``; ``unlike``: a student with two prefix tokens on 2 x 2
    patches, and a teacher with three on 4 x 4, of other width, depth and heads; two ``rotary`` ones
    with registers.
    """

    def __init__(
        self, name: str, mixed: bool = False, seen: str = "whole", shapes: str = "alike"
    ) -> None:
        self.method: Any = method_class(name)()
        is_objective = isinstance(self.method, Objective)
        if is_objective and self.method.needs_masking:
            seen = "masked"
        masking = self.method if isinstance(self.method, Masking) else None
        if seen == "masked" and masking is None:
            masking = RandomMasking(mask_rate=0.5)
        self.student, self.model = vit(0, 24, 4), vit(1, 36, 5)
        if is_objective and not self.method.teacher_needs(network(self.model)).logits:
            self.model = vit(1, 36, 5, num_classes=0)
        if shapes == "unlike":  # under a mask both have to have the same patches
            grid = {} if masking else {"patch_size": 8}
            self.student = vit(0, 24, 4, DISTILLED, **grid)
            classes = self.model.num_classes
            self.model = vit(1, 36, 5, reg_tokens=2, num_heads=3, num_classes=classes)
        if shapes == "rotary":
            self.student = vit(0, 24, 4, ROTARY)
            self.model = vit(1, 36, 5, ROTARY, num_heads=3, num_classes=self.model.num_classes)
        self.teacher = teacher_of(self.model)
        objectives = {"it": self.method} if is_objective else {"kd": SoftKD()}
        if shapes == "unlike":
            objectives |= {"both": CrossEntropy(head="all")}
        taught = any(isinstance(o, TeacherObjective) for o in objectives.values())
        self.teachers = {"teacher": self.teacher} if taught else {}
        selector = self.method if isinstance(self.method, TokenSelector) else None
        if seen == "kept" and taught and selector is None:
            selector = RandomPatches(keep_rate=0.5)
        student, networks = network(self.student, "student"), {"teacher": self.teacher.network}
        self.plan: Plan = make_plan(
            student, networks if taught else {}, objectives, selector, masking
        )
        self._keep: Tensor | None = None
        self.module = Distillation(self.student, self.plan)
        ids = torch.arange(NUM_IMAGES)
        self.batch = Batch(torch.randn(NUM_IMAGES, 3, 16, 16), ids % NUM_CLASSES, ids, ids * 0, 0)
        if mixed:
            self.batch.mixed_labels = self.batch.labels.flip(0)
            self.batch.lam = torch.linspace(0.1, 0.9, NUM_IMAGES)

    @property
    def adapter(self) -> nn.Module | None:
        return dict(self.module.adapters.items()).get("it")

    @property
    def keep(self) -> Tensor | None:
        """The patches that are left of a masking: the same tensor at every call."""
        if self._keep is None and self.plan.masking is not None:
            order = self.module.mask(self.batch)
            self._keep = order[:, : self.plan.student_keep]
        return self._keep

    def student_output(self, needs: Needs | None = None) -> ViTOutput:
        needs = self.plan.student_needs if needs is None else needs
        return run_vit(self.student, self.batch.images, needs, self.keep)

    def teacher_output(self, needs: Needs | None = None) -> ViTOutput | None:
        if not self.teachers:
            return None
        needs = self.plan.live["teacher"] if needs is None else needs
        return self.teacher(self.batch.images, needs, self.keep)

    def loss(
        self, student: ViTOutput, teacher: ViTOutput | None, batch: Batch | None = None
    ) -> Tensor:
        torch.manual_seed(5)  # a method that draws random numbers draws the same ones
        return self.method.loss(student, teacher, batch or self.batch, self.adapter)

    def loss_of(self, images: Tensor, student: ViTOutput, teacher: ViTOutput | None) -> Tensor:
        """Of these images alone, in this order."""
        outputs = permuted(student, images), permuted(teacher, images)
        return self.loss(*outputs, permuted_batch(self.batch, images))

    def select(self, student: ViTOutput, teacher: ViTOutput | None, noise: Tensor | None) -> Tensor:
        return self.method.select(GRID, 5, student, teacher, noise)

    def noise(self) -> Tensor | None:
        noise = torch.rand(NUM_IMAGES, 16, generator=torch.Generator().manual_seed(2))
        return noise if self.method.reads_noise else None


def case_if_possible(
    name: str, mixed: bool = False, seen: str = "whole", shapes: str = "alike"
) -> Case:
    """The case; with everything in sight where the objective says that it needs every patch, and
    the plan then refuses a masking.
    """
    method = method_class(name)()
    if seen == "masked" and isinstance(method, Objective) and method.needs_every_patch:
        with pytest.raises(ConfigError, match="reads every patch of the student"):
            Case(name, mixed, seen, shapes)
        seen = "whole"
    return Case(name, mixed, seen, shapes)


def everything(depth: int) -> Needs:
    blocks = frozenset(range(depth))
    return Needs(logits=True, hidden=blocks, attention=blocks, qkv=blocks, features=True)


def changed(output: ViTOutput, change: Callable[[str, int, Tensor], Tensor]) -> ViTOutput:
    """``output`` with every recorded tensor changed: ``change(kind, block, tensor)``."""
    single = {
        kind: None if value is None else change(kind, 0, value)
        for kind in ("logits", "head_logits", "features")
        for value in (getattr(output, kind),)
    }
    blocks = {
        kind: {i: change(kind, i, value) for i, value in getattr(output, kind).items()}
        for kind in ("hidden", "attention")
    }
    qkv = {i: QKV(*(change("qkv", i, t) for t in value)) for i, value in output.qkv.items()}
    return replace(output, **single, **blocks, qkv=qkv)


def spoilt(output: ViTOutput, is_spoilt: Callable[[str, int], bool]) -> ViTOutput:
    """``output`` with NaN for what ``is_spoilt(kind, block)`` says."""
    return changed(output, lambda kind, i, t: t * torch.nan if is_spoilt(kind, i) else t)


def poisoned(full: ViTOutput, declared: Needs) -> ViTOutput:
    """``full`` with NaN for everything that is not declared."""
    needs = declared.resolve(full.depth)

    def unread(kind: str, block: int) -> bool:
        asked = getattr(needs, kind, True)  # the heads' logits come with the logits
        return not (asked if isinstance(asked, bool) else block in asked)

    return spoilt(full, unread)


def spoilt_one_by_one(output: ViTOutput) -> list[ViTOutput]:
    """Copies of ``output`` with another one of its recorded tensors NaN in each."""
    places: set[tuple[str, int]] = set()
    changed(output, lambda kind, i, t: places.add((kind, i)) or t)
    places -= {("head_logits", 0)}
    return [spoilt(output, lambda kind, i, at=at: (kind, i) == at) for at in sorted(places)]


def permuted(output: ViTOutput | None, order: Tensor) -> ViTOutput | None:
    if output is None:
        return None
    keep = None if output.keep is None else output.keep[order]
    tensors = changed(replace(output, keep=None), lambda _, __, t: t[order])
    return replace(tensors, keep=keep)


def permuted_batch(batch: Batch, order: Tensor) -> Batch:
    names = ("images", "labels", "ids", "views", "mixed_labels", "lam")
    tensors = {name: getattr(batch, name) for name in names}
    return replace(batch, **{name: t[order] for name, t in tensors.items() if t is not None})


# --- objectives ----------------------------------------------------------------------------------


PAIRS = [
    (torch.float32, "labels", "whole", "alike"),
    (torch.bfloat16, "mixed", "whole", "unlike"),
    (torch.float32, "mixed", "kept", "unlike"),
    (torch.bfloat16, "labels", "kept", "alike"),
    (torch.bfloat16, "mixed", "masked", "alike"),
    (torch.float32, "labels", "masked", "unlike"),
    (torch.float32, "mixed", "kept", "rotary"),
    (torch.bfloat16, "labels", "masked", "rotary"),
]
"""Every two of these settings together once, and rotary networks that see a part."""


@pytest.mark.parametrize(("dtype", "labels", "seen", "shapes"), PAIRS)
@pytest.mark.parametrize("name", OBJECTIVES)
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
    ("seen", "shapes"), [*((seen, "alike") for seen in SEEN), ("kept", "rotary")]
)
@pytest.mark.parametrize("name", OBJECTIVES)
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
    case.module(case.batch, case.teachers)["loss"].backward()
    assert {key for key, p in named.items() if p.grad is not None} == expected
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


@pytest.mark.parametrize("shapes", ["alike", "rotary"])
@pytest.mark.parametrize("name", OBJECTIVES)
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


# --- selectors -----------------------------------------------------------------------------------


def selector_inputs(name: str) -> tuple[Case, ViTOutput, ViTOutput | None, Tensor | None]:
    case = Case(name)
    guide = case.teacher_output(case.plan.guides["teacher"]) if case.plan.guides else None
    return case, case.student_output(), guide, case.noise()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SELECTORS)
def test_a_choice_is_of_different_patches_of_the_grid(name: str, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        case, student, guide, noise = selector_inputs(name)
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


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_survives_json_and_yaml(name: str, tmp_path: Any) -> None:
    method: Any = method_class(name)()
    parts: dict[str, Any] = {"masking": method}
    if name in SELECTORS:
        parts = {"selector": method}
    elif name in OBJECTIVES:
        method = replace(method, schedule=WeightSchedule(to=0.5, end=0.75, shape="cosine"))
        parts = {"objectives": {"it": method}, "teachers": {"teacher": TeacherConfig(model="x")}}
    recipe = Recipe(**parts)
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


DECLARED = [*((name, method_class(name)) for name in METHODS), ("schedule", WeightSchedule)]


def test_every_setting_of_a_method_is_described() -> None:
    for name, method in DECLARED:
        assert {field.name for field in dataclasses.fields(method)} == set(options_of(method)), name


@pytest.mark.parametrize(("name", "method"), DECLARED)
def test_a_setting_out_of_its_bounds_is_refused_by_its_name(name: str, method: Any) -> None:
    base = {"to": 0.5} if method is WeightSchedule else {}
    hints = get_type_hints(method)
    wrong = [(field, "no such") for field, hint in hints.items() if get_origin(hint) is Literal]
    for field, about in options_of(method).items():
        outside = [about.above, about.below, math.nan, math.inf]
        outside += [] if about.at_least is None else [about.at_least - 1, about.at_least - 1e-9]
        outside += [] if about.at_most is None else [about.at_most + 1e-9]
        wrong += [(field, x) for x in outside if about.bounds and x is not None]
    for field, value in wrong:
        with pytest.raises(ConfigError) as caught:
            method(**{**base, field: value})
        assert caught.value.field.rpartition(".")[2] == field
