"""ViTKD: its two terms written out by hand, on any grid and any kept patches, and end to end
between unequal networks.
"""

import inspect
import itertools
from typing import Any, Literal

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vits import batch_of, randn, vit
from torch import Tensor, nn

from vitdistill.data.augment import InputSpec
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.distill.teacher import Teacher
from vitdistill.methods.base import TokenSelector
from vitdistill.methods.maskedkd import MaskedKD, RandomPatches
from vitdistill.methods.vitkd import ViTKD, ViTKDAdapter, mimicking_loss, vitkd_loss
from vitdistill.vit.families import describe_network
from vitdistill.vit.needs import Needs
from vitdistill.vit.patches import resample_patches
from vitdistill.vit.walk import run_vit

Reduction = Literal["sum", "mean"]


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
    batch, ours, its, blocks = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
    )
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


def linear(vector: list[float], layer: nn.Linear) -> list[float]:
    return [
        sum(w * x for w, x in zip(row, vector, strict=True)) + b
        for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def convolution(image: list[list[list[float]]], layer: nn.Conv2d) -> list[list[list[float]]]:
    """A 3 x 3 convolution of ``image[row][column][channel]``, zeros around it."""
    rows, columns = len(image), len(image[0])
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    result = [[list(bias) for _ in range(columns)] for _ in range(rows)]
    for r, c, down, right in itertools.product(range(rows), range(columns), range(3), range(3)):
        y, x = r + down - 1, c + right - 1
        if 0 <= y < rows and 0 <= x < columns:
            for o, i in itertools.product(range(len(weight)), range(len(weight[0]))):
                result[r][c][o] += weight[o][i][down][right] * image[y][x][i]
    return result


def by_hand(case: dict[str, Any]) -> tuple[float, float]:
    """The two terms without their weights, patch by patch and channel by channel."""
    adapter: ViTKDAdapter = case["adapter"]
    (rows, columns), rate, mean = case["grid"], case["mask_rate"], case["reduction"] == "mean"
    batch, blocks, seen, width = case["teacher_low"].shape
    count, narrow = case["student_high"].shape[1:]
    aligned = narrow != width
    keep = torch.arange(count).expand(batch, -1) if case["keep"] is None else case["keep"]
    low = high = 0.0
    for b in range(batch):
        for block, (k, patch) in itertools.product(range(blocks), enumerate(keep[b].tolist())):
            mine = case["student_low"][b, block, patch].tolist()
            mine = linear(mine, adapter.align_low[block]) if aligned else mine
            low += sum(
                (s - t) ** 2
                for s, t in zip(mine, case["teacher_low"][b, block, k].tolist(), strict=True)
            )
        features = [
            linear(v, adapter.align_high) if aligned else v
            for v in case["student_high"][b].tolist()
        ]
        visible = sorted(range(count), key=lambda patch: case["noise"][b, patch].item())[
            : int(count * (1 - rate))
        ]
        hidden = set(range(count)) - set(visible) if rate > 0 else set()
        token = adapter.mask_token.flatten().tolist()
        features = [token if patch in hidden else v for patch, v in enumerate(features)]
        image = convolution(
            [features[r * columns : (r + 1) * columns] for r in range(rows)], adapter.generation[0]
        )
        image = [[[max(x, 0.0) for x in v] for v in row] for row in image]
        generated = [v for row in convolution(image, adapter.generation[2]) for v in row]
        for k, patch in enumerate(keep[b].tolist()):
            if patch in hidden or rate == 0:
                high += sum(
                    (g - t) ** 2
                    for g, t in zip(
                        generated[patch], case["teacher_high"][b, k].tolist(), strict=True
                    )
                )
    masked = count if rate == 0 else count - int(count * (1 - rate))
    whole = count / seen / batch
    if mean:
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
    adapter = adapter_of(2, 4, 768, masks=True)
    adapter.generation = nn.Sequential(
        nn.Identity()
    )  # what is generated does not matter here, and 768 channels take long
    adapter.generation.forward = lambda image: image
    losses = {}
    for reduction in ("sum", "mean"):
        objective = ViTKD(reduction=reduction)
        low, high = objective._weights
        noise = torch.rand(1, 196, generator=torch.Generator().manual_seed(3))
        losses[reduction] = vitkd_loss(
            adapter,
            student,
            student[:, 0],
            teacher,
            teacher[:, 0],
            low_weight=low,
            high_weight=high,
            noise=noise,
            reduction=reduction,
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


# --- precision, gradients ------------------------------------------------------------------------


@torch.no_grad()
def test_half_precision_is_summed_in_float32() -> None:
    """About 1e5 from 1e5 squares: a sum in bfloat16 would stop at a few hundred."""
    ours, its = (3 * randn(seed, 1, 2, 64, 8).bfloat16() for seed in (0, 1))
    adapter = adapter_of(2, 8, 8).bfloat16()
    noise = torch.rand(1, 64, generator=torch.Generator().manual_seed(1))
    args: dict[str, Any] = {"low_weight": 1.0, "high_weight": 1.0, "noise": noise}
    low, high = vitkd_loss(adapter, ours, ours[:, 0], 10 * its, 10 * its[:, 0], **args)
    assert low.dtype is high.dtype is torch.float32
    exact = (ours.double() - (10 * its).double()).square().sum()
    assert exact > 1e5 and low.item() == pytest.approx(exact.item(), rel=1e-5)
    exact = _exact_generation(
        adapter.double(), ours[:, 0].double(), (10 * its[:, 0]).double(), noise
    )
    assert exact > 1e5 and high.item() == pytest.approx(exact.item(), rel=1e-2)


def _exact_generation(
    adapter: ViTKDAdapter, student: Tensor, teacher: Tensor, noise: Tensor
) -> Tensor:
    mask = noise.argsort(1).argsort(1) >= 32
    error = (adapter.generate(student, mask, (8, 8)) - teacher).square()
    return error[mask].sum() / 0.5


@torch.no_grad()
def test_sums_do_not_overflow_float16() -> None:
    ours = torch.full((1, 2, 16, 8), 200.0, dtype=torch.float16)
    total = mimicking_loss(ViTKDAdapter(8, 8), ours.unbind(1), (-ours).unbind(1))
    assert total.item() == 400.0**2 * ours.numel()


def parts(adapter: nn.Module) -> set[str]:
    return {key.rpartition(".")[0] or key for key in adapter.state_dict()}


PROJECTIONS = {"align_low.0", "align_low.1", "align_high"}
GENERATOR = {"mask_token", "generation.0", "generation.2"}


@pytest.mark.parametrize(
    ("adapter", "owned"),
    [
        (ViTKDAdapter(3, 4), PROJECTIONS | GENERATOR),
        (ViTKDAdapter(4, 4), GENERATOR),
        (ViTKDAdapter(3, 4, masks=False), (PROJECTIONS | GENERATOR) - {"mask_token"}),
        (ViTKDAdapter(3, 4, generates=False), {"align_low.0", "align_low.1"}),
        (ViTKDAdapter(3, 4, []), {"align_high"} | GENERATOR),
        (
            ViTKDAdapter(4, 4, [(4, 4), (3, 4), (4, 2)], generates=False),
            {"align_low.1", "align_low.2"},
        ),
    ],
)
def test_an_adapter_has_the_parts_it_needs_and_no_others(
    adapter: ViTKDAdapter, owned: set[str]
) -> None:
    assert parts(adapter) == owned
    assert "mask_token" not in owned or not torch.any(adapter.mask_token)


@pytest.mark.parametrize(
    ("ours", "its", "millions"), [(192, 384, 2.88), (384, 768, 11.5), (768, 768, 10.6)]
)
def test_an_adapter_is_as_large_as_the_authors(ours: int, its: int, millions: float) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ViTKDAdapter(ours, its).parameters()) / 1e6 == pytest.approx(
            millions, rel=5e-3
        )


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

MEAN = STD = (0.5, 0.5, 0.5)

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "wider, deeper": ("vit_tiny_patch16_224", {"embed_dim": 36, "depth": 5, "num_heads": 3}),
    "two prefix tokens, coarser": ("deit_tiny_distilled_patch16_224", {"patch_size": 8}),
    "registers, finer": (
        "vit_tiny_patch16_224",
        {"patch_size": 2, "reg_tokens": 3, "embed_dim": 32},
    ),
    "oblong patches": (
        "vit_tiny_patch16_224",
        {"patch_size": (4, 2), "class_token": False, "global_pool": "avg"},
    ),
    "resnet": ("resnet10t", {"channels": [8, 8, 16, 16]}),
    "wider resnet": ("resnet18", {"channels": [8, 16, 24, 32]}),
}


