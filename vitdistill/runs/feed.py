"""The batches of a run, fetched one step ahead."""

import time
from collections.abc import Generator, Iterator

import torch

from ..data.batch import Batch
from ..errors import UserError


class Feed:
    """The next step's batches, fetched while the device computes this one."""

    def __init__(self, steps: Iterator[tuple[Batch, ...]], device: torch.device) -> None:
        self.batches: tuple[Batch, ...] | None = None  # of the next step; None: there is none
        self.error: UserError | None = None  # why there are none; settled when processes meet
        self.waited = 0.0  # seconds the device stood still for data
        self._steps = steps
        self._on_gpu = device.type == "cuda"

    def fetch(self) -> None:
        """Fetch the next step's batches, or keep the error that prevents them."""
        working = torch.cuda.Event() if self._on_gpu else None
        if working is not None:
            working.record()
        begun = time.perf_counter()
        try:
            self.batches = next(self._steps, None)
        except UserError as error:
            self.batches, self.error = None, error
        # A GPU that is still busy has not waited for data, however long the host did.
        if working is None or working.query():
            self.waited += time.perf_counter() - begun

    def close(self) -> None:
        if isinstance(self._steps, Generator):
            self._steps.close()
