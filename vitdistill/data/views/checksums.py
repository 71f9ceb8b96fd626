"""A checksum of each training view, by which a stored label knows the view it was made for.

It covers the uint8 pixels of the view, before normalisation, and the whole numbers that say what is
done to them afterwards: the erased box, and the partner, weight and box of mixing. Normalised or
mixed pixels are left out, because their last bits differ between devices.
"""

import zlib

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from torch import Tensor

from ...keyed import I64
from ..augment import Augment
from ..order import Samples
from .erasing import erased_boxes
from .mixing import draw_mixing


def view_checksums(
    pixels: UInt8[Tensor, "B 3 H W"], augment: Augment, shown: Samples
) -> npt.NDArray[np.uint32]:
    """Return the CRC-32 of each view, uint32 (B,).

    ``pixels`` are on the host; if ``augment`` mixes, neighbours are partners.
    """
    height, width = pixels.shape[2:]
    done: list[I64] = []
    if augment.reprob:
        done.append(erased_boxes(augment.reprob, shown, height, width))
    if augment.mixes:
        lam, cut, boxes = draw_mixing(augment, shown, height, width)
        # Rounded: a weight's last bits depend on the numeric library.
        weight = np.rint(lam * 2**20).astype(np.int64)
        shared = [weight[:, None], cut[:, None].astype(np.int64), boxes * cut[:, None]]
        partners = shown.ids.reshape(-1, 2)[:, ::-1].reshape(-1, 1)
        done += [partners, np.repeat(np.concatenate(shared, axis=1), 2, axis=0)]
    images = pixels.contiguous().numpy()
    sums = [zlib.crc32(image) for image in images]
    if done:
        numbers = np.ascontiguousarray(np.concatenate(done, axis=1), dtype="<i8")
        sums = [zlib.crc32(row, before) for row, before in zip(numbers, sums, strict=True)]
    return np.array(sums, dtype=np.uint32)