def network(form: str, seed: int = 0) -> nn.Module:
    name, args = NETWORKS[form]
    if "resnet" not in name:
        return vit(seed, name, std=0.2, **args)
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=5, **args).eval()


class Pair:
    """Two networks, ViTKD between them, and what it takes to run a step."""

    def __init__(
        self,
        student: str,
        teacher: str,
        objective: ViTKD | None = None,
        selector: TokenSelector | None = None,
    ) -> None:
        self.objective = objective or ViTKD()
        self.student, self.model = network(student), network(teacher, 1)
        spec = InputSpec((16, 16), MEAN, STD)
        self.teacher = Teacher(
            self.model, describe_network(self.model, "teacher", teacher, (16, 16)), spec, spec
        )
        described = describe_network(self.student, "student", student, (16, 16))
        self.plan = make_plan(
            described, {"teacher": self.teacher.network}, {"vitkd": self.objective}, selector
        )
        self.module = Distillation(self.student, self.plan)
        self.batch = batch_of()

    @property
    def adapter(self) -> ViTKDAdapter:
        adapter = self.module.adapters["vitkd"]
        assert isinstance(adapter, ViTKDAdapter)
        return adapter

    def loss(self) -> Tensor:
        return self.module(self.batch, {"teacher": self.teacher})["vitkd"]


