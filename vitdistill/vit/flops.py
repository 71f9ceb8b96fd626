"""FLOPs of a forward pass, counted on the code that runs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from .copies import on_meta
from .needs import Needs
from .walk import run_vit


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


def forward_flops(
    model: nn.Module,
    image_size: tuple[int, int],
    needs: Needs | None = None,
    num_keep: int | None = None,
    *,
    backward: bool = False,
) -> int:
    """Count the FLOPs of one recorded forward pass on one image (a multiply-accumulate is 2).

    The pass runs on the meta device. ``needs=None`` counts the model's own forward; ``num_keep``:
    on so many patches; ``backward``: with the backward pass of everything that is recorded. 0: it
    cannot be counted, for it reads what its tensors hold.
    """
    size = 2  # some batch norms refuse to train on one value a channel
    images, keep = torch.empty(size, 3, *image_size, device="meta"), None
    if num_keep is not None:
        keep = torch.zeros(size, num_keep, dtype=torch.int64, device="meta")
    # Gradients stay on even for a forward pass: without them torch's module tracker fails on a
    # network that hands a parameter to a block (CaiT).
    with torch.enable_grad(), count_flops() as counter:
        if needs is None:
            try:
                outputs = [on_meta(model)(images)]
            except Exception:  # whatever somebody's code raises
                return 0
        else:
            outputs = run_vit(on_meta(model), images, needs, keep).tensors()
        if backward:
            torch.autograd.backward([t.sum() for t in outputs])
    return counter.get_total_flops() // size


def training_flops(
    model: nn.Module, image_size: tuple[int, int], needs: Needs | None = None
) -> int:
    """Count the FLOPs of one forward and backward pass on one image."""
    return forward_flops(model, image_size, needs, backward=True)
