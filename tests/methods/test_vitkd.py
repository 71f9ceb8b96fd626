"""ViTKD: its two terms written out by hand, on any grid and any kept patches, and end to end
between unequal networks.
"""

import inspect
import itertools
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vits import DISTILLED, NO_CLASS, batch_of, kept, network, outputs, randn, vit
from torch import Tensor, nn

from vitdistill.methods.vitkd import ViTKD, ViTKDAdapter, mimicking_loss, vitkd_loss
from vitdistill.vit.needs import Needs
from vitdistill.vit.patches import gather_patches, resample_patches


def adapter_of(
    seed: int,
    student: int,
    teacher: int,
    low_dims: list[tuple[int, int]] | None = None,
    **args: bool,
) -> ViTKDAdapter:
    """With random parameters, the mask token included."""
    adapter = ViTKDAdapter(student, teacher, low_dims, **args)
    with torch.no_grad():
        for i, parameter in enumerate(adapter.parameters()):
            parameter.copy_(0.5 * randn(seed + i, *parameter.shape))
    return adapter


# --- the formula ---------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Features of student and teacher on one grid, at some of its patches, and an adapter between
    their widths.
    """
    grid = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    batch, ours, its, blocks = (draw(st.integers(1, most)) for most in (3, 4, 4, 3))
    seed, count = draw(st.integers(0, 10**6)), grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)
    keep, seen = None, count
    if draw(st.booleans()):
        seen = draw(st.integers(1, count))
        keep = torch.stack(
            [torch.randperm(count, generator=generator)[:seen] for _ in range(batch)]
        )
    return {
        "adapter": adapter_of(seed, ours, its, [(ours, its)] * blocks),
        "student_low": randn(seed + 100, batch, blocks, count, ours),
        "student_high": randn(seed + 101, batch, count, ours),
        "teacher_low": randn(seed + 102, batch, blocks, seen, its),
        "teacher_high": randn(seed + 103, batch, seen, its),
        # Also with ties, of which the first patch is the visible one.
        "noise": torch.rand(batch, count, generator=generator).round(
            decimals=draw(st.sampled_from([1, 6]))
        ),
        "grid": grid,
        "keep": keep,
        "mask_rate": draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.99])),
        "reduction": draw(st.sampled_from(["sum", "mean"])),
    }


def by_hand(case: dict[str, Any]) -> tuple[float, float]:
    """The two terms without their weights, image by image and patch by patch."""
    adapter: ViTKDAdapter = case["adapter"]
    grid, rate = case["grid"], case["mask_rate"]
    batch, blocks, seen, width = case["teacher_low"].shape
    count, narrow = case["student_high"].shape[1:]
    unequal = narrow != width
    keep = torch.arange(count).expand(batch, -1) if case["keep"] is None else case["keep"]
    low = high = 0.0
    for b in range(batch):
        order = sorted(range(count), key=lambda patch: case["noise"][b, patch].item())
        hidden = order[int(count * (1 - rate)) :] if rate > 0 else []
        features = case["student_high"][b]
        features = adapter.align_high(features) if unequal else features.clone()
        features[hidden] = adapter.mask_token[0, 0]
        image = adapter.generation(features.T.reshape(1, width, *grid))
        generated = image[0].flatten(1).T
        for k, patch in enumerate(keep[b].tolist()):
            for block in range(blocks):
                mine = case["student_low"][b, block, patch]
                mine = adapter.align_low[block](mine) if unequal else mine
                low += (mine - case["teacher_low"][b, block, k]).square().sum().item()
            if patch in hidden or rate == 0:
                high += (generated[patch] - case["teacher_high"][b, k]).square().sum().item()
    masked = count if rate == 0 else count - int(count * (1 - rate))
    whole = count / seen / batch
    if case["reduction"] == "mean":
        return low / (batch * blocks * seen * width), high * whole / (masked * width)
    return low * whole, high * whole / (rate or 1.0)


@settings(max_examples=40)
@given(case=cases())
@torch.no_grad()
def test_the_formula_by_hand(case: dict[str, Any]) -> None:
    low, high = vitkd_loss(**case, low_weight=0.5, high_weight=2.0)
    by_low, by_high = by_hand(case)
    assert low.dtype is high.dtype is torch.float32
    assert low.item() == pytest.approx(0.5 * by_low, rel=1e-4, abs=1e-5)
    assert high.item() == pytest.approx(2 * by_high, rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_mean_weights_are_worth_the_published_ones_at_224() -> None:
    """A teacher 768 wide with 196 patches; both losses of one pair of features, to 0.5 %."""
    student, teacher = randn(0, 1, 2, 196, 4), randn(1, 1, 2, 196, 768)
    adapter = adapter_of(2, 4, 768)
    adapter.generation = nn.Identity()  # what is generated does not matter, and takes long
    losses = {}
    for reduction in ("sum", "mean"):
        low, high = ViTKD(reduction=reduction)._weights
        noise = torch.rand(1, 196, generator=torch.Generator().manual_seed(3))
        features = student, student[:, 0], teacher, teacher[:, 0]
        weights: Any = {"low_weight": low, "high_weight": high}
        losses[reduction] = vitkd_loss(
            adapter, *features, **weights, noise=noise, reduction=reduction
        )
    for published, mean in zip(losses["sum"], losses["mean"], strict=True):
        assert published > 0 and mean.item() == pytest.approx(published.item(), rel=5e-3)


# --- masking -------------------------------------------------------------------------------------


@given(case=cases())
@torch.no_grad()
def test_what_is_masked_cannot_be_read(case: dict[str, Any]) -> None:
    """Not through the convolutions either: the student's vectors at masked patches are gone, NaN
    and all.
    """
    case["mask_rate"] = 0.5
    count = case["student_high"].shape[1]
    hidden = case["noise"].argsort(1).argsort(1) >= int(count * 0.5)
    poisoned = case["student_high"].masked_fill(hidden[:, :, None], torch.nan)
    assert torch.equal(vitkd_loss(**{**case, "student_high": poisoned})[1], vitkd_loss(**case)[1])


@given(case=cases())
def test_without_masking_no_number_is_drawn_and_nothing_is_divided_by_zero(
    case: dict[str, Any],
) -> None:
    case["mask_rate"] = 0.0
    student = case["student_high"].requires_grad_()
    high = vitkd_loss(**{**case, "noise": None})[1]
    assert torch.equal(vitkd_loss(**case)[1], high)
    assert torch.autograd.grad(high, student)[0].isfinite().all()


@torch.no_grad()
def test_sums_do_not_overflow_float16() -> None:
    ours = torch.full((1, 2, 16, 8), 200.0, dtype=torch.float16)
    total = mimicking_loss(ViTKDAdapter(8, 8), ours.unbind(1), (-ours).unbind(1))
    assert total.item() == 400.0**2 * ours.numel()


def parts(adapter: nn.Module) -> set[str]:
    return {key.rpartition(".")[0] or key for key in adapter.state_dict()}


PROJECTIONS = {"align_low.0", "align_low.1", "align_high"}
GENERATOR = {"mask_token", "generation.0", "generation.2"}


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"student_high": torch.zeros(1, 5, 2)},
        {"grid": (3, 2)},
        {"mask_rate": 1.0},
        {"mask_rate": -0.5},
        {"teacher_high": torch.zeros(1, 3, 2)},
        {"teacher_low": torch.zeros(1, 2, 1, 2)},
        {"student_low": torch.zeros(1, 2, 9, 2)},
        {"keep": torch.tensor([[0, 1]])},
    ],
)
def test_shapes_that_would_broadcast_are_refused(changed: dict[str, Any]) -> None:
    names = ("student_low", "student_high", "teacher_low", "teacher_high")
    fitting: dict[str, Any] = dict(
        zip(names, 2 * (torch.zeros(1, 2, 4, 2), torch.zeros(1, 4, 2)), strict=True)
    )
    unchecked = inspect.unwrap(vitkd_loss)  # as a user has it, without these tests' type checks
    unchecked(ViTKDAdapter(2, 2), **fitting)
    with pytest.raises(ValueError):
        unchecked(ViTKDAdapter(2, 2), **{**fitting, **changed})


# --- as an objective -----------------------------------------------------------------------------

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "wider, deeper": ("vit_tiny_patch16_224", {"embed_dim": 36, "depth": 5, "num_heads": 3}),
    "two prefix tokens, coarser": (DISTILLED, {"patch_size": 8}),
    "registers, finer": ("vit_tiny_patch16_224", {"patch_size": 2, "reg_tokens": 3}),
    "oblong patches": ("vit_tiny_patch16_224", {"patch_size": (4, 2), **NO_CLASS}),
    "resnet": ("resnet10t", {"channels": [8, 8, 16, 16]}),
}
PAIRS = [
    *itertools.product(["wider, deeper", "resnet"], NETWORKS),
    ("registers, finer", "oblong patches"),
    ("two prefix tokens, coarser", "plain"),
]


def make(form: str, seed: int) -> nn.Module:
    name, args = NETWORKS[form]
    if form != "resnet":
        return vit(seed, name, std=0.2, **args)
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=5, **args).eval()


def loss_and_adapter(
    objective: ViTKD, student: nn.Module, teacher: nn.Module, keep: Tensor | None = None
) -> tuple[Tensor, ViTKDAdapter]:
    adapter = objective.adapter(network(student, "student"), network(teacher))
    assert isinstance(adapter, ViTKDAdapter)
    both = outputs(objective, student, teacher, keep)
    return objective.loss(*both, batch_of(), adapter), adapter


def tokens_of(model: nn.Module, block: int | None) -> tuple[Tensor, tuple[int, int]]:
    """timm's own patches after a block, or its last features, and their grid."""
    images = batch_of().images
    if block is None:
        found = model.forward_features(images)
    else:
        args: Any = {"norm": False, "output_fmt": "NLC"} if hasattr(model, "blocks") else {}
        (found,) = model.forward_intermediates(images, [block], intermediates_only=True, **args)
    if found.ndim == 4:
        return found.flatten(2).transpose(1, 2), (found.shape[2], found.shape[3])
    prefix = model.num_prefix_tokens if block is None else 0
    return found[:, prefix:], model.patch_embed.grid_size


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@torch.no_grad()
def test_a_step_between_unequal_networks_by_hand(student: str, teacher: str) -> None:
    """From timm's own features: resampled by position, projected, compared."""
    objective = ViTKD(
        low_blocks=(0, 2),
        teacher_low_blocks=(1, -1),
        reduction="mean",
        low_weight=2.0,
        high_weight=3.0,
    )
    models = make(student, 0), make(teacher, 1)
    loss, adapter = loss_and_adapter(objective, *models)
    expected = torch.zeros(())
    for i, (ours, its) in enumerate(((0, 1), (2, network(models[1]).depth - 1))):
        (mine, grid), (target, to) = tokens_of(models[0], ours), tokens_of(models[1], its)
        moved = adapter.low(i, resample_patches(mine, grid, to))
        expected = expected + 2 * F.mse_loss(moved, target) / 2
    (mine, grid), (target, to) = tokens_of(models[0], None), tokens_of(models[1], None)
    count = to[0] * to[1]
    mask = batch_of().uniforms(count).argsort(1).argsort(1) >= count // 2
    generated = adapter.generate(resample_patches(mine, grid, to), mask, to)
    expected = expected + 3 * (generated - target)[mask].square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("count", [None, 4])