def tokens_of(
    model: nn.Module, images: Tensor, block: int | None
) -> tuple[Tensor, tuple[int, int]]:
    """timm's own patches after a block, or its last features, and their grid."""
    stages = [0 if block is None else block]
    if hasattr(model, "blocks"):
        grid = model.patch_embed.grid_size
        if block is None:
            return model.forward_features(images)[:, model.num_prefix_tokens :], grid
        return (
            model.forward_intermediates(
                images, indices=stages, norm=False, intermediates_only=True, output_fmt="NLC"
            )[0],
            grid,
        )
    image = (
        model.forward_features(images)
        if block is None
        else model.forward_intermediates(images, stages, intermediates_only=True)[0]
    )
    return image.flatten(2).transpose(1, 2), tuple(image.shape[2:])


VITS = [form for form in NETWORKS if "resnet" not in form]


@pytest.mark.parametrize("student", NETWORKS)
@pytest.mark.parametrize("teacher", NETWORKS)
@torch.no_grad()
def test_a_step_between_unequal_networks_by_hand(student: str, teacher: str) -> None:
    """From timm's own features: resampled by position, projected, compared; any prefix tokens,
    depths, widths and grids.
    """
    objective = ViTKD(
        low_blocks=(0, 2),
        teacher_low_blocks=(1, -1),
        reduction="mean",
        low_weight=2.0,
        high_weight=3.0,
    )
    pair = Pair(student, teacher, objective)
    images, expected = pair.batch.images, torch.zeros(())
    for i, (ours, its) in enumerate(((0, 1), (2, pair.plan.teachers["teacher"].depth - 1))):
        (mine, grid), (target, to) = (
            tokens_of(pair.student, images, ours),
            tokens_of(pair.model, images, its),
        )
        expected = (
            expected
            + 2 * F.mse_loss(pair.adapter.low(i, resample_patches(mine, grid, to)), target) / 2
        )
    (mine, grid), (target, to) = (
        tokens_of(pair.student, images, None),
        tokens_of(pair.model, images, None),
    )
    count = to[0] * to[1]
    mask = pair.batch.uniforms(count).argsort(1).argsort(1) >= count // 2
    generated = pair.adapter.generate(resample_patches(mine, grid, to), mask, to)
    expected = expected + 3 * (generated - target)[mask].square().mean()
    assert pair.loss().item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("teacher", NETWORKS)
