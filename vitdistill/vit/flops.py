"""FLOPs of a forward pass, counted on the code that runs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .walk import Needs, run_vit


def forward_flops(
    model: nn.Module,
    image_size: tuple[int, int],
    needs: Needs | None = None,
    num_keep: int | None = None,
) -> int:
    """FLOPs of one recorded forward pass on one image (a multiply-accumulate is 2), counted with
    `FlopCounterMode` on the meta device.

    ``needs=None`` counts the model's own forward.
    """
    return _count(model, image_size, needs, num_keep, backward=False)


def training_flops(
    model: nn.Module, image_size: tuple[int, int], needs: Needs | None = None
) -> int:
    """FLOPs of one forward and backward pass on one image."""
    return _count(model, image_size, needs, None, backward=True)


def _count(
    model: nn.Module,
    image_size: tuple[int, int],
    needs: Needs | None,
    num_keep: int | None,
    backward: bool,
) -> int:
    model = _on_meta(model)
    images = torch.empty(
        2, 3, *image_size, device="meta"
    )  # two: some batch norms refuse to train on one value a channel
    keep = _blank_keep(num_keep, len(images))
    # With gradients in either case: without, torch's module tracker fails on a network that hands a
    # parameter to a block (CaiT).
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        outputs = (
            [model(images)] if needs is None else run_vit(model, images, needs, keep).tensors()
        )
        if backward:
            torch.autograd.backward([t.sum() for t in outputs])
    return counter.get_total_flops() // len(images)


def _blank_keep(num_keep: int | None, batch_size: int) -> Tensor | None:
    return (
        None
        if num_keep is None
        else torch.zeros(batch_size, num_keep, dtype=torch.int64, device="meta")
    )


def _on_meta(model: nn.Module) -> nn.Module:
    """The same architecture without weights, so that counting costs neither memory nor time."""
    import copy

    if all(p.is_meta for p in model.parameters()):
        return model
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        )
    return copy.deepcopy(model, memo)
