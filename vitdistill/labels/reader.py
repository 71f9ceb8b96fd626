"""Stored answers in training: a batch at a time, checked against the views the student sees."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ..errors import DataError, Set
from ..keyed import I64
from ..vit.network import Network
from ..vit.output import ViTOutput
from .identity import changed_versions, describe_views
from .layout import Layout, Targets
from .store import LabelStore


@dataclass
class LabelReader:
    """Reads one teacher's records for the batches of a run, as `TrainLoader` asks for them.

    ``online``: rows without a record are left to the teacher itself; else they are an error.
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
    ) -> Targets:
        """Return the records of samples ``ids`` in ``views``, (B,) each, on ``device``.

        `DataError` if one is missing, or if a view's checksum says that another one was labelled.
        """
        labelled = views < self.store.manifest.num_views
        records, present = self.store.read(np.where(labelled, views, 0), ids)
        present &= labelled
        missing = np.flatnonzero(~present)
        if len(missing) and not self.online:
            row = missing[0]
            lost = f"no record of sample {ids[row]} in view {views[row]}"
            what = f"the labels of the {self.name} in {self.store.path} have {lost}"
            fixes = "label the rest", Set(f"teachers.{self.name}.missing", "online")
            raise DataError(what, fixes, field=f"teachers.{self.name}.labels")
        if checksums is not None:
            wrong = np.flatnonzero(present & (records["pixels"] != checksums))
            if len(wrong):
                raise self._other_view(int(ids[wrong[0]]), int(views[wrong[0]]))
        targets = self.store.layout.targets(records, missing)
        return targets.to(device, non_blocking=True)

    def _other_view(self, sample: int, view: int) -> DataError:
        changed = changed_versions(self.store.manifest.about.get("versions", {}))
        return DataError(
            f"view {view} of sample {sample} has other pixels than the {self.name} labelled"
            f" ({describe_views(self.store.manifest.identity)}); if the loader has the same,"
            f" {changed or 'an image or a library that makes views'} has changed",
            ("make views as these labels'", "label again"),
            field=f"teachers.{self.name}.labels",
        )


@dataclass
class StoredAnswer:
    """What a teacher with labels says of one batch.

    ``live`` is its own answer to the rows that have no record, ``targets.missing``.
    """

    targets: Targets
    network: Network
    live: ViTOutput | None = None
    _read: dict[float | None, ViTOutput] = field(default_factory=dict)

    def at(self, temperature: float | None) -> ViTOutput:
        """Return the answer as a teacher records it, with logits for this temperature.

        None: with logits only if their encoding is complete.
        """
        if temperature not in self._read:
            stored = self.targets.layout.logits
            # Without a temperature, nobody reads the logits of topk.
            unread = stored is None or (temperature is None and not stored.is_complete)
            output = ViTOutput(
                logits=None if unread else self.targets.logits(temperature),
                hidden=dict(self.targets.hidden),
                features=self.targets.features,
                grid=self.network.grid,
                grids=self.network.grids,
                network=self.network,
            )
            if self.live is not None:
                self._fill(output, self.live)
            self._read[temperature] = output
        return self._read[temperature]

    def _fill(self, output: ViTOutput, live: ViTOutput) -> None:
        """Write the live answers into their rows of the stored ones."""
        pairs = [(output.logits, live.logits), (output.features, live.features)]
        pairs += [(output.hidden[i], live.hidden[i]) for i in output.hidden]
        for stored, answer in pairs:
            if stored is not None and answer is not None:
                stored[self.targets.missing] = answer.to(stored.dtype)


def blank_targets(layout: Layout, count: int, device: torch.device | str) -> Targets:
    """Return ``count`` equal records of zeros on ``device``, to try a plan without any labels."""
    one = layout.targets(np.zeros(1, layout.dtype)).to(device)
    fields = {name: value.expand(count, *value.shape[1:]) for name, value in one.fields.items()}
    return Targets(layout, fields, one.missing)