@torch.no_grad()
def test_a_whole_teachers_sum_is_the_sum(teacher: str) -> None:
    """Also over stages of unequal grids: the factor N / K is for patches that were not seen."""
    pair = Pair("plain", teacher, ViTKD(low_weight=1.0, high_weight=0.0))
    total = torch.zeros(())
    for block in (0, 1):
        (mine, grid), (target, to) = (
            tokens_of(pair.student, pair.batch.images, block),
            tokens_of(pair.model, pair.batch.images, block),
        )
        total = total + (
            pair.adapter.low(block, resample_patches(mine, grid, to)) - target
        ).square().sum() / len(target)
    assert pair.loss().item() == pytest.approx(total.item(), rel=1e-4)


@pytest.mark.parametrize("student", NETWORKS)
@pytest.mark.parametrize("teacher", VITS)
def test_a_step_on_kept_patches(student: str, teacher: str) -> None:
    """Every configuration runs, and its gradient reaches the student and every parameter of the
    adapter.
    """
    pair = Pair(student, teacher, selector=RandomPatches(keep_rate=0.5))
    assert pair.plan.num_keep["teacher"] == pair.teacher.network.num_patches // 2
    pair.loss().backward()
    for name, parameter in pair.adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in pair.student.parameters())
    assert all(p.grad is None for p in pair.model.parameters())
    everything = Pair(student, teacher, selector=RandomPatches(keep_rate=1.0))
    whole = Pair(student, teacher)
    everything.module.adapters = whole.module.adapters
    assert everything.loss().item() == pytest.approx(whole.loss().item(), rel=1e-4)


@torch.no_grad()
def test_the_patches_the_student_attends_to_are_compared() -> None:
    pair = Pair(
        "plain", "wider, deeper", ViTKD(high_weight=0.0, low_weight=1.0), MaskedKD(keep_rate=0.25)
    )
    output = run_vit(pair.student, pair.batch.images, Needs(attention=frozenset({-1})))
    keep = output.attention[2][:, :, 1:].mean(1).topk(4).indices
    answer = pair.teacher(pair.batch.images, Needs(hidden=frozenset({0, 1})), keep)
    total = torch.zeros(())
    for block in (0, 1):
        mine, _ = tokens_of(pair.student, pair.batch.images, block)
        mine = torch.stack([mine[i, keep[i]] for i in range(3)])
        total = total + (
            pair.adapter.low(block, mine) - answer.hidden[block][:, 1:]
        ).square().sum() / 3 * (16 / 4)
    assert pair.loss().item() == pytest.approx(total.item(), rel=1e-4)


def test_masks_depend_on_the_sample_and_its_view_alone() -> None:
    pair = Pair("plain", "plain", ViTKD(low_weight=0.0, high_weight=1.0, mask_rate=0.75))
    first, again = pair.loss(), pair.loss()
    pair.batch.views = pair.batch.views + 1
    assert torch.equal(first, again) and not torch.equal(pair.loss(), first)


# Settings, what both networks record, and the parts of the adapter between unequal widths.
TERMS: dict[str, tuple[dict[str, Any], Needs, set[str]]] = {
    "both": (
        {},
        Needs(hidden=frozenset({0, 1}), features=True),
        {"align_low.0", "align_low.1", "align_high", "mask_token", "generation.0", "generation.2"},
    ),
    "no low weight": (
        {"low_weight": 0.0},
        Needs(features=True),
        {"align_high", "mask_token", "generation.0", "generation.2"},
    ),
    "no low blocks": (
        {"low_blocks": ()},
        Needs(features=True),
        {"align_high", "mask_token", "generation.0", "generation.2"},
    ),
    "no high weight": (
        {"high_weight": 0.0},
        Needs(hidden=frozenset({0, 1})),
        {"align_low.0", "align_low.1"},
    ),
    "no mask": (
        {"mask_rate": 0.0, "low_blocks": (2,)},
        Needs(hidden=frozenset({2}), features=True),
        {"align_low.0", "align_high", "generation.0", "generation.2"},
    ),
}


@pytest.mark.parametrize("case", TERMS)
def test_a_term_that_is_left_out_reads_and_owns_nothing(case: str) -> None:
    settings, needs, owned = TERMS[case]
    for reduction in ("sum", "mean"):
        pair = Pair("plain", "wider, deeper", ViTKD(**settings, reduction=reduction))
        assert pair.plan.student_needs == pair.plan.live["teacher"] == needs
        assert parts(pair.adapter) == owned
        pair.loss().backward()
        assert all(p.grad is not None for p in pair.adapter.parameters())
