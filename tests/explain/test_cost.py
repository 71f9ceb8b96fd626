"""Costs: the paper's column, FLOPs counted on the code that runs, and the text that shows them."""

import re
from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
from vitdistill.vit.flops import forward_flops, training_flops
from vitdistill.vit.needs import Needs
from vitdistill.vit.network import Network

LOGITS = Needs(logits=True)


def vit(name: str = "vit_tiny_patch16_224", **args: int) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **args)


def small(**args: int) -> nn.Module:
    return vit(
        **{
            "img_size": 32,
            "patch_size": 4,
            "embed_dim": 48,
            "depth": 4,
            "num_heads": 3,
            "num_classes": 10,
            **args,
        }
    )


# --- the paper's column --------------------------------------------------------------------------

PAPER = [  # recipe, keep rate, peta-MACs of the teacher over the run (arXiv 2302.10494)
    ("deit_tiny_from_deit_small", 0.5, 866),
    ("deit_tiny_from_deit3_small", 0.25, 439),
    ("deit_tiny_from_deit_small", 0.4, 707),
    ("deit_tiny_from_deit_small", 0.75, 1282),
    ("deit_small_from_deit_base", 0.75, 4932),
    ("deit_small_from_deit3_base", 0.5, 3349),
    ("deit_base_from_deit3_large", 0.5, 11744),
    ("deit_base_from_deit3_large", 0.75, 17301),
]


@pytest.mark.whole
@pytest.mark.parametrize(("recipe", "keep_rate", "paper"), PAPER)
def test_explain_reproduces_the_papers_teacher_cost(
    recipe: str, keep_rate: float, paper: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", recipe, "--keep-rate", str(keep_rate)]) == 0
    printed = capsys.readouterr().out
    assert f"{IMAGENET_TRAIN_IMAGES:,} images x 300 epochs" in printed
    (found,) = re.findall(r"([\d,]+) PMACs against", printed)
    assert int(found.replace(",", "")) == pytest.approx(paper, rel=0.005)


def test_the_whole_teachers_too() -> None:
    """1770, 6757 and 23677 peta-MACs in the paper."""
    for name, paper in (
        ("deit_small_patch16_224", 1770),
        ("deit3_base_patch16_224", 6757),
        ("deit3_large_patch16_224", 23677),
    ):
        network = describe_network(vit(name), "teacher", name, (224, 224))
        assert vit_macs(network) * IMAGENET_TRAIN_IMAGES * 300 / 1e15 == pytest.approx(
            paper, rel=0.005
        )


# --- counted FLOPs -------------------------------------------------------------------------------


@settings(max_examples=5)
@given(keep=st.integers(1, 64))
def test_fewer_patches_cost_less(keep: int) -> None:
    model = small()
    masked, whole = (
        forward_flops(model, (32, 32), LOGITS, keep),
        forward_flops(model, (32, 32), LOGITS),
    )
    assert masked <= whole and (masked < whole or keep == 64)
    assert forward_flops(model, (32, 32), LOGITS, max(1, keep - 1)) <= masked


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_the_recorded_pass_costs_at_most_the_models_own(name: str) -> None:
    model = vit(name)
    assert forward_flops(model, (224, 224), LOGITS) < forward_flops(model, (224, 224))
    assert training_flops(model, (224, 224), LOGITS) < training_flops(model, (224, 224))


def test_counts_agree_with_the_formula() -> None:
    """The model's own pass is the paper's count, at 2 FLOPs a multiply-accumulate (the paper embeds
    the class token's bias for free).
    """
    model = vit("deit_small_patch16_224")
    network = describe_network(model, "teacher", "deit_small_patch16_224", (224, 224))
    assert forward_flops(model, (224, 224)) == pytest.approx(2 * vit_macs(network), rel=1e-3)


def test_a_backward_pass_is_about_two_forward_passes() -> None:
    model = small()
    assert training_flops(model, (32, 32)) == pytest.approx(
        3 * forward_flops(model, (32, 32)), rel=0.05
    )


def test_stopping_early_costs_less() -> None:
    model = small()
    costs = [forward_flops(model, (32, 32), Needs(hidden=frozenset({i}))) for i in range(4)]
    assert costs == sorted(costs) and costs[0] < costs[-1] / 2.5


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnet18", {}),
        ("mobilenetv4_conv_small", {}),
        ("cait_xxs24_224", {"depth": 2}),
        ("swin_tiny_patch4_window7_224", {}),
    ],
)
def test_other_networks_are_counted_by_their_own_forward(name: str, args: dict[str, int]) -> None:
    model = vit(name, **args)
    assert forward_flops(model, (224, 224), LOGITS) == forward_flops(model, (224, 224)) > 0
    assert training_flops(model.train(), (224, 224), LOGITS) > 2 * forward_flops(
        model.eval(), (224, 224)
    )


# --- plans ---------------------------------------------------------------------------------------


def of(model: nn.Module, name: str) -> Network:
    return describe_network(model, name, f"{name}_model", (32, 32))


