"""Costs: the paper's column, FLOPs counted on the code that runs, and the text that shows them."""

import re
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitdistill.cli import main
from vitdistill.cost import IMAGENET_TRAIN_IMAGES, cost_of, explain, flops, forward_flops, table, training_flops, vit_macs
from vitdistill.method import Network
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import MaskedKD, TeacherGuided
from vitdistill.plan import make_plan
from vitdistill.vit import Needs

LOGITS = Needs(logits=True)


def vit(name: str = "vit_tiny_patch16_224", **args: int) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **args)


def small(**args: int) -> nn.Module:
    return vit(**{"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10, **args})


# --- the paper's column ----------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(("recipe", "keep_rate", "paper"), PAPER)
def test_explain_reproduces_the_papers_teacher_cost(recipe: str, keep_rate: float, paper: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", recipe, "--keep-rate", str(keep_rate)]) == 0
    printed = capsys.readouterr().out
    assert f"{IMAGENET_TRAIN_IMAGES:,} images x 300 epochs" in printed
    (found,) = re.findall(r"([\d,]+) PMACs against", printed)
    assert int(found.replace(",", "")) == pytest.approx(paper, rel=0.005)


def test_the_whole_teachers_too() -> None:
    """1770, 6757 and 23677 peta-MACs in the paper."""
    for name, paper in (("deit_small_patch16_224", 1770), ("deit3_base_patch16_224", 6757), ("deit3_large_patch16_224", 23677)):
        network = Network.of(vit(name), "teacher", name, (224, 224))
        assert vit_macs(network) * IMAGENET_TRAIN_IMAGES * 300 / 1e15 == pytest.approx(paper, rel=0.005)


# --- counted FLOPs ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=5)
@given(keep=st.integers(1, 64))
def test_fewer_patches_cost_less(keep: int) -> None:
    model = small()
    masked, whole = forward_flops(model, (32, 32), LOGITS, keep), forward_flops(model, (32, 32), LOGITS)
    assert masked <= whole and (masked < whole or keep == 64)
    assert forward_flops(model, (32, 32), LOGITS, max(1, keep - 1)) <= masked


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_the_recorded_pass_costs_at_most_the_models_own(name: str) -> None:
    model = vit(name)
    assert forward_flops(model, (224, 224), LOGITS) < forward_flops(model, (224, 224))
    assert training_flops(model, (224, 224), LOGITS) < training_flops(model, (224, 224))


def test_counts_agree_with_the_formula() -> None:
    """The model's own pass is the paper's count, at 2 FLOPs a multiply-accumulate (the paper embeds the class token's bias for free)."""
    model = vit("deit_small_patch16_224")
    network = Network.of(model, "teacher", "deit_small_patch16_224", (224, 224))
    assert forward_flops(model, (224, 224)) == pytest.approx(2 * vit_macs(network), rel=1e-3)


def test_a_backward_pass_is_about_two_forward_passes() -> None:
    model = small()
    assert training_flops(model, (32, 32)) == pytest.approx(3 * forward_flops(model, (32, 32)), rel=0.05)


def test_stopping_early_costs_less() -> None:
    model = small()
    costs = [forward_flops(model, (32, 32), Needs(hidden=frozenset({i}))) for i in range(4)]
    assert costs == sorted(costs) and costs[0] < costs[-1] / 2.5


def test_counting_needs_no_weights_and_leaves_the_model_alone() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert training_flops(model, (32, 32), LOGITS) > 0
    assert not model.training and all(p.grad is None and not p.is_meta for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "args"),
    [("resnet18", {}), ("mobilenetv4_conv_small", {}), ("cait_xxs24_224", {"depth": 2}), ("swin_tiny_patch4_window7_224", {})],
)
def test_other_networks_are_counted_by_their_own_forward(name: str, args: dict[str, int]) -> None:
    model = vit(name, **args)
    assert forward_flops(model, (224, 224), LOGITS) == forward_flops(model, (224, 224)) > 0
    assert training_flops(model.train(), (224, 224), LOGITS) > 2 * forward_flops(model.eval(), (224, 224))


# --- plans -----------------------------------------------------------------------------------------------------------------------


def of(model: nn.Module, name: str) -> Network:
    return Network.of(model, name, f"{name}_model", (32, 32))


def test_a_masked_teacher_is_cheaper_and_a_guided_one_dearer() -> None:
    student, teacher = small(), small(embed_dim=96)
    networks = of(student, "student"), {"teacher": of(teacher, "teacher")}
    objectives = {"ce": CrossEntropy(), "kd": SoftKD()}
    costs = {
        selector: cost_of(make_plan(*networks, objectives, selector), student, {"teacher": teacher})
        for selector in (None, MaskedKD(keep_rate=0.5), MaskedKD(keep_rate=0.25), TeacherGuided(keep_rate=0.5))
    }
    whole, half, quarter, guided = costs.values()
    assert quarter.teachers["teacher"] < half.teachers["teacher"] < whole.teachers["teacher"] < guided.teachers["teacher"]
    assert {cost.teachers_plain["teacher"] for cost in costs.values()} == {forward_flops(teacher, (32, 32))}
    assert {cost.plain_kd for cost in costs.values()} == {whole.student_plain + whole.teachers_plain["teacher"]}
    assert half.step == half.student + half.teachers["teacher"] < whole.step <= whole.plain_kd
    assert half.student == pytest.approx(whole.student, rel=0.02)  # the row that chooses the patches costs next to nothing


def test_the_explanation_names_everything() -> None:
    student, teacher = small(), small(embed_dim=96)
    objectives = {"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.25, temperature=2.0)}
    plan = make_plan(of(student, "student"), {"teacher": of(teacher, "teacher")}, objectives, MaskedKD(keep_rate=0.5))
    cost = cost_of(plan, student, {"teacher": teacher})
    text = explain(plan, cost, 50_000, 30)
    for part in (
        "student_model",
        "teacher_model",
        f" {plan.student.num_parameters / 1e3:.0f} k ",
        flops(cost.student),
        flops(cost.teachers["teacher"]),
        flops(cost.teachers_plain["teacher"]),
        "student, student_model: 64 of 64 patches; 4 of 4 blocks; records logits and class-token attention of block 3",
        "teacher, teacher_model: 32 of 64 patches; 4 of 4 blocks; records logits",
        "50,000 images x 30 epochs",
        flops(cost.step * 1_500_000),
        "plain distillation",
        "0.5 x ce: cross-entropy with the labels, batch mean",
        "0.25 x kd: T^2 KL(teacher || student) of the logits, summed over classes, batch mean",
    ):
        assert part in text or part in " ".join(text.split()), part  # long lines are wrapped
    assert max(map(len, text.splitlines())) <= 100


def test_a_student_alone_is_compared_with_plain_training() -> None:
    student = small()
    plan = make_plan(of(student, "student"), {}, {"ce": CrossEntropy()})
    text = explain(plan, cost_of(plan, student, {}), 1000, 2)
    assert "plain training" in text and "distillation" not in text and "teacher" not in text and "together" not in text


def test_a_guided_plan_says_that_the_teacher_runs_twice() -> None:
    student, teacher = small(), small(embed_dim=96)
    plan = make_plan(of(student, "student"), {"teacher": of(teacher, "teacher")}, {"kd": SoftKD()}, TeacherGuided())
    assert "once more on the whole image" in " ".join(explain(plan, cost_of(plan, student, {"teacher": teacher}), 1, 1).split())


def test_two_teachers_are_shown_apart() -> None:
    student, teachers = small(), {"a": small(embed_dim=96), "b": small(depth=8)}
    networks = {name: of(model, name) for name, model in teachers.items()}
    plan = make_plan(of(student, "student"), networks, {"x": SoftKD(teacher="a"), "y": SoftKD(teacher="b")})
    text = explain(plan, cost_of(plan, student, teachers), 1, 1)
    assert "a_model" in text and "b_model" in text and "The a as" in text and "The b as" in text


# --- numbers as text -------------------------------------------------------------------------------------------------------------


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
    assert flops(count, unit) == text


def test_tables_are_aligned() -> None:
    lines = table([("a", "long header"), ("a cell", "b")])
    assert lines == ["  a       long header", "  -------------------", "  a cell  b"]
    assert replace(of(small(), "x"), name="y").name == "y"
