"""Tensors as the bytes of a safetensors file.

The library's ``save_file`` neither syncs nor honours the umask, so its serialiser gives the bytes
and `vitdistill.storage.atomic` writes them.
"""

from collections.abc import Mapping

import safetensors.torch
from torch import Tensor


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return tensors as the content of a safetensors file; equal tensors give equal bytes."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        # The library refuses tensors that share memory, such as tied weights.
        plain[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return safetensors.torch.save(plain, None if metadata is None else dict(metadata))
