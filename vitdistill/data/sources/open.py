"""Open a source of images by its location."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ... import keyed
from ...errors import ConfigError, DataError, MissingSplit, Set
from ...messages import listed
from .archive import open_archive
from .base import ImageSource, PartSource, Split, renumber
from .builtin import open_builtin
from .folder import open_folder
from .table import open_hub, open_table

_Open = Callable[[str, Split], ImageSource | None]
SOURCES: tuple[_Open, ...] = (open_builtin, open_hub, open_archive, open_table, open_folder)
"""Tried in this order; each returns None for a location that is not of its kind."""


def open_source(
    location: str,
    split: Split,
    *,
    classes: tuple[str, ...] | None = None,
    val_split: float | None = None,
) -> ImageSource:
    """Open a ``split`` of the images at ``location``; ``classes`` number its labels, if given.

    See docs/images.md for ``location``. ``val_split`` is the fraction of each class's training
    images to hold out for validation, if there are no validation images.

    Raises `MissingSplit` when the split is absent or ``val`` has no labels to evaluate with,
    `DataError` when images or classes are missing or damaged, and `ConfigError` for options
    without meaning.
    """
    if val_split is None:
        source = _open(location, split)
    else:
        try:
            _open(location, "val")
        except MissingSplit:
            source = _split_off(_open(location, "train"), val_split, split)
        else:
            what = f"val_split has no effect: {location} has validation images"
            raise ConfigError(what, Set("data.val_split", "none"), field="data.val_split")
    if len(source) == 0:
        what = "; ".join((f"{source.name} has no images", *source.notes))
        raise DataError(what, field="data.dir")
    if split == "val" and not source.classes:
        what = f"{source.name} has no class folders, and evaluation needs labels"
        raise MissingSplit(what, "put the images into one folder a class", field="data.dir")
    if classes is not None:
        renumber(source, classes)
    return source


def _open(location: str, split: Split) -> ImageSource:
    found = (open_kind(location, split) for open_kind in SOURCES)
    source = next((source for source in found if source is not None), None)
    if source is None:
        what = f"{location!r} is no folder, .tar, .parquet or .arrow file"
        fix = "unpack it into a folder" if Path(location).is_file() else "check the path"
        raise DataError(what, fix, field="data.dir")
    if len(set(source.classes)) < len(source.classes):
        twice = [name for name in set(source.classes) if source.classes.count(name) > 1]
        raise DataError(f"{source.name} has two classes of one name ({listed(sorted(twice))})")
    return source


def _split_off(whole: ImageSource, fraction: float, split: Split) -> ImageSource:
    """Return the training or the validation part of images: the same for every seed."""
    order = keyed.permutation(0, 0, len(whole), keyed.Stream.SPLIT)
    by_class = order[np.argsort(whole.labels[order], kind="stable")]
    counts = np.bincount(whole.labels + 1)
    groups = np.split(by_class, np.cumsum(counts)[:-1])
    # At least one image of a class for either part, where it has two.
    taken = [g[: min(max(round(fraction * len(g)), 1), len(g) - 1)] for g in groups if len(g)]
    chosen = np.sort(np.concatenate([*taken, order[:0]]))
    if split == "train":
        chosen = np.setdiff1d(np.arange(len(whole), dtype=np.int64), chosen)
    part = PartSource(whole, chosen)
    part.name = f"{whole.name} ({split} part)"
    return part
