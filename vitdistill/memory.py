"""An error that names what to set when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import Fix, OutOfMemory, Set

SMALLER_EVALUATION = Set("train.eval_batch_size")

# torch raises plain RuntimeErrors too: for a CPU's tensor, and from CUDA's libraries.
_HOST = "DefaultCPUAllocator: can't allocate memory"
_GPU = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def memory_errors(where: str, fix: Fix | tuple[Fix, ...]) -> Iterator[None]:
    """Raise `OutOfMemory` with ``where`` (such as ``in an evaluation``) when memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError) or any(
            words in str(error) for words in _GPU
        )
        if not on_gpu and not isinstance(error, MemoryError) and _HOST not in str(error):
            raise
        memory = "the memory of the GPU" if on_gpu else "the memory of this machine"
        raise OutOfMemory(f"{memory} ran out {where}", fix) from error
