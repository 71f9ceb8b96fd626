"""FLOPs of a forward pass, counted on the code that runs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from .copies import on_meta


def _count_convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *args: Any, out_shape: Any
) -> int:
    """Count the gradients of a convolution, each of which costs what its forward pass does."""
    transposed, output_mask = args[4], args[7]
    once = conv_flop_count([*x], [*weight], [*grad], transposed)
    return once * sum(output_mask[:2])


def count_flops() -> FlopCounterMode:
    """Return a context that counts FLOPs: `get_total_flops`."""
    # torch's own formula takes the gradient of a grouped weight for that of a dense one.
    formulas = {torch.ops.aten.convolution_backward: _count_convolution_backward}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def forward_flops(model: nn.Module, image_size: tuple[int, int], *, backward: bool = False) -> int:
    """Count the FLOPs of a model's own forward pass on one image (a multiply-accumulate is 2).

    The pass runs on the meta device; ``backward``: with the backward pass. 0: it cannot be counted,
    because it reads the values of tensors.
    """
    size = 2  # some batch norms refuse to train on one value a channel
    images = torch.empty(size, 3, *image_size, device="meta")
    # Gradients stay on even for a forward pass: without them torch's module tracker fails on a
    # network that hands a parameter to a block (CaiT).
    with torch.enable_grad(), count_flops() as counter:
        try:
            answer = on_meta(model)(images)
        except Exception:  # whatever somebody's code raises
            return 0
        if backward:
            answer.sum().backward()
    return counter.get_total_flops() // size


def training_flops(model: nn.Module, image_size: tuple[int, int]) -> int:
    """Count the FLOPs of one forward and backward pass on one image."""
    return forward_flops(model, image_size, backward=True)
