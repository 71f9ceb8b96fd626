"""Open a source of images by its location."""

from collections.abc import Callable

from ...errors import DataError, MissingSplit
from ...messages import printable
from .archive import open_archive
from .base import ImageSource, Split, check_classes
from .builtin import open_builtin
from .folder import open_folder
from .table import open_hub, open_table

SOURCES: tuple[Callable[[str, Split], ImageSource | None], ...] = (
    open_builtin,
    open_hub,
    open_archive,
    open_table,
    open_folder,
)
"""Tried in this order; each returns None for a location that is not of its kind."""


def open_source(
    location: str, split: Split, *, classes: tuple[str, ...] | None = None
) -> ImageSource:
    """Open a ``split`` of the images at ``location``; with ``classes``, it must have exactly these.

    ``location`` is one of

    * a folder ``root/{train,val}/<class>/*`` (``validation`` and ``test`` also serve as ``val``),
      or, for training without labels, a folder of images;
    * a ``.tar`` or ``.tar.gz`` that holds such a tree; it is read in place and never extracted;
    * a ``.parquet`` or ``.arrow`` file, or a folder of them, in the layout of Hugging Face
      datasets; ``hfds/NAME`` for the hub;
    * ``torchvision/NAME?root=FOLDER`` for a data set of torchvision that is already on disk.

    Raises `MissingSplit` when the split is absent or ``val`` has no labels to evaluate with,
    `DataError` when images or classes are missing or damaged, and `ConfigError` for options
    without meaning.
    """
    found = (open_kind(location, split) for open_kind in SOURCES)
    source = next((source for source in found if source is not None), None)
    if source is None:
        raise DataError(
            f"{printable(location)!r} is no folder, .tar, .parquet or .arrow file",
            "check the path",
            field="data.dir",
        )
    if len(source) == 0:
        raise DataError(f"{source.name} has no images", field="data.dir")
    if split == "val" and not source.classes:
        raise MissingSplit(
            f"{source.name} has no class folders, and evaluation needs labels",
            "put the images into one folder a class",
            field="data.dir",
        )
    if classes is not None:
        check_classes(source, classes)
    return source
