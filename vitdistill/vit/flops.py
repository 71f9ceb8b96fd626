"""FLOPs of a forward pass, counted on the code that runs."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .needs import Needs
from .walk import run_vit


def forward_flops(
    model: nn.Module,
    image_size: tuple[int, int],
    needs: Needs | None = None,
    num_keep: int | None = None,
) -> int:
    """Count the FLOPs of one recorded forward pass on one image (a multiply-accumulate is 2).

    The pass runs on the meta device under `FlopCounterMode`. ``needs=None`` counts the model's own
    forward.
    """
    return _count(model, image_size, needs, num_keep, backward=False)


def training_flops(
    model: nn.Module, image_size: tuple[int, int], needs: Needs | None = None
) -> int:
    """Count the FLOPs of one forward and backward pass on one image."""
    return _count(model, image_size, needs, None, backward=True)


def _count(
    model: nn.Module,
    image_size: tuple[int, int],
    needs: Needs | None,
    num_keep: int | None,
    backward: bool,
) -> int:
    model, size = on_meta(model), 2  # some batch norms refuse to train on one value a channel
    images = torch.empty(size, 3, *image_size, device="meta")
    keep = blank_keep(num_keep, size)
    # Gradients stay on even for a forward pass: without them torch's module tracker fails on a
    # network that hands a parameter to a block (CaiT).
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        if needs is None:
            outputs = [model(images)]
        else:
            outputs = run_vit(model, images, needs, keep).tensors()
        if backward:
            torch.autograd.backward([t.sum() for t in outputs])
    return counter.get_total_flops() // size


def blank_keep(num_keep: int | None, batch_size: int) -> Tensor | None:
    """Return indices of ``num_keep`` patches an image on the meta device; None for all patches."""
    if num_keep is None:
        return None
    return torch.zeros(batch_size, num_keep, dtype=torch.int64, device="meta")


def on_meta(model: nn.Module) -> nn.Module:
    """Copy the architecture without its weights, so that counting costs no memory and no time."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake: Tensor = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, tensor.requires_grad)
        memo[id(tensor)] = fake
    return copy.deepcopy(model, memo)
