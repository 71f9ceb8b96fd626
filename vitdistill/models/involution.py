"""Involution, and RedNet: a ResNet whose 3 x 3 convolutions are involutions, under names that
timm's `create_model` finds.

Importing this module registers ``rednet26 .. rednet152``, and for images of about 32 x 32
``rednet26_small``, ``rednet38_small`` and ``rednet50_small``, with timm. An exported RedNet
therefore loads with plain timm once ``import vitdistill.models.involution`` has run in that
process, and is an unknown network before.

Source: "Involution: Inverting the Inherence of Convolution for Visual Recognition", Li et al., CVPR
2021, arXiv 2103.06255, checked against d-li14/involution@21c3158. What the authors' code cannot do:
sizes that the strides do not divide, and half precision.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ..errors import ConfigError

# Numbers of the output that are summed up at once. On the CPU what one tap reads and writes should
# stay in the cache (measured between 2^16 and all at once: 2^18 to 2^20 are fastest); elsewhere it
# bounds the float32 copies of half-precision inputs.
_AT_ONCE = {"cpu": 1 << 18}
_AT_ONCE_ELSEWHERE = 1 << 24
# torch 2.6 does not tell an export from a compilation.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

# -- the operator ---------------------------------------------------------------------------------


def involution(
    x: Float[Tensor, "B channels height width"],
    kernel: Float[Tensor, "B taps rows columns"],
    kernel_size: int,
    stride: int = 1,
) -> Float[Tensor, "B channels rows columns"]:
    """Every pixel's neighbourhood weighed by a kernel of its own, which the channels of a group
    share.

    ``y[c, i, j] = sum_pq kernel[g(c), p, q, i, j] x[c, s i + p - (K - 1) / 2, s j + q - (K - 1) /
    2]``, zeros outside the image; K is the kernel size, s the stride, and g(c) the group of channel
    c. No unfolded copy of the image is made: the K x K taps are added up one after another, in the
    forward and in the backward pass, from shifted views. Sums are float32 for half-precision
    inputs; float64 stays. A multiply-accumulate a tap, channel and output pixel is what
    `FlopCounterMode` counts, for each gradient once more. Second derivatives are not implemented.

    Args:
        x: images or feature maps.
        kernel: ``groups * kernel_size ** 2`` channels: group-major, then the taps row by row; one
            place for every ``stride``-th pixel, ``ceil(height / stride)`` rows and ``ceil(width /
            stride)`` columns.
        kernel_size: odd.
        stride: of the output, in pixels.

    Raises:
        ConfigError: shapes do not belong together.

    Source: arXiv 2103.06255 equation 4; ``involution_naive.py`` of d-li14/involution@21c3158.
    """
    places = (-(-x.shape[2] // stride), -(-x.shape[3] // stride))
    groups, rest = divmod(kernel.shape[1], kernel_size**2)
    if rest or not groups or x.shape[1] % groups or kernel_size % 2 == 0:
        raise ConfigError(
            f"involution: {kernel.shape[1]} kernel channels do not make groups of {kernel_size} x"
            f" {kernel_size} taps (an odd size) that divide {x.shape[1]} channels: give groups *"
            " kernel_size ** 2 of them"
        )
    if (kernel.shape[2], kernel.shape[3]) != places:
        raise ConfigError(
            f"involution: the kernel has {kernel.shape[2]} x {kernel.shape[3]} places, and an image"
            f" of {x.shape[2]} x {x.shape[3]} at stride {stride} needs {places[0]} x {places[1]}"
        )
    dtype = torch.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.to(dtype), kernel.to(dtype)
    if _is_exporting():
        return _by_rows(x, kernel, kernel_size, stride)
    return torch.ops.vitdistill.involution(x, kernel, kernel_size, stride)


def _by_rows(x: Tensor, kernel: Tensor, kernel_size: int, stride: int) -> Tensor:
    """The same for exporters: operators they know, a row of taps at a time, K copies of the image
    and not K x K.

    One operator a tap makes graphs of thousands of nodes, which take minutes to export.
    """
    rows, columns = kernel.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups = kernel.shape[1] // kernel_size**2
    padded = F.pad(x.to(dtype), (kernel_size // 2,) * 4).unflatten(1, (groups, -1))
    weights = kernel.to(dtype).unflatten(1, (groups, 1, kernel_size, kernel_size)).transpose(4, 5)
    along = torch.arange(kernel_size, device=x.device)[:, None] + stride * torch.arange(
        columns, device=x.device
    )
    total = torch.zeros((), dtype=dtype, device=x.device)
    for p in range(kernel_size):
        row = padded[..., p : p + stride * (rows - 1) + 1 : stride, :]
        seen = row.index_select(4, along.flatten()).unflatten(4, (kernel_size, columns))
        total = total + (weights[:, :, :, p] * seen).sum(4)
    return total.flatten(1, 2).to(x.dtype)


class _Tap(NamedTuple):
    """Where one of the K x K taps reads: ``plane`` of the image, at ``there``, for the output
    pixels ``here``; the rest reads zeros.
    """

    number: int
    plane: tuple[int, int]
    here: tuple[slice, slice]
    there: tuple[slice, slice]


@lru_cache(maxsize=256)
def _taps(kernel_size: int, stride: int, height: int, width: int) -> tuple[_Tap, ...]:
    """All taps that read anything. Plane (a, b) holds the pixels ``(stride i + a, stride j + b)``,
    so that no view has gaps.
    """
    rows, columns = _reads(kernel_size, stride, height), _reads(kernel_size, stride, width)
    return tuple(
        _Tap(p * kernel_size + q, (a, b), (here, across), (there, along))
        for p, a, here, there in rows
        for q, b, across, along in columns
        if here.start < here.stop and across.start < across.stop
    )


def _reads(kernel_size: int, stride: int, size: int) -> list[tuple[int, int, slice, slice]]:
    """Along one axis: tap, plane, output places with a pixel behind them, and those pixels' places
    in the plane.
    """
    found = []
    for p in range(kernel_size):
        shift, plane = divmod(p - kernel_size // 2, stride)
        first, last = max(0, -shift), min(-(-size // stride), -(-(size - plane) // stride) - shift)
        found.append((p, plane, slice(first, last), slice(first + shift, last + shift)))
    return found


def _batch_last(x: Tensor, groups: int) -> Tensor:
    """``(B, groups * n, rows, columns)`` as a view ``(groups, n, rows, columns, B)``: with many
    images, rows of 4 pixels are long loops.
    """
    return x.unflatten(1, (groups, -1)).permute(1, 2, 3, 4, 0)


def _planes(x: Tensor, stride: int) -> dict[tuple[int, int], Tensor]:
    return {
        (a, b): x[:, :, a::stride, b::stride].contiguous()
        for a in range(stride)
        for b in range(stride)
    }


def _groups_at_once(out: Tensor, groups: int) -> int:
    return max(1, _AT_ONCE.get(out.device.type, _AT_ONCE_ELSEWHERE) * groups // max(1, out.numel()))


def _output(x: Tensor, kernel: Tensor, kernel_size: int, stride: int) -> Tensor:
    groups = kernel.shape[1] // kernel_size**2
    taps = _taps(kernel_size, stride, x.shape[2], x.shape[3])
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(x.shape[:2] + kernel.shape[2:])
    many = _groups_at_once(y, groups)
    parts = (_batch_last(t, groups).split(many) for t in (x, kernel, y))
    for image, weights, out in zip(*parts, strict=True):
        planes, weights = _planes(image.to(dtype), stride), weights.to(dtype).contiguous()
        total = torch.zeros(out.shape, dtype=dtype, device=x.device)
        for tap in taps:
            rows, columns = tap.here
            weight = weights[:, tap.number, None, rows, columns]
            total[:, :, rows, columns].addcmul_(planes[tap.plane][:, :, *tap.there], weight)
        out.copy_(total)
    return y


def _gradient_of_input(
    grad: Tensor, kernel: Tensor, height: int, width: int, kernel_size: int, stride: int
) -> Tensor:
    groups = kernel.shape[1] // kernel_size**2
    taps = _taps(kernel_size, stride, height, width)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    dx = grad.new_empty((*grad.shape[:2], height, width))
    many = _groups_at_once(dx, groups)
    parts = (_batch_last(t, groups).split(many) for t in (grad, kernel, dx))
    for given, weights, out in zip(*parts, strict=True):
        given, weights = given.to(dtype).contiguous(), weights.to(dtype).contiguous()
        planes = {
            (a, b): torch.zeros(
                out[:, :, a::stride, b::stride].shape, dtype=dtype, device=grad.device
            )
            for a in range(stride)
            for b in range(stride)
        }
        for tap in taps:
            rows, columns = tap.here
            weight = weights[:, tap.number, None, rows, columns]
            planes[tap.plane][:, :, *tap.there].addcmul_(given[:, :, rows, columns], weight)
        for (a, b), plane in planes.items():
            out[:, :, a::stride, b::stride] = plane
    return dx


def _gradient_of_kernel(
    grad: Tensor, x: Tensor, groups: int, kernel_size: int, stride: int
) -> Tensor:
    taps = _taps(kernel_size, stride, x.shape[2], x.shape[3])
    dtype = torch.promote_types(x.dtype, torch.float32)
    dk = x.new_empty((len(x), groups * kernel_size**2, *grad.shape[2:]))
    many = _groups_at_once(grad, groups)
    parts = (_batch_last(t, groups).split(many) for t in (grad, x, dk))
    for given, image, out in zip(*parts, strict=True):
        given, planes = given.to(dtype).contiguous(), _planes(image.to(dtype), stride)
        total = torch.zeros(out.shape, dtype=dtype, device=x.device)
        for tap in taps:
            rows, columns = tap.here
            product = given[:, :, rows, columns] * planes[tap.plane][:, :, *tap.there]
            torch.sum(product, 1, out=total[:, tap.number, rows, columns])
        out.copy_(total)
    return dk


# Operators of their own, so that autograd keeps the two inputs and nothing else, and FLOPs can be
# counted.
_forward_op = torch.library.custom_op(
    "vitdistill::involution",
    _output,
    mutates_args=(),
    schema="(Tensor x, Tensor kernel, SymInt kernel_size, SymInt stride) -> Tensor",
)
_input_op = torch.library.custom_op(
    "vitdistill::involution_gradient_of_input",
    _gradient_of_input,
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor kernel, SymInt height, SymInt width, SymInt kernel_size, SymInt"
        " stride) -> Tensor"
    ),
)
_kernel_op = torch.library.custom_op(
    "vitdistill::involution_gradient_of_kernel",
    _gradient_of_kernel,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, SymInt groups, SymInt kernel_size, SymInt stride) -> Tensor",
)


@_forward_op.register_fake
def _fake_output(x: Tensor, kernel: Tensor, kernel_size: int, stride: int) -> Tensor:
    return x.new_empty(x.shape[:2] + kernel.shape[2:])


@_input_op.register_fake
def _fake_gradient_of_input(
    grad: Tensor, kernel: Tensor, height: int, width: int, kernel_size: int, stride: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:2], height, width))


@_kernel_op.register_fake
def _fake_gradient_of_kernel(
    grad: Tensor, x: Tensor, groups: int, kernel_size: int, stride: int
) -> Tensor:
    return x.new_empty((len(x), groups * kernel_size**2, *grad.shape[2:]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
    x, kernel, ctx.kernel_size, ctx.stride = inputs
    ctx.save_for_backward(x, kernel)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, kernel = ctx.saved_tensors
    size, stride, ops = ctx.kernel_size, ctx.stride, torch.ops.vitdistill
    wants_x, wants_kernel = ctx.needs_input_grad[:2]
    dx = (
        ops.involution_gradient_of_input(grad, kernel, x.shape[2], x.shape[3], size, stride)
        if wants_x
        else None
    )
    dk = (
        ops.involution_gradient_of_kernel(grad, x, kernel.shape[1] // size**2, size, stride)
        if wants_kernel
        else None
    )
    return dx, dk, None, None


_forward_op.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.vitdistill.involution)
def _flops_of_output(
    x: Any,
    kernel: Any,
    kernel_size: int,
    stride: int,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return 2 * x[0] * x[1] * kernel[2] * kernel[3] * kernel_size**2


@register_flop_formula(torch.ops.vitdistill.involution_gradient_of_input)
def _flops_of_input(
    grad: Any,
    kernel: Any,
    height: int,
    width: int,
    kernel_size: int,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return 2 * grad[0] * grad[1] * grad[2] * grad[3] * kernel_size**2


@register_flop_formula(torch.ops.vitdistill.involution_gradient_of_kernel)
def _flops_of_kernel(
    grad: Any,
    x: Any,
    groups: int,
    kernel_size: int,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return 2 * grad[0] * grad[1] * grad[2] * grad[3] * kernel_size**2


# -- the module -----------------------------------------------------------------------------------


class Involution(nn.Module):
    """Involution with kernels made from the pixel they stand on: ``kernel = W2 relu(BN(W1 u)) +
    b``, then `involution`.

    ``u`` is the input, under a stride s its means over s x s cells. Where s does not divide a side,
    the last cell is the mean of the pixels there are, and the output has ``ceil(side / s)`` places,
    as a convolution's; the authors' module rounds the two down and up and fails. At sizes s divides
    both are the same. Parameters are named and initialised as the authors' (Kaiming normal, bias
    0).

    Args:
        channels: of input and output.
        kernel_size: K, odd.
        stride: s, 1 or more.
        group_channels: channels that share a kernel; the authors' is 16.
        reduction: the kernel is made from ``channels / reduction`` numbers; the authors' is 4.

    Raises:
        ConfigError: channels are not a multiple of ``group_channels`` and of ``reduction``, K is
            even, or a number is not positive.

    Source: arXiv 2103.06255 section 3.2; ``involution_naive.py`` of d-li14/involution@21c3158.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        group_channels: int = 16,
        reduction: int = 4,
    ) -> None:
        super().__init__()
        for name, value in (
            ("kernel_size", kernel_size),
            ("stride", stride),
            ("group_channels", group_channels),
            ("reduction", reduction),
        ):
            if value < 1:
                raise ConfigError(f"Involution: {name} is {value}, and has to be at least 1")
        if kernel_size % 2 == 0:
            raise ConfigError(
                f"Involution: kernel_size is {kernel_size}; give an odd one, so that a pixel is the"
                " middle of its neighbours"
            )
        for name, value in (("group_channels", group_channels), ("reduction", reduction)):
            if channels < 1 or channels % value:
                raise ConfigError(
                    f"Involution: {channels} channels are not a multiple of {name}, which is"
                    f" {value}: change one of them"
                )
        self.kernel_size = kernel_size
        self.stride = stride
        narrow = channels // reduction
        kernel_channels = channels // group_channels * kernel_size**2
        self.pool = (
            nn.Identity()
            if stride == 1
            else nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
        )
        squeeze = nn.Conv2d(channels, narrow, 1, bias=False)
        spread = nn.Conv2d(narrow, kernel_channels, 1)
        self.conv1 = nn.Sequential(
            OrderedDict(conv=squeeze, bn=nn.BatchNorm2d(narrow), act=nn.ReLU(inplace=True))
        )
        self.conv2 = nn.Sequential(OrderedDict(conv=spread))
        for conv in (squeeze, spread):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(spread.bias)  # type: ignore[arg-type]

    def forward(
        self, x: Float[Tensor, "B channels height width"]
    ) -> Float[Tensor, "B channels rows columns"]:
        return involution(x, self.conv2(self.conv1(self.pool(x))), self.kernel_size, self.stride)


