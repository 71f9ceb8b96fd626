"""Copies of networks, even of those that cache tensors computed from their weights."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def copy_network(model: nn.Module) -> nn.Module:
    """Copy a network with its weights, wherever it has run."""
    # timm's LeViT, TinyViT, EfficientFormer and EfficientViT cache their attention biases in
    # evaluation; deepcopy refuses these if they have a gradient history.
    return _copy(model, lambda tensor: tensor if tensor.is_leaf else tensor.detach().clone())


def on_meta(model: nn.Module) -> nn.Module:
    """Copy the architecture without its weights, so that counting costs no memory and no time."""

    def fake(tensor: Tensor) -> Tensor:
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(empty, tensor.requires_grad)
        return empty

    return _copy(model, fake)


def _copy(model: nn.Module, of_tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    # deepcopy treats what is in ``memo`` as already copied.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in vars(module).values():  # parameters, buffers, and dicts of the module's own
            for tensor in held.values() if isinstance(held, dict) else ():
                copied = of_tensor(tensor) if isinstance(tensor, Tensor) else tensor
                if copied is not tensor:
                    memo[id(tensor)] = copied
    return copy.deepcopy(model, memo)
