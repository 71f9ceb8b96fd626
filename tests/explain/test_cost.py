"""Costs: the paper's column, FLOPs counted on the code that runs, and the text that shows them."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vits import recorded_flops
from torch import nn

from vitdistill.cli import main
from vitdistill.distill.plan import make_plan
from vitdistill.explain.cost import IMAGENET_TRAIN_IMAGES, Cost, _Kept, cost_of, vit_macs
from vitdistill.explain.text import explain
from vitdistill.messages import format_bytes, format_count
from vitdistill.methods.base import Masking, Objective, TeacherObjective, TokenSelector
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.manifold import Manifold
from vitdistill.methods.maskedkd import MaskedKD, RandomPatches, TeacherGuided
from vitdistill.methods.masking import RandomMasking
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.vit.families import describe_network
from vitdistill.vit.flops import count_flops, forward_flops, training_flops
from vitdistill.vit.needs import Needs
from vitdistill.vit.network import Network
from vitdistill.vit.patches import num_kept_patches

LOGITS = Needs(logits=True)
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}


def vit(name: str = "vit_tiny_patch16_224", **args: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **args)


def small(**args: int) -> nn.Module:
    return vit(**{**SMALL, "num_classes": 10, **args})


# --- the paper's column --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "keep_rate", "paper"),  # peta-MACs of the teacher over the run (arXiv 2302.10494)
    [
        ("deit_small_patch16_224", 1.0, 1770),
        ("deit_small_patch16_224", 0.75, 1282),
        ("deit_small_patch16_224", 0.5, 866),
        ("deit_small_patch16_224", 0.4, 707),
        ("deit_small_patch16_224", 0.25, 439),
        ("deit3_base_patch16_224", 1.0, 6757),
        ("deit3_base_patch16_224", 0.75, 4932),
        ("deit3_base_patch16_224", 0.5, 3349),
        ("deit3_large_patch16_224", 1.0, 23677),
        ("deit3_large_patch16_224", 0.75, 17301),
        ("deit3_large_patch16_224", 0.5, 11744),
    ],
)
def test_the_papers_teacher_cost(teacher: str, keep_rate: float, paper: int) -> None:
    network = describe_network(vit(teacher), "teacher", teacher, (224, 224))
    macs = vit_macs(network, num_kept_patches(196, keep_rate)) * IMAGENET_TRAIN_IMAGES * 300
    assert macs / 1e15 == pytest.approx(paper, rel=0.005)


def test_explain_prints_the_papers_teacher_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "deit_tiny_from_deit_small", "--keep-rate", "0.4"]) == 0
    printed = capsys.readouterr().out
    assert f"{IMAGENET_TRAIN_IMAGES:,} images x 300 epochs" in printed
    (found,) = re.findall(r"([\d,]+) PMACs against", printed)
    assert int(found) == pytest.approx(707, rel=0.005)


# --- counted FLOPs -------------------------------------------------------------------------------


@settings(max_examples=5)
@given(keep=st.integers(2, 64))
def test_fewer_patches_cost_less(keep: int) -> None:
    model = small()
    fewer, masked, whole = (
        recorded_flops(model, (32, 32), LOGITS, k) for k in (keep - 1, keep, None)
    )
    assert fewer < masked <= whole and (masked < whole or keep == 64)


def test_counts_agree_with_the_formula() -> None:
    """The model's own pass is the paper's count, at 2 FLOPs a multiply-accumulate (the paper embeds
    the class token's bias for free); the recorded pass leaves out what nobody reads.
    """
    model = vit("deit_small_patch16_224")
    network = describe_network(model, "teacher", "deit_small_patch16_224", (224, 224))
    assert forward_flops(model, (224, 224)) == pytest.approx(2 * vit_macs(network), rel=1e-3)
    assert recorded_flops(model, (224, 224), LOGITS) < forward_flops(model, (224, 224))


def test_a_backward_pass_is_about_two_forward_passes_and_stopping_early_costs_less() -> None:
    model = small()
    once = forward_flops(model, (32, 32))
    assert training_flops(model, (32, 32)) == pytest.approx(3 * once, rel=0.05)
    costs = [recorded_flops(model, (32, 32), Needs(hidden=frozenset({i}))) for i in range(4)]
    assert costs == sorted(costs) and costs[0] < costs[-1] / 2.5


@pytest.mark.parametrize(
    ("name", "args"),
    [("resnet10t", {}), ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)})],
)
def test_other_networks_are_counted_by_their_own_forward(name: str, args: dict[str, Any]) -> None:
    model = vit(name, **args)
    once = forward_flops(model, (224, 224))
    assert recorded_flops(model, (224, 224), LOGITS) == once > 0
    assert training_flops(model.train(), (224, 224)) > 2 * once


# --- plans ---------------------------------------------------------------------------------------


def of(model: nn.Module, name: str) -> Network:
    return describe_network(model, name, f"{name}_model", (32, 32))


def counted(
    objectives: dict[str, Objective],
    selector: TokenSelector | None = None,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> Cost:
    student, teacher = student or small(depth=3), teacher or small(depth=3, embed_dim=96)
    networks = of(student, "student"), {"teacher": of(teacher, "teacher")}
    return cost_of(make_plan(*networks, objectives, selector), student, {"teacher": teacher})


def test_a_masked_teacher_is_cheaper_and_a_guided_one_dearer() -> None:
    rates = (MaskedKD(keep_rate=0.25), MaskedKD(keep_rate=0.5), None, TeacherGuided(keep_rate=0.5))
    costs = [counted({"ce": CrossEntropy(), "kd": SoftKD()}, selector) for selector in rates]
    paid = [cost.teachers["teacher"] for cost in costs]
    assert paid == sorted(paid) and len({*paid}) == 4
    _, half, whole, _ = costs
    plain = forward_flops(small(depth=3, embed_dim=96), (32, 32))
    assert {cost.teachers_plain["teacher"] for cost in costs} == {plain}
    assert {cost.plain_kd for cost in costs} == {whole.student_plain + plain}
    assert half.step == half.student + half.teachers["teacher"] < whole.step <= whole.plain_kd
    # The row that chooses the patches costs next to nothing.
    assert half.student == pytest.approx(whole.student, rel=0.02)


@pytest.mark.parametrize("alone", [False, True])
def test_the_explanation_has_every_number(alone: bool) -> None:
    student, models = small(), {"a": small(embed_dim=96), "b": small(depth=8)}
    objectives: dict[str, Objective] = {"ce": CrossEntropy()}
    if not alone:
        objectives |= {"x": ViTKD(teacher="a"), "y": SoftKD(teacher="b", weight=0.25)}
    teachers = {} if alone else models
    networks = {name: of(model, name) for name, model in teachers.items()}
    selector = None if alone else TeacherGuided()
    plan = make_plan(of(student, "student"), networks, objectives, selector)
    cost = cost_of(plan, student, teachers)
    page = explain(plan, cost, 50_000, 30)
    text = " ".join(page.split())
    trained = plan.student.num_parameters + sum(cost.adapters.values())
    numbers = [cost.student, cost.step * 1_500_000, *cost.teachers.values()]
    shown = [format_count(n) for n in numbers + [n for n in cost.objectives.values() if n]]
    shown += [format_bytes(cost.activations), format_bytes(16 * trained)]
    assert all(number in text for number in [*shown, "50,000 images x 30 epochs"])
    assert all((f"{name}_model" in text) != alone for name in models)
    assert ("once more on the whole image" in text) != alone == ("plain training" in text)
    assert max(map(len, page.splitlines())) <= 80


# --- what objectives cost themselves -------------------------------------------------------------

PROJECTION, GENERATOR, TOKEN = 48 * 96 + 96, 2 * (9 * 96**2 + 96), 96  # parameters


def resampling(places: int, to: int, width: int = 48) -> int:
    """A grid's vectors at the places of another one, forward and backward."""
    return 2 * 2 * places * to * width


def projections(patches: int, ours: int = 48, its: int = 96) -> int:
    """Forward and backward of a projection of so many patches: 3 x 2 multiply-accumulates."""
    return 6 * patches * ours * its


def generator(patches: int = 64, width: int = 96) -> int:
    return 6 * patches * 2 * 9 * width**2


OWN: list[tuple[ViTKD, TokenSelector | None, int, int]] = [
    (ViTKD(), None, 3 * projections(64) + generator(), 3 * PROJECTION + TOKEN + GENERATOR),
    (ViTKD(mask_rate=0.0), None, 3 * projections(64) + generator(), 3 * PROJECTION + GENERATOR),
    (ViTKD(high_weight=0.0), None, 2 * projections(64), 2 * PROJECTION),
    (ViTKD(low_blocks=()), None, projections(64) + generator(), PROJECTION + TOKEN + GENERATOR),
    # Only patches that were seen are mimicked; the generator needs them all.
    (
        ViTKD(),
        RandomPatches(num_keep=24),
        2 * projections(24) + projections(64) + generator(),
        3 * PROJECTION + TOKEN + GENERATOR,
    ),
]


@pytest.mark.parametrize(("objective", "selector", "own", "parameters"), OWN)
def test_the_cost_of_vitkd_by_hand(
    objective: ViTKD, selector: TokenSelector | None, own: int, parameters: int
) -> None:
    cost = counted({"ce": CrossEntropy(), "vitkd": objective}, selector)
    assert cost.objectives == {"ce": 0, "vitkd": own} and cost.adapters == {"vitkd": parameters}
    assert cost.step == cost.student + cost.teachers["teacher"] + own


@pytest.mark.parametrize("groups", [1, 4, 24])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_each_gradient_of_a_convolution_costs_its_forward_pass(groups: int, kind: type) -> None:
    """torch's own formula takes a grouped weight's gradient for that of a dense one."""
    convolution = kind(24, 48, 3, groups=groups)
    images = torch.zeros(2, 24, 9, 9, requires_grad=True)
    with count_flops() as forward:
        output = convolution(images)
    with count_flops() as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops() > 0


def test_equal_widths_cost_no_projection_and_unequal_grids_a_product() -> None:
    same = counted({"vitkd": ViTKD()}, teacher=small(depth=3))
    assert same.objectives["vitkd"] == generator(width=48)
    assert same.adapters["vitkd"] == 48 + 2 * (9 * 48**2 + 48)
    coarse = counted({"vitkd": ViTKD()}, student=small(depth=3, patch_size=8))
    # Projected where the teacher has its patches.
    each = resampling(16, 64) + projections(64)
    assert coarse.objectives["vitkd"] == 3 * each + generator()


def test_a_convolutional_teachers_features_are_counted() -> None:
    teacher = vit("resnet10t", channels=[8, 8, 16, 16], num_classes=0)
    cost = counted({"vitkd": ViTKD(low_blocks=(0,), teacher_low_blocks=(1,))}, teacher=teacher)
    low = projections(64, 48, 8)
    high = resampling(64, 1) + projections(1, 48, 16) + generator(1, 16)
    assert cost.objectives["vitkd"] == low + high
    assert cost.teachers["teacher"] == cost.teachers_plain["teacher"] > 0


def test_an_objective_that_reads_nothing_new_leaves_the_students_part_alone() -> None:
    logits = counted({"kd": SoftKD()})
    both = counted({"kd": SoftKD(), "nkd": NKD(), "ce": CrossEntropy()})
    assert both.student == logits.student and both.adapters == {}
    assert {*both.objectives.values()} == {0}
    features = counted({"ce": CrossEntropy(), "one": ViTKD()})
    twice = counted({"ce": CrossEntropy(), "one": ViTKD(), "two": ViTKD(mask_rate=0.75)})
    # Features are of every token, logits of the class token alone.
    assert twice.student == features.student > logits.student
    assert twice.objectives == {**features.objectives, "two": features.objectives["one"]}
    assert twice.teachers == features.teachers and twice.student_plain == logits.student_plain


def test_what_is_kept_for_the_backward_pass_grows_with_what_is_computed() -> None:
    kd = counted({"ce": CrossEntropy(), "kd": SoftKD()})
    # The class token alone goes through the last MLP.
    assert 0 < kd.activations < kd.activations_plain
    more = counted({"ce": CrossEntropy(), "kd": SoftKD(), "vitkd": ViTKD()})
    assert more.activations_plain == kd.activations_plain
    # At least the whole last block's tokens, and the inputs of a projection and two convolutions,
    # in float32.
    assert more.activations - kd.activations > 4 * 64 * (4 * 48 + 48 + 2 * 96)
    deep = counted({"ce": CrossEntropy(), "kd": SoftKD()}, teacher=small(depth=4, embed_dim=96))
    assert deep.activations == kd.activations, "a teacher keeps nothing"


def test_what_is_computed_once_for_a_batch_or_between_images_depends_on_its_size() -> None:
    model = small(depth=3)

    def steps(objective: Objective, masking: Masking | None = None) -> list[int]:
        teachers = {"teacher": model} if isinstance(objective, TeacherObjective) else {}
        networks = {name: of(model, name) for name in teachers}
        plan = make_plan(of(model, "student"), networks, {"it": objective}, masking=masking)
        return [cost_of(plan, model, teachers, batch_size).step for batch_size in (2, 64)]

    mae = PixelReconstruction(decoder_dim=16, decoder_depth=2, decoder_num_heads=2)
    two, many = steps(mae, RandomMasking())
    assert two > many  # the mask tokens' first projection
    # q, k and v of the 64 places, 16 wide, forward and backward (6 FLOPs a weight), once a batch.
    assert two - many == pytest.approx(64 * 3 * 16 * 16 * 6 * (1 / 2 - 1 / 64), rel=0.01)
    two, many = steps(Manifold(patch_weight=0.0, random_weight=0.0))
    assert two < many
    assert len(set(steps(SoftKD()))) == 1


@pytest.mark.whole
def test_explain_counts_for_the_micro_batch_of_the_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def own_part(*flags: str) -> str:
        assert main(["explain", "small_images_mae", *flags]) == 0
        printed = capsys.readouterr().out
        (found,) = re.findall(r"mae, its own part +[\d.]+ \S* +([\d.]+ \S+)", printed)
        return found

    few, many = own_part("--batch-size", "4"), own_part("--batch-size", "512")
    assert few != many and own_part("--batch-size", "512", "--accumulate", "128") == few


def test_kept_bytes_count_every_storage_once_and_no_weight() -> None:
    x, weight = torch.randn(5, 3, requires_grad=True), nn.Parameter(torch.randn(4, 3))

    def bytes_of(compute: Callable[[], torch.Tensor]) -> int:
        kept = _Kept()
        with kept:
            compute()
        return kept.bytes

    assert bytes_of(lambda: x.exp()) == 5 * 3 * 4  # its result
    assert bytes_of(lambda: (x * x) + (x * 2) * x[:2].sum()) == 5 * 3 * 4 + 5 * 3 * 4 + 4
    assert bytes_of(lambda: nn.functional.linear(x, weight)) == 5 * 3 * 4
    assert bytes_of(lambda: x.detach() @ weight[:2].t()) == 5 * 3 * 4
    assert bytes_of(lambda: x + 1) == 0


def test_counting_leaves_networks_alone() -> None:
    networks = [timm.create_model("vit_tiny_patch16_224", **SMALL).eval() for _ in range(2)]
    before = [{key: value.clone() for key, value in n.state_dict().items()} for n in networks]
    counted({"vitkd": ViTKD(), "kd": SoftKD()}, MaskedKD(), *networks)
    for network, state in zip(networks, before, strict=True):
        assert not network.training and all(p.grad is None for p in network.parameters())
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_inputs_have_a_size_and_enlarged_images_are_told() -> None:
    student, teacher = small(), small(img_size=16, patch_size=4)
    described = describe_network(teacher, "teacher", "a_model", (16, 16))
    objectives: dict[str, Objective] = {"kd": SoftKD()}
    plan = make_plan(of(student, "student"), {"teacher": described}, objectives)
    cost = cost_of(plan, student, {"teacher": teacher})
    for side in (0, 1, 7, 8, 15, 16, 31, 32, 500):
        page = " ".join(explain(plan, cost, 50_000, 30, side).split())
        for name, size, enlarged in (
            ("student, student", 32, side < 16),
            ("teacher, a", 16, side < 8),
        ):
            told = f"{name}_model, {size} x {size} pixels"
            times = f"enlarged to that: {size**2 / (side or 1) ** 2:.0f} times the pixels"
            assert (f"{told} (images of {side} are {times}" in page) == (side > 0 and enlarged)
            assert (f"{told}: " in page) == (side == 0 or not enlarged)
