"""Tensors as the content of a safetensors file."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .atomic import Content, Sink

# The names of safetensors' header, and nothing torch has that safetensors lacks (quantised and
# complex types).
_TENSOR_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def tensors_content(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Content:
    """Tensors as the content of a safetensors file, streamed one tensor at a time; equal tensors
    give equal bytes.

    The library's own writer is not used: it neither syncs nor honours the umask, and needs a second
    copy in memory. Raises ``DataError`` for a type safetensors has no name for.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _TENSOR_TYPES or tensor.layout is not torch.strided:
            raise DataError(
                f"Tensor {name!r} is {tensor.dtype} ({tensor.layout}), which a safetensors file"
                " cannot hold; convert it to a dense real type first."
            )
    # Wide types first keeps every tensor aligned to its own width, as the format asks.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TENSOR_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)

    def write(sink: Sink) -> None:
        sink.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if tensors[name].numel():
                flat = tensors[name].detach().cpu().contiguous().reshape(-1)
                sink.write(flat.view(torch.uint8).numpy().data)

    return Content(8 + len(text) + offset, write)
