"""Locality guidance: maps of a teacher's stages, predicted from a ViT's patches."""

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from small_vits import batch_of, kept, loss_of, network, outputs, randn, teacher_of, vit
from torch import Tensor, nn

import vitdistill.models.involution  # noqa: F401  (rednet26)
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.errors import ConfigError
from vitdistill.explain.cost import cost_of
from vitdistill.methods.guidance import LocalityGuidance, map_loss, spread
from vitdistill.vit.patches import PatchMap

seeds = st.integers(0, 10**6)
sides = st.integers(1, 5)
NETWORKS = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8},
    "rednet26": {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32], "stem_width": 16},
    "tf_efficientnet_lite0": {},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [4, 8, 12, 16]},
    "swin_tiny_patch4_window7_224": {
        **{"img_size": 32, "window_size": 1, "embed_dim": 12},
        **{"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    },
}


def cnn(name: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **NETWORKS[name]).eval()


def as_map(image: Tensor) -> PatchMap:
    """The vectors of a feature map ``(B, D, rows, columns)``, row by row."""
    vectors = torch.stack([image[:, :, r, c] for r in range(image.shape[2]) for c in range(image.shape[3])], 1)  # fmt: skip
    return PatchMap(vectors, (image.shape[2], image.shape[3]))


# --- the formula ---------------------------------------------------------------------------------


def test_a_map_by_hand() -> None:
    ours, its = torch.full((1, 1, 1, 1), 2.0), torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]])
    assert map_loss(as_map(ours), as_map(its)).item() == (1 + 0 + 1 + 9) / 4


def test_maps_between_grids_by_hand() -> None:
    """Two columns, interpolated to four at centres 1/4 and 3/4 between them."""
    ours, its = torch.tensor([[[[0.0, 4.0]]]]), torch.tensor([[[[0.0, 1.0, 3.0, 5.0]]]])
    assert map_loss(as_map(ours), as_map(its)).item() == 0.25
    assert map_loss(as_map(its), as_map(ours)).item() == 0.25


@given(seed=seeds, ours=st.tuples(sides, sides), its=st.tuples(sides, sides), width=sides)
def test_maps_meet_at_the_larger_of_both_sizes(
    seed: int, ours: tuple[int, int], its: tuple[int, int], width: int
) -> None:
    a, b = randn(seed, 2, width, *ours), randn(seed + 1, 2, width, *its)
    size = [max(pair) for pair in zip(ours, its, strict=True)]
    moved = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in (a, b)]
    expected = (moved[0] - moved[1]).square().mean().item()
    assert map_loss(as_map(a), as_map(b)).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(seed=seeds, scale=st.sampled_from([1e-2, 1.0, 300.0]), shift=st.floats(-3, 3))
def test_normalised_maps_weigh_the_same_at_any_scale(seed: int, scale: float, shift: float) -> None:
    ours, its = randn(seed, 3, 4, 2, 2), randn(seed + 1, 3, 4, 3, 3)
    loss = map_loss(as_map(ours), as_map(its), normalize=True).item()
    moved = as_map(scale * (ours + shift)), as_map(scale * (its + shift))
    assert map_loss(*moved, normalize=True).item() == pytest.approx(loss, rel=0.05)
    each = [
        map_loss(as_map(ours[i : i + 1]), as_map(its[i : i + 1])).item()
        / its[i].var(correction=0).item()
        for i in range(3)
    ]
    assert loss == pytest.approx(sum(each) / 3, rel=1e-3)
    assert map_loss(as_map(ours), as_map(0 * its), normalize=True).isfinite()