def test_a_masked_teacher_is_cheaper_and_a_guided_one_dearer() -> None:
    student, teacher = small(), small(embed_dim=96)
    networks = of(student, "student"), {"teacher": of(teacher, "teacher")}
    objectives = {"ce": CrossEntropy(), "kd": SoftKD()}
    costs = {
        selector: cost_of(make_plan(*networks, objectives, selector), student, {"teacher": teacher})
        for selector in (
            None,
            MaskedKD(keep_rate=0.5),
            MaskedKD(keep_rate=0.25),
            TeacherGuided(keep_rate=0.5),
        )
    }
    whole, half, quarter, guided = costs.values()
    assert (
        quarter.teachers["teacher"]
        < half.teachers["teacher"]
        < whole.teachers["teacher"]
        < guided.teachers["teacher"]
    )
    assert {cost.teachers_plain["teacher"] for cost in costs.values()} == {
        forward_flops(teacher, (32, 32))
    }
    assert {cost.plain_kd for cost in costs.values()} == {
        whole.student_plain + whole.teachers_plain["teacher"]
    }
    assert half.step == half.student + half.teachers["teacher"] < whole.step <= whole.plain_kd
    assert half.student == pytest.approx(
        whole.student, rel=0.02
    )  # the row that chooses the patches costs next to nothing


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
    text = " ".join(explain(plan, cost, 50_000, 30).split())
    trained = plan.student.num_parameters + sum(cost.adapters.values())
    numbers = [cost.student, cost.step * 1_500_000, *cost.teachers.values()]
    shown = [format_count(n) for n in numbers + [n for n in cost.objectives.values() if n]]
    shown += [format_bytes(cost.activations), format_bytes(16 * trained)]
    assert all(number in text for number in [*shown, "50,000 images x 30 epochs"])
    assert all((f"{name}_model" in text) != alone for name in models)
    assert ("once more on the whole image" in text) != alone == ("plain training" in text)


# --- what objectives cost themselves -------------------------------------------------------------


