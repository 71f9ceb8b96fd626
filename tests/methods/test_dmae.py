"""DMAE and masked pre-training: the authors' numbers, a teacher that stops early, masks shared by
both networks.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vitdistill.data.augment import InputSpec
from vitdistill.data.batch import Batch
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.distill.teacher import Teacher
from vitdistill.errors import ConfigError
from vitdistill.methods.base import Objective
from vitdistill.methods.dmae import DMAE, alignment_loss, three_quarters
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.masking import RandomMasking, random_masking
from vitdistill.methods.vitkd import ViTKD
from vitdistill.models.mae import init_mae
from vitdistill.vit.families import describe_network
from vitdistill.vit.needs import Needs
from vitdistill.vit.network import Network
from vitdistill.vit.walk import run_vit

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = InputSpec((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SMALL = PixelReconstruction(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)


def vit(seed: int, dim: int = 24, depth: int = 4, **args: Any) -> nn.Module:
    torch.manual_seed(seed)
    settings = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": 2,
        "num_classes": 0,
    }
    return timm.create_model("deit_tiny_patch16_224", **{**settings, **args}).eval()


class Pair:
    """A student and a teacher under a masking, and a batch of six images."""

    def __init__(
        self, objectives: dict[str, Objective], masking: RandomMasking, **teacher: Any
    ) -> None:
        self.student, self.model = vit(0), vit(1, 36, 8, **teacher)
        init_mae(self.student)
        self.teacher = Teacher(
            self.model, describe_network(self.model, "teacher", "big", (16, 16)), SPEC, SPEC
        )
        reads = any(hasattr(objective, "teacher") for objective in objectives.values())
        self.teachers = {"teacher": self.teacher} if reads else {}
        networks = {name: it.network for name, it in self.teachers.items()}
        self.plan = make_plan(
            describe_network(self.student, "student", "small", (16, 16)),
            networks,
            objectives,
            masking=masking,
        )
        torch.manual_seed(2)
        self.module = Distillation(self.student, self.plan)
        ids = torch.arange(6)
        torch.manual_seed(3)
        self.batch = Batch(torch.randn(6, 3, 16, 16), ids % 3, ids, ids * 0, 0)

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


def test_the_authors_losses_and_their_gradients() -> None:
    """Both terms through the plan, in float64, as UCSC-VLAA/DMAE@a0f4959 computes them with the
    whole teacher.
    """
    data, expected = (
        np.load(GOLDEN / "dmae.npz"),
        json.loads((GOLDEN / "expected.json").read_text()),
    )
    student, state = authors("student", 48, 4, 3)
    teacher, _ = authors("teacher", 64, 8, 4)
    images, noise = torch.from_numpy(data["images"]), torch.from_numpy(data["noise"])
    objectives: dict[str, Objective] = {
        "mae": PixelReconstruction(decoder_dim=32, decoder_depth=2, decoder_num_heads=4),
        "dmae": DMAE(student_blocks=(2,), teacher_blocks=(5,)),
    }
    networks = (
        describe_network(student, "student", "s", (64, 64)),
        {"teacher": describe_network(teacher, "teacher", "t", (64, 64))},
    )
    assert objectives["dmae"].student_needs(networks[0]) == DMAE().student_needs(networks[0])
    plan = make_plan(*networks, objectives, masking=RandomMasking(mask_rate=0.75))
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
    assert (
        objectives["dmae"].loss(ours, whole, batch, module.adapters["dmae"]).item()
        == found["dmae"].item()
    )
    (found["mae"] + found["dmae"]).backward()
    with torch.no_grad():  # the derivative along the gradient, by central differences
        parameters = [p for p in module.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        values = []
        for step in (1e-5, -1e-5):
            for p in parameters:
                p.add_(p.grad, alpha=step / norm.item())
            there = run_vit(student, images, plan.student_needs, keep)
            values.append(
                sum(
                    o.loss(there, its if n == "dmae" else None, batch, module.adapters[n]).item()
                    for n, o in objectives.items()
                )
            )
            for p in parameters:
                p.sub_(p.grad, alpha=step / norm.item())
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(norm.item(), rel=1e-6)


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
    assert alignment_loss(scale * ours, its / scale, distance).item() == pytest.approx(
        loss.item(), rel=1e-4
    )
    assert alignment_loss(its, its, distance).item() == 0
    raw = alignment_loss(ours, its, distance, normalize=False)
    expected = {
        "l1": (ours - its).abs(),
        "l2": (ours - its) ** 2,
        "smooth_l1": F.smooth_l1_loss(ours, its, reduction="none"),
    }[distance]
    assert raw.item() == pytest.approx(expected.mean().item(), rel=1e-5)


@given(seed=st.integers(0, 1000), dim=st.integers(1, 6), beta=st.floats(2.0, 10.0))
def test_smooth_l1_of_unit_length_with_a_beta_of_2_and_more_is_l2(
    seed: int, dim: int, beta: float
) -> None:
    """Which is why it is refused; opposite vectors are as far apart as it gets."""
    generator = torch.Generator().manual_seed(seed)
    ours, its = (
        torch.randn(2, 3, dim, generator=generator),
        torch.randn(2, 3, dim, generator=generator),
    )
    for other in (its, -ours):
        expected = alignment_loss(ours, other, "l2").item() / (2 * beta)
        assert alignment_loss(ours, other, "smooth_l1", beta=beta).item() == pytest.approx(
            expected, rel=1e-5
        )
    assert DMAE(distance="smooth_l1", beta=1.9) and DMAE(
        distance="smooth_l1", beta=beta, normalize=False
    )


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


def test_a_mask_belongs_to_a_sample_and_its_view() -> None:
    pair = Pair({"mae": SMALL}, RandomMasking(mask_rate=0.5))
    order = pair.module.mask(pair.batch)
    turned = Batch(
        pair.batch.images, pair.batch.labels, pair.batch.ids.flip(0), pair.batch.views, 0
    )
    later = Batch(pair.batch.images, pair.batch.labels, pair.batch.ids, pair.batch.views + 1, 1)
    assert torch.equal(pair.module.mask(turned), order.flip(0))
    assert not torch.equal(pair.module.mask(later), order)


def test_a_teacher_that_sees_more_is_compared_on_what_the_student_sees() -> None:
    """AMD's asymmetric masks: the student's patches are among the teacher's, and other context
    changes what it says of them.
    """
    pair = Pair(
        {"mae": SMALL, "dmae": DMAE()}, RandomMasking(mask_rate=0.75, teacher_mask_rate=0.25)
    )
    assert (pair.plan.student_keep, pair.plan.num_keep) == (4, {"teacher": 12})
    student, answers = pair.module.answer(pair.batch, pair.teachers)
    answer = answers["teacher"]
    assert answer.keep is student.keep and answer.hidden[5].shape == (6, 5, 36)
    order = pair.module.mask(pair.batch)
    seen = pair.teacher(pair.batch.images, Needs(hidden=frozenset({5})), order[:, :12])
    assert torch.equal(answer.hidden[5], seen.hidden[5][:, :5])
    alike = Pair({"mae": SMALL, "dmae": DMAE()}, RandomMasking(mask_rate=0.75))
    assert alike.losses()["dmae"].item() != pair.losses()["dmae"].item()


def test_several_pairs_add_up_in_the_order_they_are_given() -> None:
    both = Pair({"dmae": DMAE(student_blocks=(3, 1), teacher_blocks=(7, 2))}, RandomMasking())
    terms = []
    for i, (ours, its) in enumerate(((3, 7), (1, 2))):
        one = Pair({"dmae": DMAE(student_blocks=(ours,), teacher_blocks=(its,))}, RandomMasking())
        one.module.adapters["dmae"].projections[0] = both.module.adapters["dmae"].projections[i]
        terms.append(one.losses()["dmae"].item())
    assert both.losses()["dmae"].item() == pytest.approx(sum(terms), rel=1e-6)
    assert both.plan.live["teacher"].num_blocks(8) == 8


@pytest.mark.parametrize(
    "objective",
    [
        DMAE(projection="mlp"),
        DMAE(distance="smooth_l1", beta=0.5),
        DMAE(distance="l2", normalize=False),
    ],
)
def test_every_form_trains_student_and_projection_and_not_the_teacher(objective: DMAE) -> None:
    pair = Pair({"dmae": objective}, RandomMasking())
    pair.losses()["loss"].backward()
    reached = {
        name
        for name, p in pair.module.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert {name for name, _ in pair.module.adapters.named_parameters(prefix="adapters")} <= reached
    assert {
        f"student.blocks.{i}.mlp.fc2.weight" for i in range(3)
    } <= reached and "student.blocks.3.mlp.fc2.weight" not in reached
    assert "student.pos_embed" not in reached and all(
        p.grad is None for p in pair.model.parameters()
    )


def test_other_objectives_compare_under_the_same_mask() -> None:
    """Features at the visible patches; a teacher's class token of what it saw."""
    vitkd = ViTKD(reduction="mean", high_weight=0.0)
    pair = Pair({"mae": SMALL, "vitkd": vitkd}, RandomMasking(mask_rate=0.5, teacher_mask_rate=0.0))
    losses = pair.losses()
    assert losses["loss"].isfinite() and losses["vitkd"].item() > 0


