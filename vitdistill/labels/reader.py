"""Stored answers on their way into training: read a batch at a time, checked against the views that
the student sees.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import DataError
from ..vit.needs import Needs
from ..vit.network import Network
from ..vit.output import ViTOutput
from .layout import Layout, Targets
from .store import LabelStore

I64 = npt.NDArray[np.int64]


@dataclass
class LabelReader:
    """Reads one teacher's records for the batches of a run.

    Attributes:
        name: of the teacher.
        store: its labels.
        online: rows without a record are left to the teacher itself; otherwise they are an error.
    """

    name: str
    store: LabelStore
    online: bool = False

    def __call__(
        self,
        views: I64,
        ids: I64,
        checksums: npt.NDArray[np.uint32] | None,
        device: torch.device | str = "cpu",
    ) -> tuple[Targets, I64]:
        """The records of samples ``ids`` in ``views``, int64 (B,) each, on ``device``, and the rows
        that have none.

        Raises:
            DataError: a record is missing, or a view is not the one that was labelled, by its
                checksum.
        """
        labelled = views < self.store.manifest.num_views
        records, present = self.store.read(np.where(labelled, views, 0), ids)
        present &= labelled
        missing = np.flatnonzero(~present)
        if len(missing) and not self.online:
            row = missing[0]
            raise DataError(
                f"the labels of the {self.name} have no record of sample {ids[row]} in view"
                f" {views[row]}: label the rest ('vitdistill label status {self.store.path}' says"
                " how much), or let the teacher answer there (--set"
                f" teachers.{self.name}.missing=online)"
            )
        if checksums is not None:
            wrong = np.flatnonzero(present & (records["pixels"] != checksums))
            if len(wrong):
                raise DataError(
                    self._other_view(int(ids[wrong[0]]), int(views[wrong[0]]), len(wrong), len(ids))
                )
        return self.store.layout.targets(records).to(device, non_blocking=True), missing

    def _other_view(self, sample: int, view: int, wrong: int, count: int) -> str:
        from .identity import versions

        then, now = self.store.manifest.about.get("versions", {}), versions()
        changed = [
            f"{name} {then[name]} then, {now[name]} now"
            for name in now
            if then.get(name, now[name]) != now[name]
        ]
        cause = (
            f"a library has changed ({'; '.join(changed)})"
            if changed
            else "an image or a library that makes views has changed"
        )
        return (
            f"view {view} of sample {sample} is not the one that the {self.name} labelled (its"
            f" pixels differ, as do those of {wrong} of {count} in this batch): {cause}; label"
            " again, or restore what made these labels"
        )


@dataclass
class StoredAnswer:
    """What a stored teacher says of one batch.

    Attributes:
        targets: its records.
        network: its description.
        missing: rows without a record; ``live`` is the teacher's own answer to them.
    """

    targets: Targets
    network: Network
    missing: Int[Tensor, " M"] | None = None
    live: ViTOutput | None = None
    _read: dict[float | None, ViTOutput] = field(default_factory=dict)

    def at(self, temperature: float | None) -> ViTOutput:
        """The answer as a teacher records it, whose ``softmax(logits / temperature)`` is the one
        that was stored; None: of dense labels.
        """
        if temperature not in self._read:
            self._read[temperature] = self._filled(self._output(temperature))
        return self._read[temperature]

    def _output(self, temperature: float | None) -> ViTOutput:
        network = self.network
        return ViTOutput(
            logits=self._logits(temperature),
            hidden=dict(self.targets.hidden),
            features=self.targets.features,
            grid=network.grid,
            grids=network.grids,
            network=network,
        )

    def _logits(self, temperature: float | None) -> Float[Tensor, "B C"] | None:
        logits = self.targets.layout.logits
        if logits is None or (
            temperature is None and not logits.is_complete
        ):  # of sparse labels that nobody reads
            return None
        return self.targets.logits(temperature)

    def _filled(self, output: ViTOutput) -> ViTOutput:
        if self.live is None or self.missing is None:
            return output
        rows = self.missing
        pairs: list[tuple[Tensor | None, Tensor | None]] = [
            (output.logits, self.live.logits),
            (output.features, self.live.features),
        ]
        pairs += [(output.hidden[i], self.live.hidden[i]) for i in output.hidden]
        for stored, live in pairs:
            if stored is not None and live is not None:
                stored[rows] = live.to(stored.dtype)
        return output


def live_rows(
    teacher: Callable[..., ViTOutput], images: Float[Tensor, "B 3 h w"], needs: Needs, missing: I64
) -> tuple[Int[Tensor, " M"], ViTOutput]:
    """The rows without a record, on the images' device, and the teacher's answer to them."""
    rows = torch.from_numpy(missing).to(images.device)
    return rows, teacher(images[rows], needs)


def blank_targets(layout: Layout, count: int, device: torch.device | str = "cpu") -> Targets:
    """``count`` equal records of zeros on ``device``, to try a plan without any labels."""
    one = layout.targets(np.zeros(1, layout.dtype)).to(device)
    return Targets(
        layout, {name: value.expand(count, *value.shape[1:]) for name, value in one.fields.items()}
    )