@pytest.mark.parametrize("stages", [(), (0, 2), (4,), (1, 1, 3, 4)])
def test_the_loss_is_a_sum_over_pairs_of_a_convolution_and_a_stage(stages: tuple[int, ...]) -> None:
    objective, student, teacher = LocalityGuidance(stages=stages), vit(), cnn()
    adapter = objective.adapter(network(student, "student"), network(teacher))
    assert isinstance(adapter, nn.ModuleList)
    of_student, of_teacher = outputs(objective, student, teacher)
    images, expected = batch_of().images, 0.0
    pairs = list(zip(objective.guided(network(student)), stages or (0, 2, 4), strict=True))
    for (block, stage), linear in zip(pairs, adapter, strict=True):
        tokens = of_student.hidden[block][:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        ours = F.conv2d(tokens, linear.weight[:, :, None, None], linear.bias)
        its = teacher.forward_intermediates(images, indices=[stage], intermediates_only=True)[0]
        size = [max(a, b) for a, b in zip(ours.shape[2:], its.shape[2:], strict=True)]
        ours, its = (F.interpolate(x, size, mode="bilinear") for x in (ours, its))
        expected += (ours - its).square().mean().item()
    loss = objective.loss(of_student, of_teacher, batch_of(), adapter).item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_pairs_are_spread_from_the_first_to_the_last() -> None:
    assert spread(3, 12) == (0, 6, 11), "the published blocks of DeiT-Ti"
    assert spread(3, 3) == (0, 1, 2), "the three stages of a ResNet-56"
    for depth in range(2, 30):
        for count in range(2, depth + 1):
            found = spread(count, depth)
            assert found[0] == 0 and found[-1] == depth - 1 and len({*found}) == count


def test_blocks_and_stages_are_as_many() -> None:
    with pytest.raises(ConfigError) as caught:
        LocalityGuidance(blocks=(0, 1), stages=(0,))
    assert caught.value.field == "stages"
    student, networks = network(vit(), "student"), {"teacher": network(cnn())}
    with pytest.raises(ConfigError, match="block 5 does not exist"):
        make_plan(student, networks, {"it": LocalityGuidance(stages=(5,))})


# --- between networks ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_any_teacher_with_stages_guides_without_labels(name: str) -> None:
    student, teacher = vit(), teacher_of(cnn(name), side=32)
    plan = make_plan(
        network(student, "student"), {"teacher": teacher.network}, {"it": LocalityGuidance()}
    )
    module = Distillation(student, plan)
    batch = batch_of()
    batch.labels = batch.labels * 0 - 1
    module(batch, {"teacher": teacher})["loss"].backward()
    for block in student.blocks:
        assert block.mlp.fc2.weight.grad.abs().sum() > 0
    assert student.head.weight.grad is None
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(p.grad.isfinite().all() for p in module.adapters.parameters())


def test_a_teacher_stops_after_its_last_stage() -> None:
    student, teacher = vit(), cnn()
    with torch.no_grad():
        for part in (teacher.fc, teacher.layer3, teacher.layer4):
            for parameter in part.parameters():
                parameter.fill_(torch.nan)
    assert loss_of(LocalityGuidance(stages=(0, 1, 2)), student, teacher).isfinite()
    assert loss_of(LocalityGuidance(stages=(0, 1, 3)), student, teacher).isnan()

    def flops(stages: tuple[int, ...]) -> float:
        taught = teacher_of(teacher, side=32)
        objectives = {"it": LocalityGuidance(stages=stages)}
        plan = make_plan(network(student, "student"), {"teacher": taught.network}, objectives)
        return cost_of(plan, student, {"teacher": teacher}, 1).teachers["teacher"]

    assert 0 < flops((0,)) < flops((0, 1)) < flops((4,))


def test_a_teacher_that_sees_some_of_its_patches_is_compared_at_these() -> None:
    student, teacher, keep = vit(), vit(1), kept(5)
    objective = LocalityGuidance(blocks=(2,), stages=(2,))
    adapter = objective.adapter(network(student, "student"), network(teacher))
    assert adapter is not None
    ours, its = outputs(objective, student, teacher, keep)
    projected = adapter[0](ours.hidden[2][:, 1:])  # type: ignore[index]
    expected = torch.stack([projected[i, keep[i]] for i in range(3)]) - its.hidden[2][:, 1:]
    loss = objective.loss(ours, its, batch_of(), adapter)
    assert loss.item() == pytest.approx(expected.square().mean().item(), rel=1e-5)
