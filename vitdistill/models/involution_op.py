"""The involution operator: forward, backward, FLOPs, and a form for exporters."""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..errors import ConfigError

# Output elements summed at once. On a CPU what one tap reads and writes should stay in the cache
# (measured from 2^16 to all at once: 2^18 to 2^20 are fastest); elsewhere this bounds the float32
# copies of half-precision inputs.
_AT_ONCE = {"cpu": 1 << 18}
_AT_ONCE_ELSEWHERE = 1 << 24


def involution(
    x: Float[Tensor, "B channels height width"],
    kernel: Float[Tensor, "B taps rows columns"],
    kernel_size: int,
    stride: int = 1,
) -> Float[Tensor, "B channels rows columns"]:
    """Weigh every pixel's neighbourhood by a kernel of its own, shared by the channels of a group.

    ``y[c, i, j] = sum_pq kernel[g(c), p, q, i, j] x[c, s i + p - (K - 1) / 2, s j + q - (K - 1) /
    2]``, zeros outside the image; K is the kernel size, s the stride, and g(c) the group of channel
    c. Sums are float32 for half-precision inputs; float64 stays. Second derivatives are not
    implemented.

    Args:
        x: images or feature maps.
        kernel: ``groups * kernel_size ** 2`` channels, group-major, then the taps row by row; a
            place for every ``stride``-th pixel, rounded up.
        kernel_size: odd.
        stride: of the output, in pixels.

    Raises:
        ConfigError: the shapes do not fit, or the kernel has no middle.

    Source: arXiv 2103.06255 equation 4; ``involution_naive.py`` of d-li14/involution@21c3158.
    """
    places = (-(-x.shape[2] // stride), -(-x.shape[3] // stride))
    groups, rest = divmod(kernel.shape[1], kernel_size**2)
    fits = not rest and groups and x.shape[1] % groups == 0 and kernel.shape[2:] == places
    if not fits or not kernel_size % 2:
        shapes = tuple(kernel.shape), tuple(x.shape)
        raise ConfigError("kernels of {} do not fit images of {}".format(*shapes))
    dtype = torch.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.to(dtype), kernel.to(dtype)
    if torch.compiler.is_exporting():
        return _by_rows(x, kernel, kernel_size, stride)
    return torch.ops.vitdistill.involution(x, kernel, kernel_size, stride)


def _by_rows(x: Tensor, kernel: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Compute involution for exporters, by operators they know, a row of taps at a time."""
    # One operator a tap makes graphs of thousands of nodes, which take minutes to export; all taps
    # at once make K x K copies of the image.
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
    """Where a tap reads: ``plane`` at ``there``, for the output pixels ``here``; else zeros."""

    number: int
    plane: tuple[int, int]
    here: tuple[slice, slice]
    there: tuple[slice, slice]


@lru_cache(maxsize=256)
def _taps(kernel_size: int, stride: int, height: int, width: int) -> tuple[_Tap, ...]:
    # Plane (a, b) holds the pixels (stride i + a, stride j + b), so that no view has gaps.
    rows, columns = _reads(kernel_size, stride, height), _reads(kernel_size, stride, width)
    return tuple(
        _Tap(p * kernel_size + q, (a, b), (here, across), (there, along))
        for p, a, here, there in rows
        for q, b, across, along in columns
        if here.start < here.stop and across.start < across.stop
    )


def _reads(kernel_size: int, stride: int, size: int) -> list[tuple[int, int, slice, slice]]:
    """Return, along one axis, each tap's plane, output places, and their pixels in the plane."""
    found = []
    for p in range(kernel_size):
        shift, plane = divmod(p - kernel_size // 2, stride)
        first, last = max(0, -shift), min(-(-size // stride), -(-(size - plane) // stride) - shift)
        found.append((p, plane, slice(first, last), slice(first + shift, last + shift)))
    return found


def _parts(groups: int, sized: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors a few groups at a time, ``(groups, channels a group, rows, columns, B)``.

    How many at a time follows from the size of ``sized``.
    """
    most = _AT_ONCE.get(sized.device.type, _AT_ONCE_ELSEWHERE)
    many = max(1, most * groups // max(1, sized.numel()))
    # With the batch innermost, even rows of 4 pixels make long loops.
    batch_last = (t.unflatten(1, (groups, -1)).permute(1, 2, 3, 4, 0) for t in tensors)
    return zip(*(t.split(many) for t in batch_last), strict=True)


def _planes(x: Tensor, stride: int) -> dict[tuple[int, int], Tensor]:
    """View every ``stride``-th pixel, from each offset."""
    return {(a, b): x[:, :, a::stride, b::stride] for a, b in product(range(stride), repeat=2)}


# Taps are added one after another from shifted views: no unfolded copy of the image is made.


def _output(x: Tensor, kernel: Tensor, kernel_size: int, stride: int) -> Tensor:
    groups = kernel.shape[1] // kernel_size**2
    taps = _taps(kernel_size, stride, x.shape[2], x.shape[3])
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(x.shape[:2] + kernel.shape[2:])
    for image, weights, out in _parts(groups, y, x, kernel, y):
        planes = {at: t.contiguous() for at, t in _planes(image.to(dtype), stride).items()}
        weights = weights.to(dtype).contiguous()
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
    for given, weights, out in _parts(groups, dx, grad, kernel, dx):
        given, weights = given.to(dtype).contiguous(), weights.to(dtype).contiguous()
        views = _planes(out, stride)
        planes = {
            at: torch.zeros(view.shape, dtype=dtype, device=grad.device)
            for at, view in views.items()
        }
        for tap in taps:
            rows, columns = tap.here
            weight = weights[:, tap.number, None, rows, columns]
            planes[tap.plane][:, :, *tap.there].addcmul_(given[:, :, rows, columns], weight)
        for at, view in views.items():
            view.copy_(planes[at])
    return dx


def _gradient_of_kernel(
    grad: Tensor, x: Tensor, groups: int, kernel_size: int, stride: int
) -> Tensor:
    taps = _taps(kernel_size, stride, x.shape[2], x.shape[3])
    dtype = torch.promote_types(x.dtype, torch.float32)
    dk = x.new_empty((len(x), groups * kernel_size**2, *grad.shape[2:]))
    for given, image, out in _parts(groups, grad, grad, x, dk):
        given = given.to(dtype).contiguous()
        planes = {at: t.contiguous() for at, t in _planes(image.to(dtype), stride).items()}
        total = torch.zeros(out.shape, dtype=dtype, device=x.device)
        for tap in taps:
            rows, columns = tap.here
            summands = given[:, :, rows, columns] * planes[tap.plane][:, :, *tap.there]
            torch.sum(summands, 1, out=total[:, tap.number, rows, columns])
        out.copy_(total)
    return dk


# --- what torch has to know of them --------------------------------------------------------------

# Registered operators, so that autograd keeps the two inputs alone and FLOPs can be counted.
_forward_op = torch.library.custom_op("vitdistill::involution", _output, mutates_args=())
_input_op = torch.library.custom_op(
    "vitdistill::involution_gradient_of_input", _gradient_of_input, mutates_args=()
)
_kernel_op = torch.library.custom_op(
    "vitdistill::involution_gradient_of_kernel", _gradient_of_kernel, mutates_args=()
)
_ops = torch.ops.vitdistill

# Shapes without numbers, for torch.compile and the meta device.
_forward_op.register_fake(
    lambda x, kernel, kernel_size, stride: x.new_empty(x.shape[:2] + kernel.shape[2:])
)
_input_op.register_fake(
    lambda grad, kernel, height, width, *_: grad.new_empty((*grad.shape[:2], height, width))
)
_kernel_op.register_fake(
    lambda grad, x, groups, kernel_size, stride: x.new_empty(
        (len(x), groups * kernel_size**2, *grad.shape[2:])
    )
)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
    x, kernel, ctx.kernel_size, ctx.stride = inputs
    ctx.save_for_backward(x, kernel)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, kernel = ctx.saved_tensors
    size, stride = ctx.kernel_size, ctx.stride
    height, width, groups = x.shape[2], x.shape[3], kernel.shape[1] // size**2
    dx = dk = None
    if ctx.needs_input_grad[0]:
        dx = _ops.involution_gradient_of_input(grad, kernel, height, width, size, stride)
    if ctx.needs_input_grad[1]:
        dk = _ops.involution_gradient_of_kernel(grad, x, groups, size, stride)
    return dx, dk, None, None


_forward_op.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(_ops.involution)
def _flops(x: Any, kernel: Any, kernel_size: int, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * math.prod(out_shape) * kernel_size**2


@register_flop_formula([_ops.involution_gradient_of_input, _ops.involution_gradient_of_kernel])
def _flops_of_gradient(grad: Any, *args: Any, **_: Any) -> int:
    kernel_size = args[-2]
    return 2 * math.prod(grad) * kernel_size**2
