"""What is said when memory runs out: where, and what to set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import OutOfMemory

SMALLER_EVALUATION = (
    "set a smaller train.eval_batch_size with --set, and another --output where this run has begun"
)

# Memory that runs out as a plain RuntimeError: that of a CPU's tensor, pinned memory, that of
# CUDA's libraries.
_HOST, _GPU = (
    "DefaultCPUAllocator: can't allocate memory",
    (
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ),
)


@contextmanager
def memory_errors(where: str, remedy: str) -> Iterator[None]:
    """Turn memory that runs out within into one sentence.

    Args:
        where: such as ``in a training step``.
        remedy: what to do.

    Raises:
        OutOfMemory: memory of a GPU or of the machine ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError) or any(
            words in str(error) for words in _GPU
        )
        if not on_gpu and not isinstance(error, MemoryError) and _HOST not in str(error):
            raise
        raise OutOfMemory(
            f"the memory of {'the GPU' if on_gpu else 'this machine'} ran out {where}: {remedy}"
        ) from error
