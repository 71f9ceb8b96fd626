"""Images kept in memory, decoded once, when they are few enough."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from ..errors import Set
from ..messages import listed, plural
from .augment import Augment, InputSpec
from .sources.base import ImageSource, PartSource
from .sources.decode import DamagedImage
from .views.batched import can_batch
from .views.single import prepare

IN_MEMORY_BYTES = 2 * 2**30
"""Data sets of fewer decoded bytes than this are kept in memory."""

MAX_CHECKED = 50_000
"""Of larger data sets the damaged image that is met is named alone."""

T = TypeVar("T")


def keep_decoded(
    source: ImageSource, augment: Augment, spec: InputSpec, in_memory: bool | None, threads: int
) -> UInt8[Tensor, "N 3 H W"] | ImageSource:
    """Decode a small data set with ``threads``; ``in_memory`` None means below `IN_MEMORY_BYTES`.

    Returns one tensor of prepared images where views can be made in batches, a source of decoded
    images where they are made one by one, or ``source`` itself. The choice changes pixels, so it
    depends on the data set and the options alone, never on threads, device or processes.
    """
    if in_memory is False:
        return source
    limit = math.inf if in_memory else IN_MEMORY_BYTES
    batched, (height, width) = can_batch(augment), spec.image_size
    if batched and augment.crop != "rrc" and len(source) * height * width * 3 < limit:
        return _decode_alike(source, augment, spec, (width, height), threads)
    sizes = _sizes_below(source, limit)
    if sizes is None:
        return source
    if batched and augment.crop == "rrc" and len(set(sizes)) == 1:
        return _decode_alike(source, augment, spec, sizes[0], threads)
    return DecodedSource(source, threads)


def check_images(source: ImageSource, skip_damaged: bool, threads: int) -> ImageSource:
    """Leave out images that cannot be decoded, with a note, or raise an error for empty files.

    ``skip_damaged`` chooses the first, which decodes every image once.
    """
    if not skip_damaged:
        with name_all_damaged(source, threads):
            for i in np.flatnonzero(source.sizes == 0):
                source.load(int(i))
        return source
    damaged = _find_damaged(source, threads)
    if not damaged:
        return source
    kept = PartSource(source, np.setdiff1d(np.arange(len(source), dtype=np.int64), damaged))
    kept.notes += (f"{_describe(source, damaged)}, and left out",)
    return kept


@contextmanager
def name_all_damaged(source: ImageSource, threads: int) -> Iterator[None]:
    """If the block meets a damaged image, raise an error that names all in the source."""
    try:
        yield
    except DamagedImage as first:
        damaged = _find_damaged(source, threads) if len(source) <= MAX_CHECKED else []
        if len(damaged) < 2:
            raise
        fixes = Set("data.skip_damaged", True), "replace or remove them"
        raise DamagedImage(_describe(source, damaged), fixes) from first


def _find_damaged(source: ImageSource, threads: int) -> list[int]:
    def is_damaged(i: int) -> bool:
        try:
            source.load(i)
        except DamagedImage:
            return True
        return False

    return np.flatnonzero(_map(is_damaged, len(source), threads)).tolist()


def _describe(source: ImageSource, damaged: list[int]) -> str:
    names, count = listed((source.key(i) for i in damaged), 100), plural(len(source), "image")
    return f"{len(damaged)} of {count} of {source.name} are damaged ({names})"


class DecodedSource(PartSource):
    """A source whose images, of various sizes, are kept decoded."""

    def __init__(self, source: ImageSource, threads: int) -> None:
        super().__init__(source, np.arange(len(source)))
        self._pixels = _map(lambda i: np.asarray(source.load(i)), len(source), threads)

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self._pixels[i])


def _sizes_below(source: ImageSource, limit: float) -> list[tuple[int, int]] | None:
    """Read the (width, height) of every image; None if decoded they take ``limit`` bytes or more.

    Headers are read only until that is known.
    """
    sizes, total = [], 0
    for i in range(len(source)):
        sizes.append(source.image_size(i))
        total += sizes[-1][0] * sizes[-1][1] * 3
        if total >= limit:
            return None
    return sizes


def _decode_alike(
    source: ImageSource, augment: Augment, spec: InputSpec, size: tuple[int, int], threads: int
) -> UInt8[Tensor, "N 3 H W"]:
    images = torch.empty((len(source), 3, size[1], size[0]), dtype=torch.uint8)

    def decode(i: int) -> None:
        images[i] = pil_to_tensor(prepare(source.load(i), augment, spec))

    _map(decode, len(source), threads)
    return images


def _map(function: Callable[[int], T], count: int, threads: int) -> list[T]:
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        try:
            return list(pool.map(function, range(count)))
        finally:
            pool.shutdown(cancel_futures=True)  # the first error ends it
