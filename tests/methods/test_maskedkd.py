"""MaskedKD: which patches are chosen, and where they lie on another grid."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_vits import TEACHER, batch_of, teacher_of, vit
from torch import Tensor

from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.errors import ConfigError
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import (
    MaskedKD,
    RandomPatches,
    TeacherGuided,
    patch_saliency,
    resample_saliency,
    select_patches,
)
from vitdistill.vit.families import describe_network
from vitdistill.vit.needs import Needs
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput
from vitdistill.vit.walk import run_vit


def attention_of(
    seed: int, batch: int = 2, heads: int = 3, prefix: int = 1, patches: int = 16
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, heads, prefix + patches, generator=generator)).softmax(-1)


def output(attention: Tensor, grid: tuple[int, int], prefix: int = 1, depth: int = 12) -> ViTOutput:
    """Of the last block."""
    network = Network(num_prefix_tokens=prefix, depth=depth)
    return ViTOutput(attention={depth - 1: attention}, grid=grid, network=network)


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    heads=st.integers(1, 6),
    prefix=st.integers(0, 5),
    patches=st.integers(1, 40),
    share=st.floats(0, 1),
)
def test_the_most_attended_patches_are_chosen(
    seed: int, batch: int, heads: int, prefix: int, patches: int, share: float
) -> None:
    attention, count = attention_of(seed, batch, heads, prefix, patches), round(share * patches)
    keep = select_patches(attention, count, prefix)
    assert keep.shape == (batch, count) and keep.dtype is torch.int64
    for row, chosen in zip(attention[:, :, prefix:].mean(1).tolist(), keep.tolist(), strict=True):
        assert len(set(chosen)) == count
        assert [row[i] for i in chosen] == sorted(row, reverse=True)[:count]


@given(seed=st.integers(0, 10**6), prefix=st.integers(1, 5))
def test_over_patches_is_a_softmax_over_patches(seed: int, prefix: int) -> None:
    logits = 3 * torch.randn(2, 3, prefix + 9, generator=torch.Generator().manual_seed(seed))
    attention, over_patches = logits.softmax(-1), logits[:, :, prefix:].softmax(-1).mean(1)
    assert torch.allclose(patch_saliency(attention, prefix, "patches"), over_patches, atol=1e-6)
    class_alone = torch.eye(prefix + 9)[0].expand(1, 2, -1)  # no division by zero
    assert patch_saliency(class_alone, prefix, "patches").isfinite().all()


@pytest.mark.parametrize(
    ("grid", "to_grid"),
    [((14, 14), (16, 16)), ((16, 16), (7, 7)), ((6, 10), (9, 5)), ((2, 2), (37, 37))],
)
@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_a_bright_corner_stays_in_its_corner(
    grid: tuple[int, int], to_grid: tuple[int, int], corner: tuple[int, int]
) -> None:
    saliency = torch.zeros(1, *grid)
    saliency[0, corner[0], corner[1]] = 1
    moved = resample_saliency(saliency.flatten(1), grid, to_grid).unflatten(1, to_grid)[0]
    assert moved[corner[0], corner[1]] == moved.max() > 0
    assert moved[-1 - corner[0], -1 - corner[1]] <= 1e-6


# --- the selectors -------------------------------------------------------------------------------


def test_student_guided_on_two_grids_goes_by_position() -> None:
    attention = torch.zeros(1, 2, 1 + 16)
    attention[:, :, 1 + 3] = 1  # top right of 4 x 4
    keep = MaskedKD(num_keep=4).select((8, 8), 4, output(attention, (4, 4)), None, None)
    assert set(keep[0].tolist()) == {6, 7, 14, 15}


@pytest.mark.parametrize("block", [-1, 3, -9])
def test_the_block_counts_from_either_end(block: int) -> None:
    attention = {i: attention_of(i) for i in range(12)}
    network = Network(num_prefix_tokens=1, depth=12)
    student = ViTOutput(attention=attention, grid=(4, 4), network=network)
    keep = MaskedKD(block=block).select((4, 4), 5, student, None, None)
    assert torch.equal(keep, select_patches(attention[block % 12], 5))


def test_teacher_guided_reads_the_teacher_alone() -> None:
    teacher = output(attention_of(1, prefix=2), (4, 4), prefix=2, depth=8)
    student = output(attention_of(2, patches=9), (3, 3))
    keep = TeacherGuided().select((4, 4), 5, student, teacher, None)
    assert torch.equal(keep, select_patches(teacher.attention[7], 5, num_prefix_tokens=2))


@pytest.mark.parametrize("kind", [MaskedKD, RandomPatches, TeacherGuided])
def test_keeping_all_keeps_every_patch_once(kind: Any) -> None:
    seen = output(attention_of(0), (4, 4))
    keep = kind(keep_rate=1.0).select((4, 4), 16, seen, seen, torch.rand(2, 16))
    assert all(sorted(row) == list(range(16)) for row in keep.tolist())


# --- students without attention ------------------------------------------------------------------

CNNS: dict[str, dict[str, Any]] = {
    "resnet10t": {"channels": [8, 8, 16, 16]},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "embed_dim": 12,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "window_size": 4,
    },
    "repvit_m0_9": {"embed_dim": (8, 8, 8, 8), "depth": (1, 1, 1, 1)},
    "mobilenetv4_conv_small_050": {},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2},
}
ENERGY = MaskedKD(saliency="energy", keep_rate=0.5)


@pytest.mark.parametrize("name", CNNS)
def test_energy_of_any_students_features_chooses_the_teachers_patches(name: str) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=5, **CNNS[name])
    student, teacher = (
        describe_network(model, "student", name, (64, 64)),
        teacher_of(vit(), side=16),
    )
    plan = make_plan(student, {"teacher": teacher.network}, {"kd": SoftKD()}, ENERGY)
    images = torch.randn(3, 3, 64, 64)
    output = run_vit(model.eval(), images, plan.student_needs)
    assert torch.allclose(output.logits, model(images), atol=1e-4)
    keep = ENERGY.select((4, 4), 8, output, None, None)
    assert keep.shape == (3, 8) and not keep.requires_grad
    places = output.patches(-1)
    energy = F.interpolate(
        places.vectors.square().mean(-1).unflatten(1, places.grid)[:, None],
        (4, 4),
        mode="bilinear",
        antialias=True,
    ).flatten(1)
    chosen = torch.zeros(3, 16).scatter(1, keep, 1.0).bool()
    assert (energy[chosen].view(3, 8).amin(1) >= energy[~chosen].view(3, 8).amax(1) - 1e-5).all()


def test_a_whole_step_of_a_cnn_teaches_it() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("convnext_atto", num_classes=5, **CNNS["convnext_atto"])
    student, teacher = (
        describe_network(model, "student", "cnn", (64, 64)),
        teacher_of(vit(), side=16),
    )
    plan = make_plan(student, {"teacher": teacher.network}, {"kd": SoftKD()}, ENERGY)
    assert plan.num_keep == {"teacher": 8}
    batch = replace(batch_of(), images=torch.randn(3, 3, 64, 64))
    losses = Distillation(model.train(), plan)(batch, {"teacher": teacher})
    losses["loss"].backward()
    assert losses["loss"].isfinite() and all(p.grad is not None for p in model.parameters())


def test_what_energy_cannot_choose_by_is_refused() -> None:
    with pytest.raises(ConfigError, match="no softmax"):
        MaskedKD(saliency="energy", softmax_over="patches")
    model: Any = timm.create_model("resnet10t", num_classes=5, **CNNS["resnet10t"]).eval()
    output = run_vit(model, torch.randn(1, 3, 32, 32), Needs(hidden=frozenset({-1, -2})))
    with pytest.raises(ConfigError, match="is 1 x 1") as caught:
        ENERGY.select((4, 4), 8, output, None, None)
    assert caught.value.field == "selector.block"
    replace(ENERGY, block=-2).select((4, 4), 8, output, None, None)
    student = describe_network(model, "student", "resnet10t", (64, 64))
    with pytest.raises(ConfigError, match="has none") as caught:
        MaskedKD().check(student, TEACHER)
    assert caught.value.field == "student.model"