def counted(
    objectives: dict[str, Objective],
    selector: TokenSelector | None = None,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> Cost:
    student, teacher = student or small(depth=3), teacher or small(depth=3, embed_dim=96)
    plan = make_plan(
        of(student, "student"), {"teacher": of(teacher, "teacher")}, objectives, selector
    )
    return cost_of(plan, student, {"teacher": teacher})


PROJECTION, GENERATOR, TOKEN = 48 * 96 + 96, 2 * (9 * 96**2 + 96), 96  # parameters


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


def test_equal_widths_cost_no_projection_and_unequal_grids_no_flops() -> None:
    same = counted({"vitkd": ViTKD()}, teacher=small(depth=3))
    assert same.objectives["vitkd"] == generator(width=48) and same.adapters["vitkd"] == 48 + 2 * (
        9 * 48**2 + 48
    )
    coarse = counted({"vitkd": ViTKD()}, student=small(depth=3, patch_size=8))
    assert (
        coarse.objectives["vitkd"] == 3 * projections(64) + generator()
    )  # projected where the teacher has its patches


def test_an_objective_that_reads_nothing_new_leaves_the_students_part_alone() -> None:
    logits = counted({"kd": SoftKD()})
    both = counted({"kd": SoftKD(), "nkd": NKD(), "ce": CrossEntropy()})
    assert (
        both.student == logits.student
        and set(both.objectives.values()) == {0}
        and both.adapters == {}
    )
    features = counted({"ce": CrossEntropy(), "one": ViTKD()})
    twice = counted({"ce": CrossEntropy(), "one": ViTKD(), "two": ViTKD(mask_rate=0.75)})
    assert (
        twice.student == features.student > logits.student
    )  # features are of every token, logits of the class token alone
    assert twice.objectives == {
        "ce": 0,
        "one": features.objectives["one"],
        "two": features.objectives["one"],
    }
    assert twice.teachers == features.teachers and twice.student_plain == logits.student_plain


def test_features_cost_what_a_whole_training_step_costs() -> None:
    """The last block whole, without its head: as much as the student's own step, less the head."""
    cost = counted({"vitkd": ViTKD()})
    assert cost.student == cost.student_plain - 6 * 48 * 10
    early = counted({"vitkd": ViTKD(high_weight=0.0)})
    assert (
        early.student < 0.75 * cost.student
        and early.teachers["teacher"] < 0.75 * cost.teachers["teacher"]
    )


def test_what_is_kept_for_the_backward_pass_grows_with_what_is_computed() -> None:
    kd = counted({"ce": CrossEntropy(), "kd": SoftKD()})
    assert (
        0 < kd.activations < kd.activations_plain
    )  # the class token alone goes through the last MLP
    more = counted({"ce": CrossEntropy(), "kd": SoftKD(), "vitkd": ViTKD()})
    assert more.activations_plain == kd.activations_plain
    # At least the whole last block's tokens, and the inputs of a projection and two convolutions,
    # in float32.
    assert more.activations - kd.activations > 4 * 64 * (4 * 48 + 48 + 2 * 96)
    deep = small(depth=6)
    alone = cost_of(make_plan(of(deep, "student"), {}, {"ce": CrossEntropy()}), deep, {})
    assert 1.7 < alone.activations_plain / kd.activations_plain < 2.05


def test_what_is_computed_once_for_a_batch_or_between_images_depends_on_its_size() -> None:
    model = small(depth=3)

    def steps(objective: Objective, masking: Masking | None = None) -> list[int]:
        reads = isinstance(objective, TeacherObjective)
        plan = make_plan(
            of(model, "student"),
            {"teacher": of(model, "teacher")} if reads else {},
            {"it": objective},
            masking=masking,
        )
        return [
            cost_of(plan, model, {"teacher": model} if reads else {}, batch_size).step
            for batch_size in (2, 8, 64)
        ]

    two, eight, many = steps(
        PixelReconstruction(decoder_dim=16, decoder_depth=2, decoder_num_heads=2), RandomMasking()
    )
    assert two > eight > many  # the mask tokens' first projection
    # q, k and v of the 64 places, 16 wide, forward and backward (6 FLOPs a weight), once a batch.
    assert two - many == pytest.approx(64 * 3 * 16 * 16 * 6 * (1 / 2 - 1 / 64), rel=0.01)
    two, eight, many = steps(Manifold(patch_weight=0.0, random_weight=0.0))
    assert two < eight < many
    assert len(set(steps(SoftKD()))) == 1


def test_explain_counts_for_the_micro_batch_of_the_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def own_part(*flags: str) -> str:
        assert main(["explain", "small_images_mae", *flags]) == 0
        (found,) = re.findall(
            r"mae, its own part +[\d.]+ \S* +([\d.]+ \S+)", capsys.readouterr().out
        )
        return found

    few, many = own_part("--batch-size", "4"), own_part("--batch-size", "512")
    assert few != many and own_part("--batch-size", "512", "--accumulate", "128") == few


def test_a_teacher_keeps_nothing_for_the_backward_pass() -> None:
    costs = [
        counted({"ce": CrossEntropy(), "kd": SoftKD()}, teacher=small(depth=depth))
        for depth in (1, 4)
    ]
    assert costs[0].activations == costs[1].activations


def test_kept_bytes_count_every_storage_once_and_no_weight() -> None:
    x, weight = torch.randn(5, 3, requires_grad=True), nn.Parameter(torch.randn(4, 3))

    def bytes_of(compute: Callable[[], torch.Tensor]) -> int:
        kept = _Kept()
        with kept:
            compute()
        return kept.bytes

    assert bytes_of(lambda: x.exp()) == 5 * 3 * 4  # its result
    assert bytes_of(lambda: x * x) == 5 * 3 * 4
    assert bytes_of(lambda: (x * x) + (x * 2) * x[:2].sum()) == 5 * 3 * 4 + 5 * 3 * 4 + 4
    assert bytes_of(lambda: nn.functional.linear(x, weight)) == 5 * 3 * 4
    assert bytes_of(lambda: x.detach() @ weight.t()) == 5 * 3 * 4
    assert bytes_of(lambda: x.detach() @ weight[:2].t()) == 5 * 3 * 4
    assert bytes_of(lambda: x + 1) == 0
    y = torch.randn(2, 2)
    assert bytes_of(lambda: y @ y) == 0  # nothing wants a gradient


def test_counting_leaves_networks_alone() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "num_classes": 3}
    student, teacher = (
        timm.create_model("vit_tiny_patch16_224", embed_dim=dim, depth=2, num_heads=2, **sizes)
        for dim in (24, 36)
    )
    student, teacher = student.eval(), teacher.eval()
    before = [p.clone() for p in (*student.parameters(), *teacher.parameters())]
    counted({"vitkd": ViTKD(), "kd": SoftKD()}, MaskedKD(), student, teacher)
    after = [*student.parameters(), *teacher.parameters()]
    assert (
        not student.training
        and not teacher.training
        and all(p.grad is None and not p.is_meta for p in after)
    )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_convolutional_teachers_features_are_counted() -> None:
    teacher = vit("resnet10t", channels=[8, 8, 16, 16], num_classes=0)
    cost = counted(
        {"ce": CrossEntropy(), "vitkd": ViTKD(low_blocks=(0,), teacher_low_blocks=(1,))},
        teacher=teacher,
    )
    low, high = projections(64, 48, 8), projections(1, 48, 16) + generator(1, 16)
    assert (
        cost.objectives["vitkd"] == low + high
        and cost.teachers["teacher"] == cost.teachers_plain["teacher"] > 0
    )


# --- numbers as text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [
        (2.514e9, "FLOPs", "2.51 GFLOPs"),
        (1.2816e18, "MACs", "1,282 PMACs"),
        (99.96e9, "FLOPs", "100 GFLOPs"),
        (999.6e9, "FLOPs", "1,000 GFLOPs"),
        (9.2e9, "FLOPs", "9.20 GFLOPs"),
        (99.94e9, "FLOPs", "99.9 GFLOPs"),
        (12, "FLOPs", "12 FLOPs"),
        (0, "FLOPs", "0 FLOPs"),
        (4.39e17, "MACs", "439 PMACs"),
    ],
)
def test_counts_have_three_digits_and_a_unit(count: float, unit: str, text: str) -> None:
    assert format_count(count, unit) == text
