"""An optimizer's state as named tensors and JSON, without pickle and bit for bit.

The JSON encodes what plain JSON would change: integer keys, tuples, dtypes and strides.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

PREFIX = "optimizer."


def pack_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Split an optimizer's ``state_dict`` for `unpack_optimizer` to join.

    Returns its tensors by name, each with the prefix ``optimizer.``, and the rest as plain JSON;
    ``TypeError`` for an object that JSON cannot keep.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
            kept: dict[str, Any] = {"tensor": name}
            # A reduction over a channels-last tensor adds in another order: strides are state.
            if not value.is_contiguous() and _is_dense(value):
                kept["stride"] = list(value.stride())
            return kept
        if isinstance(value, Mapping):
            if not all(type(key) in (int, str) for key in value):
                raise TypeError(f"optimizer state {name!r} has keys other than int and str")
            return {"dict": [[key, pack(item, f"{name}.{key}")] for key, item in value.items()]}
        if type(value) in (list, tuple):
            items = [pack(item, f"{name}.{index}") for index, item in enumerate(value)]
            return {type(value).__name__: items}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        for kind in (bool, int, float, str):  # numpy's numbers are subclasses of Python's
            if isinstance(value, kind):
                return kind(value)
        if value is None:
            return None
        raise TypeError(f"optimizer state {name!r} is {type(value).__name__}, which is not kept")

    items = [[key, pack(item, f"{PREFIX}{key}")] for key, item in state_dict.items()]
    return tensors, {"dict": items}


def _is_dense(tensor: Tensor) -> bool:
    return torch.empty_like(tensor, memory_format=torch.preserve_format).stride() == tensor.stride()


def unpack_optimizer(tensors: Mapping[str, Tensor], packed: Any) -> dict[str, Any]:
    """Join what `pack_optimizer` gave to a ``state_dict``; ``DataError`` if a tensor is missing."""

    def unpack(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        ((kind, item),) = [(key, item) for key, item in value.items() if key != "stride"]
        match kind:
            case "dict":
                return {key: unpack(inner) for key, inner in item}
            case "list":
                return [unpack(inner) for inner in item]
            case "tuple":
                return tuple(unpack(inner) for inner in item)
            case "dtype":
                return getattr(torch, item)
        if item not in tensors:
            raise DataError(f"the optimizer's state lacks the tensor {item!r}")
        tensor = tensors[item]
        if "stride" not in value:
            return tensor
        strided = torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype)
        return strided.copy_(tensor)

    return dict(unpack(packed))