@pytest.mark.parametrize("teacher", ["wider, deeper", "resnet"])
@torch.no_grad()
def test_a_sum_is_over_the_patches_seen_times_their_share(teacher: str, count: int | None) -> None:
    """And whole over stages of unequal grids: the factor N / K is for patches that were not seen."""
    if teacher == "resnet" and count is not None:
        return
    models = make("plain", 0), make(teacher, 1)
    keep = None if count is None else kept(count)
    loss, adapter = loss_and_adapter(ViTKD(low_weight=1.0, high_weight=0.0), *models, keep)
    _, answer = outputs(ViTKD(high_weight=0.0), *models, keep)
    total = torch.zeros(())
    for block in (0, 1):
        (mine, grid), places = tokens_of(models[0], block), answer.patches(block)
        moved = gather_patches(resample_patches(mine, grid, places.grid), keep)
        total = total + (adapter.low(block, moved) - places.vectors).square().sum() / 3
    assert loss.item() == pytest.approx((total * (1 if count is None else 16 / count)).item())


# Settings, what both networks record, and the parts of the adapter between unequal widths.
HIGH = GENERATOR | {"align_high"}
TERMS: list[tuple[dict[str, Any], Needs, set[str]]] = [
    ({}, Needs(hidden=frozenset({0, 1}), features=True), PROJECTIONS | GENERATOR),
    ({"low_weight": 0.0}, Needs(features=True), HIGH),
    ({"low_blocks": ()}, Needs(features=True), HIGH),
    ({"high_weight": 0.0}, Needs(hidden=frozenset({0, 1})), {"align_low.0", "align_low.1"}),
    (
        {"mask_rate": 0.0, "low_blocks": (2,)},
        Needs(hidden=frozenset({2}), features=True),
        HIGH - {"mask_token"} | {"align_low.0"},
    ),
]


@pytest.mark.parametrize(("settings", "needs", "owned"), TERMS)
def test_a_term_that_is_left_out_reads_and_owns_nothing(
    settings: dict[str, Any], needs: Needs, owned: set[str]
) -> None:
    models = make("plain", 0), make("wider, deeper", 1)
    for reduction in ("sum", "mean"):
        objective = ViTKD(**settings, reduction=reduction)
        assert objective.student_needs(network(models[0])) == needs
        assert objective.teacher_needs(network(models[1])) == needs
        loss, adapter = loss_and_adapter(objective, *models)
        assert parts(adapter) == owned
        loss.backward()
        assert all(p.grad is not None for p in adapter.parameters())