# -- RedNet ---------------------------------------------------------------------------------------

# Blocks of each stage.
DEPTHS = {
    26: (1, 2, 4, 1),
    38: (2, 3, 5, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class _Block(Bottleneck):
    """timm's bottleneck with an involution of 7 x 7 in the place of the 3 x 3 convolution, stride
    included.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conv2 = Involution(self.conv2.in_channels, 7, self.conv2.stride[0])  # type: ignore[assignment]


class RedNet(ResNet):
    """timm's ResNet with involutions: 7 x 7 in the bottlenecks, 3 x 3 in the stem.

    Stages of 256, 512, 1024 and 2048 channels by default, 4, 8, 16 and 32 times smaller than the
    image. Everything else is timm's ResNet's: ``forward_intermediates``, ``reset_classifier``,
    stochastic depth, gradient checkpointing.

    Args:
        layers: blocks of each of the four stages, see `DEPTHS`.
        num_classes: 0: no classifier.
        in_chans: channels of the image.
        global_pool: timm's name of the pooling before the classifier.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; earlier ones have less, in proportion.
        channels: of the 7 x 7 involutions of each stage, whose output is 4 times as wide; multiples
            of 16.
        stem_width: channels of the stem's involution, whose output is twice as wide; a multiple of
            16.
        small_images: no stride in the stem and no pooling after it, so that the stages are 1, 2, 4
            and 8 times smaller than the image, for images of about 32 x 32, where the authors'
            network ends at one pixel. This form is ours.

    Source: arXiv 2103.06255 section 4.1; ``rednet.py`` of d-li14/involution@21c3158.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        channels: Sequence[int] = (64, 128, 256, 512),
        stem_width: int = 32,
        small_images: bool = False,
    ) -> None:
        block: Any = _Block
        super().__init__(
            block,
            tuple(layers),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            channels=tuple(channels),
            stem_width=stem_width,
            stem_type="deep",
        )
        stem: Any = (
            self.conv1
        )  # timm's deep stem: convolution, norm, act, convolution, norm, act, convolution
        stem[3] = Involution(stem_width, 3)
        if small_images:
            stem[0] = nn.Conv2d(in_chans, stem_width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(stem[0].weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Sequential()
            for stage, reduction in zip(self.feature_info, (1, 1, 2, 4, 8), strict=True):
                stage["reduction"] = reduction


def rednet(depth: int, num_classes: int = 1000, **options: Any) -> RedNet:
    """A RedNet of 26, 38, 50, 101 or 152 layers with fresh weights; ``options`` are `RedNet`'s.
    Raises `ConfigError` for another depth.
    """
    if depth not in DEPTHS:
        raise ConfigError(
            f"there is no RedNet of depth {depth}: choose one of {', '.join(map(str, DEPTHS))}"
        )
    return RedNet(DEPTHS[depth], num_classes, **options)


# The authors' names of the stem, and ours; the stages are called the same.
_STEM = (
    (r"^stem\.0\.conv\.", "conv1.0."),
    (r"^stem\.0\.bn\.", "conv1.1."),
    (r"^stem\.1\.", "conv1.3."),
    (r"^stem\.2\.", "conv1.4."),
    (r"^stem\.4\.conv\.", "conv1.6."),
    (r"^stem\.4\.bn\.", "bn1."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the authors' checkpoints under timm's names; files of ours stay as they
    are.
    """
    renamed = {}
    for key, value in state_dict.items():
        key = key.removeprefix("backbone.").removeprefix("head.")
        for theirs, ours in _STEM:
            key = re.sub(theirs, ours, key)
        renamed[key] = value
    return renamed


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1.0",
        "classifier": "fc",
        **changes,
    }


_SMALL = {
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
}

default_cfgs = generate_default_cfgs(
    {
        **{f"rednet{depth}": _cfg() for depth in DEPTHS},
        **{f"rednet{depth}_small": _cfg(**_SMALL) for depth in (26, 38, 50)},
    }
)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> RedNet:
    depth, _, small = name.removeprefix("rednet").partition("_")
    shape = {"layers": DEPTHS[int(depth)], "small_images": bool(small)}
    made: RedNet = build_model_with_cfg(
        RedNet, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**shape, **options}
    )
    return made


@register_model
def rednet26(pretrained: bool = False, **options: Any) -> RedNet:
    """RedNet-26, 9.2 M parameters; ``options`` are `RedNet`'s. There are no pretrained weights."""
    return _create("rednet26", pretrained, options)


@register_model
def rednet38(pretrained: bool = False, **options: Any) -> RedNet:
    """RedNet-38, 12.4 M parameters; see `rednet26`."""
    return _create("rednet38", pretrained, options)


@register_model
def rednet50(pretrained: bool = False, **options: Any) -> RedNet:
    """RedNet-50, 15.5 M parameters; see `rednet26`."""
    return _create("rednet50", pretrained, options)


@register_model
def rednet101(pretrained: bool = False, **options: Any) -> RedNet:
    """RedNet-101, 25.7 M parameters; see `rednet26`."""
    return _create("rednet101", pretrained, options)


@register_model
def rednet152(pretrained: bool = False, **options: Any) -> RedNet:
    """RedNet-152, 34.0 M parameters; see `rednet26`."""
    return _create("rednet152", pretrained, options)


@register_model
def rednet26_small(pretrained: bool = False, **options: Any) -> RedNet:
    """RedNet-26 for images of about 32 x 32; see `RedNet`."""
    return _create("rednet26_small", pretrained, options)


@register_model
def rednet38_small(pretrained: bool = False, **options: Any) -> RedNet:
    """RedNet-38 for images of about 32 x 32; see `RedNet`."""
    return _create("rednet38_small", pretrained, options)


@register_model
def rednet50_small(pretrained: bool = False, **options: Any) -> RedNet:
    """RedNet-50 for images of about 32 x 32; see `RedNet`."""
    return _create("rednet50_small", pretrained, options)
