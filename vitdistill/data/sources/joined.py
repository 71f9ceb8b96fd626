"""Labelled images, and others of the same kind without labels, as one source."""

import numpy as np

from ...errors import DataError, Set
from ...keyed import I64
from ...messages import plural
from .base import ImageSource, IndirectSource, PartSource


class JoinedSource(IndirectSource):
    """The images of a labelled source, then those of another, whose labels are not read."""

    def __init__(self, labelled: ImageSource, others: ImageSource) -> None:
        self._labelled, self._others = labelled, others
        self.name = f"{labelled.name} and {others.name}"
        self.classes = labelled.classes
        self.labels = np.concatenate([labelled.labels, np.full(len(others), -1, dtype=np.int64)])
        self.sizes = np.concatenate([labelled.sizes, others.sizes])
        counts = f"{len(labelled):,} labelled images, and {len(others):,} without labels"
        self.notes = (*labelled.notes, *others.notes, f"{counts} in {others.name}")
        if others.classes:
            self.notes += (f"{others.name}: its classes are not read",)

    def place(self, i: int) -> tuple[ImageSource, int]:
        count = len(self._labelled)
        return (self._labelled, i) if i < count else (self._others, i - count)

    def key(self, i: int) -> str:
        key = super().key(i)
        return key if i < len(self._labelled) else f"unlabelled/{key}"


def join(labelled: ImageSource, others: ImageSource, val: ImageSource | None) -> ImageSource:
    """Join images without labels to the labelled ones of a run.

    Those that are also labelled or validation images are left out, with a note. Raises `DataError`
    if nothing is left.
    """
    known = (labelled,) if val is None else (labelled, val)
    copies = np.unique(np.concatenate([find_copies(others, source) for source in known]))
    if len(copies):
        kept = np.setdiff1d(np.arange(len(others), dtype=np.int64), copies)
        what = f"{len(copies):,} of {plural(len(others), 'image')} of {others.name} are labelled or"
        if not len(kept):
            what = f"{what} validation images too, which leaves none"
            raise DataError(what, Set("data.unlabelled", "none"), field="data.unlabelled")
        others = PartSource(others, kept)
        others.notes += (f"{what} validation images too, and left out",)
    return JoinedSource(labelled, others)


def find_copies(source: ImageSource, of: ImageSource) -> I64:
    """Return which images of ``source`` are in ``of`` too, whatever their names are."""
    alike = np.intersect1d(source.sizes, of.sizes)  # only these are read
    known = {of.digest(i) for i in np.flatnonzero(np.isin(of.sizes, alike)).tolist()}
    ours = np.flatnonzero(np.isin(source.sizes, alike)).tolist()
    return np.array([i for i in ours if source.digest(i) in known], dtype=np.int64)