def network(model: nn.Module, name: str, size: tuple[int, int] = (16, 16)) -> Network:
    return describe_network(model, name, "vit", size)


@pytest.mark.parametrize(
    ("objective", "teacher", "words"),
    [
        (DMAE(teacher_blocks=(8,)), {}, "block 8 does not exist"),
        (DMAE(student_blocks=(4,)), {}, "block 4 does not exist"),
        (DMAE(), {"num_classes": 10}, "is a classifier of 10 classes"),
        (DMAE(), {"patch_size": 8}, "2 x 2 patches of 8 x 8 pixels"),
        (DMAE(projection="none"), {}, "the student is 24 wide and the teacher 36"),
        (ViTKD(), {}, "reads every patch of the student"),
    ],
)
def test_networks_that_cannot_be_compared_are_refused(
    objective: Objective, teacher: dict[str, Any], words: str
) -> None:
    teachers = {"teacher": network(vit(1, 36, 8, **teacher), "teacher")}
    with pytest.raises(ConfigError, match=words):
        make_plan(network(vit(0), "student"), teachers, {"it": objective}, masking=RandomMasking())


@pytest.mark.parametrize(
    ("masking", "words"),
    [
        (None, "mae learns from hidden patches, and nothing hides any"),
        (RandomMasking(mask_rate=0.0), "hides none of the student.s 16"),
        (RandomMasking(teacher_mask_rate=0.5), "there is no teacher"),
        (RandomMasking(mask_rate=0.95), "leaves none of 16 patches visible"),
    ],
)
def test_masks_that_teach_nothing_are_refused(masking: RandomMasking | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_plan(network(vit(0), "student"), {}, {"mae": SMALL}, masking=masking)


def test_a_classifier_may_teach_when_it_is_asked_for() -> None:
    teachers = {"teacher": network(vit(1, 36, 8, num_classes=10), "teacher")}
    plan = make_plan(
        network(vit(0), "student"),
        teachers,
        {"dmae": DMAE(any_teacher=True)},
        masking=RandomMasking(),
    )
    assert plan.live["teacher"].num_blocks(8) == 6


POOLED = {"img_size": 32, "patch_size": 8, "global_pool": "avg"}


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("vit_tiny_r_s16_p8_224", {"img_size": 64}, "do not cut its images of 64 x 64"),
        ("vit_tiny_patch16_224", POOLED, "set student.model_args.global_pool=token"),
        (
            "vit_tiny_patch16_224",
            {**POOLED, "class_token": False},
            "set student.model_args.fc_norm=False",
        ),
    ],
)
def test_students_that_a_masked_autoencoder_cannot_be_made_of_are_refused(
    name: str, args: dict[str, Any], words: str
) -> None:
    model = timm.create_model(name, num_classes=0, depth=1, **args)
    size = args["img_size"]
    with pytest.raises(ConfigError, match=words):
        make_plan(
            network(model, "student", (size, size)),
            {},
            {"mae": SMALL},
            masking=RandomMasking(mask_rate=0.5),
        )


def test_without_a_projection_raw_features_are_compared_as_the_authors_do() -> None:
    raw, unit = (
        Pair({"dmae": DMAE(projection="none", normalize=how)}, RandomMasking(), embed_dim=24)
        for how in (None, True)
    )
    assert raw.losses()["dmae"].item() > 2 * unit.losses()["dmae"].item() > 0
    assert "dmae" not in raw.module.adapters


def test_without_a_mask_dmae_alone_may_learn_and_a_student_without_class_token_is_helped() -> None:
    """At a mask rate of 0 nothing is hidden, which `mae` alone cannot use; and what the refusals
    above advise is not refused.
    """
    pair = Pair({"dmae": DMAE()}, RandomMasking(mask_rate=0.0))
    assert pair.plan.student_keep == 16 and pair.losses()["dmae"].item() > 0
    for args in (
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"global_pool": "token"},
    ):
        plan = make_plan(
            network(vit(0, **args), "student"),
            {},
            {"mae": SMALL},
            masking=RandomMasking(mask_rate=0.5),
        )
        assert plan.student_keep == 8
