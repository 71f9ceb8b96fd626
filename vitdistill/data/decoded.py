"""Images kept in memory, decoded once, when they are few enough."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from .augment import Augment, InputSpec
from .sources.base import ImageSource
from .views.batched import can_batch
from .views.single import prepare

IN_MEMORY_BYTES = 2 * 2**30
"""Data sets of fewer decoded bytes than this are kept in memory."""


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
    limit = None if in_memory else IN_MEMORY_BYTES
    batched = can_batch(augment, spec)
    if batched and augment.crop != "rrc":
        height, width = spec.image_size
        if limit is None or len(source) * height * width * 3 < limit:
            return _decode_alike(source, augment, spec, (width, height), threads)
    sizes = _sizes_below(source, limit)
    if sizes is None:
        return source
    if batched and augment.crop == "rrc" and len(set(sizes)) == 1:
        return _decode_alike(source, augment, spec, sizes[0], threads)
    return DecodedSource(source, sizes, threads)


class DecodedSource(ImageSource):
    """A source whose images, of various sizes, are kept decoded.

    They lie in one flat array, which forked workers share.
    """

    def __init__(self, source: ImageSource, sizes: list[tuple[int, int]], threads: int) -> None:
        """Decode all images; ``sizes`` are their (width, height)."""
        self._source = source
        self.name, self.classes = source.name, source.classes
        self.labels, self.sizes = source.labels, source.sizes
        self._shapes = np.array(sizes, dtype=np.int64)
        self._ends = np.cumsum(self._shapes.prod(axis=1) * 3)
        self._pixels = np.empty(int(self._ends[-1]), dtype=np.uint8)

        def decode(i: int) -> None:
            self._slice(i)[...] = np.asarray(source.load(i))

        _for_each(decode, len(source), threads)

    def _slice(self, i: int) -> np.ndarray:
        width, height = self._shapes[i]
        end = self._ends[i]
        return self._pixels[end - width * height * 3 : end].reshape(height, width, 3)

    def key(self, i: int) -> str:
        """Return the image's name in the source that was decoded."""
        return self._source.key(i)

    def load(self, i: int) -> Image.Image:
        """Return image ``i``."""
        return Image.fromarray(self._slice(i))

    def image_size(self, i: int) -> tuple[int, int]:
        """Return (width, height)."""
        width, height = self._shapes[i]
        return int(width), int(height)


def _sizes_below(source: ImageSource, limit: int | None) -> list[tuple[int, int]] | None:
    """Read the (width, height) of every image; None when decoded they take ``limit`` bytes or more.

    A large data set is given up after the headers of its first ``limit`` bytes.
    """
    sizes, total = [], 0
    for i in range(len(source)):
        sizes.append(source.image_size(i))
        total += sizes[-1][0] * sizes[-1][1] * 3
        if limit is not None and total >= limit:
            return None
    return sizes


def _decode_alike(
    source: ImageSource, augment: Augment, spec: InputSpec, size: tuple[int, int], threads: int
) -> UInt8[Tensor, "N 3 H W"]:
    images = torch.empty((len(source), 3, size[1], size[0]), dtype=torch.uint8)

    def decode(i: int) -> None:
        images[i] = pil_to_tensor(prepare(source.load(i), augment, spec))

    _for_each(decode, len(source), threads)
    return images


def _for_each(function: Callable[[int], None], count: int, threads: int) -> None:
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        try:
            deque(pool.map(function, range(count)), maxlen=0)
        finally:
            pool.shutdown(cancel_futures=True)  # the first error ends it
