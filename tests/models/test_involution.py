"""Involution and RedNet: the authors' numbers, and what must hold for any shape, stride and
precision.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import ConfigError
from vitdistill.models import involution_op
from vitdistill.models.involution import (
    Involution,
    RedNet,
    checkpoint_filter_fn,
    involution,
    rednet,
)
from vitdistill.vit.flops import forward_flops, training_flops
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit
from vitdistill.weights.create import create_model
from vitdistill.weights.export import export_timm

with np.load(Path(__file__).parents[1] / "golden" / "involution.npz") as data:
    DATA = {key: torch.from_numpy(data[key]) for key in data.files}

seeds = st.integers(0, 10**6)
counts = st.integers(1, 3)
sides = st.integers(1, 9)


def naive(x: Tensor, kernel: Tensor, kernel_size: int, stride: int) -> Tensor:
    """The definition with every neighbourhood copied out."""
    batch, channels = x.shape[:2]
    groups, places = kernel.shape[1] // kernel_size**2, kernel.shape[2:]
    unfolded = F.unfold(x, kernel_size, padding=kernel_size // 2, stride=stride)
    unfolded = unfolded.view(batch, groups, channels // groups, kernel_size**2, *places)
    return (
        (kernel.view(batch, groups, 1, kernel_size**2, *places) * unfolded)
        .sum(3)
        .view(batch, channels, *places)
    )


def example(
    seed: int,
    shape: tuple[int, int, int, int],
    groups: int,
    kernel_size: int,
    stride: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    places = (-(-shape[2] // stride), -(-shape[3] // stride))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    kernel = torch.randn(
        shape[0], groups * kernel_size**2, *places, generator=generator, dtype=torch.float64
    ).to(dtype)
    return x.requires_grad_(), kernel.requires_grad_()


# --- the authors' numbers ------------------------------------------------------------------------


def test_the_authors_outputs_and_gradients() -> None:
    module = Involution(16, 7).double()
    module.load_state_dict(
        {key.removeprefix("w."): value for key, value in DATA.items() if key.startswith("w.")}
    )
    module.eval()
    x = DATA["eval.x"].clone().requires_grad_()
    y = module(x)
    y.backward(DATA["eval.gout"])
    torch.testing.assert_close(y, DATA["eval.y"], rtol=0, atol=1e-9)
    torch.testing.assert_close(x.grad, DATA["eval.gx"], rtol=0, atol=1e-9)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, DATA[f"eval.grad.{name}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("depth", "millions"),
    [(26, 9.233), (50, 15.541), pytest.param(152, 33.985, marks=pytest.mark.whole)],
)
def test_the_authors_parameter_counts_and_flops(depth: int, millions: float) -> None:
    with torch.device("meta"):
        model = rednet(depth, 1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions
    # Multiply-accumulates of the authors' code at 224 x 224, in units of 10^9: what is applied is
    # counted, not only what generates.
    expected = {26: 1.69, 38: 2.17, 50: 2.65, 101: 4.66, 152: 6.68}[depth]
    assert round(forward_flops(model, (224, 224)) / 2e9, 2) == expected


# --- the operator --------------------------------------------------------------------------------


@given(
    seed=seeds,
    batch=counts,
    groups=counts,
    group_channels=counts,
    height=sides,
    width=sides,
    kernel_size=st.sampled_from((1, 3, 5, 7)),
    stride=st.integers(1, 4),
    at_once=st.sampled_from((1, 100, 1 << 18)),
)
def test_equals_the_definition(
    seed: int,
    batch: int,
    groups: int,
    group_channels: int,
    height: int,
    width: int,
    kernel_size: int,
    stride: int,
    at_once: int,
) -> None:
    """However many groups are summed at once."""
    shape = (batch, groups * group_channels, height, width)
    x, kernel = example(seed, shape, groups, kernel_size, stride)
    with mock.patch.dict(involution_op._AT_ONCE, cpu=at_once):
        ours = involution(x, kernel, kernel_size, stride)
        weights = torch.rand_like(ours)
        found = torch.autograd.grad(ours, (x, kernel), weights)
    expected = naive(x, kernel, kernel_size, stride)
    right = torch.autograd.grad(expected, (x, kernel), weights)
    for value, definition in zip((ours, *found), (expected, *right), strict=True):
        torch.testing.assert_close(value, definition)


@given(seeds, st.sampled_from((torch.float16, torch.bfloat16)), st.integers(1, 2))
def test_half_precision_sums_in_float32(seed: int, dtype: torch.dtype, stride: int) -> None:
    """As good as the exact sum of the rounded inputs, rounded once."""
    x, kernel = example(seed, (1, 32, 6, 5), 2, 7, stride, dtype)
    y = involution(x, kernel, 7, stride)
    expected = naive(x.double(), kernel.double(), 7, stride)
    assert y.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=unit, atol=1e-4)
    weights = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, kernel), weights)
    right = torch.autograd.grad(expected, (x, kernel), weights.double())
    for gradient, exact in zip(found, right, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), exact.double(), rtol=2 * unit, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "kernel_size", "stride"),
    [
        ((1, 10, 4, 4), 3, 1),  # no multiple of the taps
        ((1, 27, 4, 4), 3, 1),  # 3 groups of 4 channels
        ((1, 4, 4, 4), 2, 1),  # no middle
        ((1, 9, 4, 5), 3, 1),  # other places
        ((1, 9, 4, 4), 3, 2),
    ],
)
def test_shapes_that_do_not_belong_together(
    shape: tuple[int, int, int, int], kernel_size: int, stride: int
) -> None:
    with pytest.raises(ConfigError):
        involution(torch.zeros(1, 4, 4, 4), torch.zeros(shape), kernel_size, stride)


def peak(x: Tensor, kernel: Tensor, form: object) -> int:
    """Bytes held at most, forward and backward."""
    assert callable(form)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        torch.autograd.grad(form(x, kernel, 7, 1).sum(), (x, kernel))
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_memory_of_training() -> None:
    x, kernel = example(0, (2, 64, 28, 28), 4, 7, 1, torch.float32)
    assert peak(x, kernel, involution) < 0.15 * peak(x, kernel, naive)


def test_the_library_accepts_the_operators() -> None:
    """Schema, autograd registration and shapes without data agree with what the operators do."""
    x, kernel = example(0, (2, 4, 5, 4), 2, 3, 2, torch.float32)
    ops, grad, fixed = torch.ops.vitdistill, torch.randn(2, 4, 3, 2), kernel.detach()
    for op, args in (
        (ops.involution, (x, kernel, 3, 2)),
        (ops.involution_gradient_of_input, (grad, fixed, 5, 4, 3, 2)),
        (ops.involution_gradient_of_kernel, (grad, x.detach(), 2, 3, 2)),
    ):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op.default, args, test_utils=checks)


# --- the module ----------------------------------------------------------------------------------


@given(seeds, sides, sides, st.sampled_from((1, 2, 3)), st.sampled_from((2, 4)))
def test_any_size(seed: int, height: int, width: int, stride: int, reduction: int) -> None:
    torch.manual_seed(seed)
    module = Involution(8, 3, stride, group_channels=4, reduction=reduction).eval()
    x = torch.randn(2, 8, height, width)
    y = module(x)
    assert y.shape == F.conv2d(x, torch.zeros(8, 8, 3, 3), stride=stride, padding=1).shape
    torch.testing.assert_close(y[1:], module(x[1:]), rtol=1e-4, atol=1e-5)  # no image sees another


def test_a_stride_pools_the_cell_it_stands_for() -> None:
    """Five pixels at stride 2: cells of 2, 2 and 1; and where the stride divides, the authors'
    floor and ours are one.
    """
    module = Involution(4, 1, 2, group_channels=4, reduction=1).eval()
    x = torch.rand(1, 4, 5, 5)
    kernel = module.conv2(module.conv1(module.pool(x)))
    rows = [x[..., a : a + 2, :].mean(2) for a in (0, 2, 4)]
    cells = torch.stack([torch.stack(rows, 2)[..., b : b + 2].mean(3) for b in (0, 2, 4)], 3)
    torch.testing.assert_close(kernel, module.conv2(module.conv1(cells)))
    torch.testing.assert_close(module(x), kernel * x[..., ::2, ::2])
    torch.testing.assert_close(module.pool(x[..., :4, :4]), F.avg_pool2d(x[..., :4, :4], 2))


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 24, "kernel_size": 3},
        {"channels": 16, "kernel_size": 3, "reduction": 3},
        {"channels": 16, "kernel_size": 4},
    ],
)
def test_impossible_modules(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Involution(**options)


def test_flops() -> None:
    """Generating and applying, 13.0 M and 9.8 M multiply-accumulates at 56 x 56; a backward pass
    applies twice more.
    """
    with torch.device("meta"):
        module = Involution(64, 7)
        generate = 64 * 16 + 16 * 4 * 49
    apply = 64 * 49
    wide = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1, device="meta"), module)
    assert forward_flops(wide, (56, 56)) == 2 * 56 * 56 * (3 * 64 + generate + apply)
    assert training_flops(wide, (56, 56)) == 2 * 56 * 56 * (2 * 3 * 64 + 3 * generate + 3 * apply)


def test_compiles_into_one_graph() -> None:
    module = Involution(16, 3, 2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 16, 5, 7, requires_grad=True)
    torch.manual_seed(0)
    expected = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    found = torch.autograd.grad(compiled(x).square().sum(), [x, *module.parameters()])
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize("stride", [1, 2])
def test_exports_as_plain_operators(stride: int) -> None:
    """What an ONNX file holds: no operator of ours, the same answers, any batch."""
    module = Involution(16, 7, stride).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        module, (torch.randn(2, 16, 5, 6),), dynamic_shapes=({0: batch},), strict=False
    )
    assert not [node for node in program.graph.nodes if "vitdistill" in str(node.target)]
    x = torch.randn(3, 16, 5, 6)
    torch.testing.assert_close(program.module()(x), module(x))


# --- RedNet --------------------------------------------------------------------------------------


def tiny(**changes) -> RedNet:
    """One block a stage, with every block alive."""
    torch.manual_seed(0)
    model = RedNet((1, 1, 1, 1), **{"num_classes": 5, "small_images": True, **changes})
    for block in (stage[0] for stage in (model.layer1, model.layer2, model.layer3, model.layer4)):
        torch.nn.init.constant_(block.bn3.weight, 0.2)
    return model.eval()


@pytest.mark.parametrize("name", [f"rednet{n}" for n in (26, 38, 50, 101, 152)])
@pytest.mark.parametrize("small", ["", "_small"])
def test_names_are_registered_and_none_is_timms(name: str, small: str) -> None:
    if small and name in ("rednet101", "rednet152"):
        assert not timm.is_model(name + small)
        return
    assert not hasattr(timm.models, name + small)
    with torch.device("meta"):
        model = create_model(name + small, num_classes=3)
    assert type(model) is RedNet and model.pretrained_cfg["architecture"] == name + small
    assert input_spec_of(model).image_size == ((32, 32) if small else (224, 224))


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47)])
@pytest.mark.parametrize("small", [True, False])
def test_recorded_by_run_vit(height: int, width: int, small: bool) -> None:
    model = tiny(small_images=small)
    images = torch.randn(2, 3, height, width)
    output = run_vit(
        model, images, Needs(logits=True, features=True, hidden=frozenset({0, 1, 2, 3}))
    )
    torch.testing.assert_close(output.logits, model(images))
    assert [stage["num_chs"] for stage in model.feature_info] == [64, 256, 512, 1024, 2048]
    reductions = [1, 1, 2, 4, 8] if small else [2, 4, 8, 16, 32]
    assert [stage["reduction"] for stage in model.feature_info] == reductions
    for block, stage in enumerate(model.feature_info):
        scale = stage["reduction"]
        rows, columns = -(-height // scale), -(-width // scale)
        assert output.grids[block] == (rows, columns)
        tokens = output.features if block == 4 else output.hidden[block]
        assert tokens is not None and tokens.shape == (2, rows * columns, stage["num_chs"])
    last = model.forward_features(images)
    torch.testing.assert_close(output.features, last.flatten(2).transpose(1, 2))
    torch.testing.assert_close(model.forward_head(last), output.logits)


def test_starts_as_the_authors() -> None:
    model = rednet(26, 10)
    for name, module in model.named_modules():
        if isinstance(module, Involution):
            assert module.conv2[0].bias.abs().max() == 0, name
            std = (2 / module.conv2[0].out_channels) ** 0.5
            assert module.conv2[0].weight.std().item() == pytest.approx(std, rel=0.1), name
    assert all(
        stage[-1].bn3.weight.abs().max() == 0
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4)
    )


@torch.no_grad()
def test_takes_the_authors_checkpoints() -> None:
    """Their names, written back from ours: the converter finds every one."""
    names = {
        "conv1.0.": "stem.0.conv.",
        "conv1.1.": "stem.0.bn.",
        "conv1.3.": "stem.1.",
        "conv1.4.": "stem.2.",
        "conv1.6.": "stem.4.conv.",
        "bn1.": "stem.4.bn.",
    }
    state = tiny().state_dict()
    theirs = {}
    for key, value in state.items():
        name = "head." + key if key.startswith("fc.") else "backbone." + key
        for ours, old in names.items():
            if key.startswith(ours):
                name = "backbone." + old + key.removeprefix(ours)
        theirs[name] = value
    stages = {"layer1", "layer2", "layer3", "layer4"}
    assert {key.split(".")[1] for key in theirs} == {"stem", *stages, "fc"}
    for given_state in (theirs, state):
        converted = checkpoint_filter_fn(given_state, tiny())
        assert converted.keys() == state.keys()
        assert all(torch.equal(converted[key], state[key]) for key in state)


@torch.no_grad()
def test_export_and_back(tmp_path: Path) -> None:
    """The folder alone rebuilds the network: fewer blocks than the name's, other classes, the small
    stem.
    """
    model = create_model("rednet26_small", num_classes=3, layers=[1, 1, 1, 1])
    given = {"layers": [1, 1, 1, 1]}
    export_timm(
        model,
        tmp_path / "out",
        architecture="rednet26_small",
        model_args=given,
        classes=("a", "b", "c"),
        input_spec=input_spec_of(model),
    )
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(images), model.eval()(images), rtol=0, atol=0)


def test_no_dilation() -> None:
    with pytest.raises(ConfigError, match="output_stride"):
        create_model("rednet26", output_stride=8)


def test_impossible_networks() -> None:
    for build in (
        lambda: RedNet((1, 1)),
        lambda: RedNet((1, 1, 1, 1), channels=(64, 128)),
        lambda: RedNet((1, 1, 1, 1), channels=(60, 128, 256, 512)),
        lambda: rednet(27),
    ):
        with pytest.raises(ConfigError):
            build()
