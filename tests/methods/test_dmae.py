"""DMAE and masked pre-training: the authors' numbers, a teacher that stops early, masks shared by
both networks.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_vits
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_vits import batch_of, network, teacher_of
from torch import Tensor, nn

from vitdistill.data.batch import Batch
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.errors import ConfigError
from vitdistill.methods.base import Objective
from vitdistill.methods.dmae import DMAE, alignment_loss, three_quarters
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.masking import RandomMasking, random_masking
from vitdistill.methods.vitkd import ViTKD
from vitdistill.vit.families import describe_network
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = PixelReconstruction(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)


def vit(seed: int, dim: int = 24, depth: int = 4, **args: Any) -> nn.Module:
    args = {"embed_dim": dim, "depth": depth, "num_classes": 0, **args}
    return small_vits.vit(seed, std=0.1, **args)


class Pair:
    """A student and a teacher under a masking, and a batch of six images."""

    def __init__(
        self, objectives: dict[str, Objective], masking: RandomMasking, **teacher: Any
    ) -> None:
        self.student, self.model = vit(0), vit(1, 36, 8, **teacher)
        self.teacher = teacher_of(self.model)
        reads = any(hasattr(objective, "teacher") for objective in objectives.values())
        self.teachers = {"teacher": self.teacher} if reads else {}
        networks = {name: it.network for name, it in self.teachers.items()}
        student = network(self.student, "student")
        self.plan = make_plan(student, networks, objectives, masking=masking)
        torch.manual_seed(2)
        self.module = Distillation(self.student, self.plan)
        self.batch = batch_of(6)

    def losses(self) -> dict[str, Tensor]:
        return self.module(self.batch, self.teachers)


def author_weights(data: Any, who: str) -> dict[str, Tensor]:
    return {
        k.removeprefix(f"{who}."): torch.from_numpy(data[k]).double()
        for k in data.files
        if k.startswith(f"{who}.")
    }


def authors(who: str, dim: int, depth: int, heads: int) -> tuple[nn.Module, dict[str, Tensor]]:
    state = author_weights(np.load(GOLDEN / "dmae.npz"), who)
    model = vit(0, dim, depth, img_size=64, patch_size=16, num_heads=heads).double()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    return model, state


def test_the_authors_losses() -> None:
    """Both terms through the plan, in float64, as UCSC-VLAA/DMAE@a0f4959 computes them with the
    whole teacher.
    """
    data = np.load(GOLDEN / "dmae.npz")
    expected = json.loads((GOLDEN / "expected.json").read_text())
    student, state = authors("student", 48, 4, 3)
    teacher, _ = authors("teacher", 64, 8, 4)
    images, noise = torch.from_numpy(data["images"]), torch.from_numpy(data["noise"])
    objectives: dict[str, Objective] = {
        "mae": PixelReconstruction(decoder_dim=32, decoder_depth=2, decoder_num_heads=4),
        "dmae": DMAE(student_blocks=(2,), teacher_blocks=(5,)),
    }
    networks = {"student": student, "teacher": teacher}
    described = {n: describe_network(m, n, "vit", (64, 64)) for n, m in networks.items()}
    teachers = {"teacher": described["teacher"]}
    plan = make_plan(described["student"], teachers, objectives, masking=RandomMasking())
    assert plan.student_keep == plan.num_keep["teacher"] == 4
    module = Distillation(student, plan).double()
    module.adapters["mae"].load_state_dict(
        {key: state[key] for key in module.adapters["mae"].state_dict()}
    )
    heads = {
        f"projections.{key}": state[f"aligned_feature_projection_heads.{key}"]
        for key in ("0.weight", "0.bias")
    }
    module.adapters["dmae"].load_state_dict(heads)
    keep, _, _ = random_masking(noise, 0.75)
    assert sorted(keep[0].tolist()) == sorted(expected["dmae kept patches of image 0"])
    ours, its = (
        run_vit(student, images, plan.student_needs, keep),
        run_vit(teacher, images, plan.live["teacher"], keep),
    )
    batch = Batch(images, torch.zeros(3).long(), torch.arange(3), torch.zeros(3).long(), 0)
    found = {
        name: objective.loss(ours, its if name == "dmae" else None, batch, module.adapters[name])
        for name, objective in objectives.items()
    }
    assert found["mae"].item() == pytest.approx(
        expected["dmae reconstruction (float64)"], rel=1e-10, abs=1e-12
    )
    distance = expected["dmae feature distance L1 (float64), student block 2, teacher block 5"]
    assert found["dmae"].item() == pytest.approx(distance, rel=1e-10, abs=1e-12)
    whole = run_vit(teacher, images, Needs(features=True, hidden=frozenset({5})), keep)
    again = objectives["dmae"].loss(ours, whole, batch, module.adapters["dmae"])
    assert again.item() == found["dmae"].item()


@pytest.mark.parametrize(
    ("depth", "block"), [(12, 8), (24, 17), (4, 2), (8, 5), (32, 23), (1, 0), (2, 0)]
)
def test_three_quarters_of_the_depth(depth: int, block: int) -> None:
    assert three_quarters(depth) == block


@given(
    seed=st.integers(0, 1000),
    scale=st.floats(0.01, 100),
    distance=st.sampled_from(["l1", "l2", "smooth_l1"]),
)
def test_unit_length_forgets_the_scale_and_nothing_else_does(
    seed: int, scale: float, distance: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, its = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    loss = alignment_loss(ours, its, distance)
    scaled = alignment_loss(scale * ours, its / scale, distance)
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-4)
    raw = alignment_loss(ours, its, distance, normalize=False)
    expected = {
        "l1": (ours - its).abs(),
        "l2": (ours - its) ** 2,
        "smooth_l1": F.smooth_l1_loss(ours, its, reduction="none"),
    }[distance]
    assert raw.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_the_teacher_runs_no_further_than_its_aligned_block_and_sees_no_hidden_patch() -> None:
    pair = Pair({"mae": SMALL, "dmae": DMAE()}, RandomMasking(mask_rate=0.75))
    before = {name: loss.item() for name, loss in pair.losses().items()}
    with torch.no_grad():
        for block in pair.model.blocks[6:]:
            for p in block.parameters():
                p.fill_(torch.nan)
        pair.model.norm.weight.fill_(torch.nan)
    assert {name: loss.item() for name, loss in pair.losses().items()} == before
    order = pair.module.mask(pair.batch)
    hidden = order[:, 4:]
    for i, row in enumerate(hidden.tolist()):
        for patch in row:
            y, x = divmod(patch, 4)
            pair.batch.images[i, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 1e3
    assert pair.losses()["dmae"].item() == before["dmae"]
    assert pair.losses()["mae"].item() > 100 * before["mae"]  # which predicts the hidden patches


def test_several_pairs_add_up_in_the_order_they_are_given() -> None:
    both = Pair({"dmae": DMAE(student_blocks=(3, 1), teacher_blocks=(7, 2))}, RandomMasking())
    terms = []
    for i, (ours, its) in enumerate(((3, 7), (1, 2))):
        one = Pair({"dmae": DMAE(student_blocks=(ours,), teacher_blocks=(its,))}, RandomMasking())
        one.module.adapters["dmae"].projections[0] = both.module.adapters["dmae"].projections[i]
        terms.append(one.losses()["dmae"].item())
    assert both.losses()["dmae"].item() == pytest.approx(sum(terms), rel=1e-6)
    assert both.plan.live["teacher"].num_blocks(8) == 8


FORMS = [
    DMAE(projection="mlp"),
    DMAE(distance="smooth_l1", beta=0.5),
    DMAE(distance="l2", normalize=False),
]


@pytest.mark.parametrize("objective", FORMS)
def test_every_form_trains_the_student_up_to_its_block_and_the_projection(objective: DMAE) -> None:
    pair = Pair({"dmae": objective}, RandomMasking())
    pair.losses()["loss"].backward()
    reached = {
        name
        for name, p in pair.module.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert {name for name, _ in pair.module.adapters.named_parameters(prefix="adapters")} <= reached
    assert "student.blocks.2.mlp.fc2.weight" in reached
    assert "student.blocks.3.mlp.fc2.weight" not in reached


MASK, RATE = RandomMasking(), "masking.mask_rate"
SIZES = {"img_size": 32, "patch_size": 8, "global_pool": "avg"}
REFUSED: list[tuple[Objective, dict[str, Any], dict[str, Any] | None, Any, str]] = [
    (DMAE(teacher_blocks=(8,)), {}, {}, MASK, ""),  # there is no block 8
    (DMAE(student_blocks=(4,)), {}, {}, MASK, ""),
    (DMAE(), {}, {"num_classes": 10}, MASK, "objectives.it.any_teacher"),
    (DMAE(), {}, {"patch_size": 8}, MASK, "teachers.teacher.image_size"),
    (DMAE(projection="none"), {}, {}, MASK, "objectives.it.projection"),
    (ViTKD(), {}, {}, MASK, "masking"),  # it generates from every patch
    (SMALL, {}, None, None, "masking"),
    (SMALL, {}, None, RandomMasking(mask_rate=0.0), RATE),
    (SMALL, {}, None, RandomMasking(teacher_mask_rate=0.5), "masking.teacher_mask_rate"),
    (SMALL, {}, None, RandomMasking(mask_rate=0.95), RATE),
    (SMALL, SIZES, None, MASK, "student.model_args"),
    (SMALL, {**SIZES, "class_token": False}, None, MASK, "student.model_args"),
]


@pytest.mark.parametrize(("objective", "student", "teacher", "masking", "field"), REFUSED)
def test_what_cannot_be_compared_or_teaches_nothing_is_refused(
    objective: Objective,
    student: dict[str, Any],
    teacher: dict[str, Any] | None,
    masking: RandomMasking | None,
    field: str,
) -> None:
    size = student.get("img_size", 16)
    networks = describe_network(vit(0, **student), "student", "vit", (size, size))
    teachers = {}
    if teacher is not None:
        teachers = {"teacher": network(vit(1, 36, 8, **teacher), "teacher")}
    with pytest.raises(ConfigError) as caught:
        make_plan(networks, teachers, {"it": objective}, masking=masking)
    assert caught.value.field == field


def test_a_stem_whose_patches_are_not_pixels_is_refused() -> None:
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=0, depth=1, img_size=64)
    student = describe_network(hybrid, "student", "vit", (64, 64))
    with pytest.raises(ConfigError) as caught:
        make_plan(student, {}, {"mae": SMALL}, masking=MASK)
    assert caught.value.field == "student.model"


def test_what_the_refusals_advise_is_not_refused() -> None:
    patches_alone = {"class_token": False, "global_pool": "avg"}
    for args in (
        {**patches_alone, "fc_norm": False},
        {**patches_alone, "name": small_vits.ROTARY, "use_fc_norm": False},
        {"global_pool": "token"},
        {"name": "vit_pe_spatial_tiny_patch16_512"},  # no norm is left untrained: there is none
    ):
        student = network(vit(0, **args), "student")
        assert make_plan(student, {}, {"mae": SMALL}, masking=MASK).student_keep == 4
    classifier = {"teacher": network(vit(1, 36, 8, num_classes=10), "teacher")}
    objectives: dict[str, Objective] = {"dmae": DMAE(any_teacher=True)}
    assert make_plan(network(vit(0), "student"), classifier, objectives, masking=MASK)


def test_without_a_projection_raw_features_are_compared_as_the_authors_do() -> None:
    losses = []
    for how in (None, False, True):
        objective = DMAE(projection="none", normalize=how)
        pair = Pair({"dmae": objective}, MASK, embed_dim=24)
        losses.append(pair.losses()["dmae"].item())
        assert "dmae" not in pair.module.adapters
    assert losses[0] == losses[1] != losses[2]


def test_at_a_mask_rate_of_0_dmae_alone_may_learn() -> None:
    pair = Pair({"dmae": DMAE()}, RandomMasking(mask_rate=0.0))
    assert pair.plan.student_keep == 16 and pair.losses()["dmae"].item() > 0
