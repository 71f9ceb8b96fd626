"""A checksum of each training view, by which a stored label knows the view it was made for.

It covers the uint8 pixels of the view, before normalisation, and the whole numbers that say what is
done to them afterwards: the erased box, the partner, weight and box of mixing. Not the normalised
or mixed pixels themselves, whose last bits differ between devices.
"""

import zlib

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from torch import Tensor

from ... import keyed
from ...keyed import I64, Stream
from .erasing import erased_boxes
from .mixing import Mixing


def view_checksums(
    pixels: UInt8[Tensor, "B 3 H W"],
    reprob: float,
    mixing: Mixing | None,
    seed: int,
    sample_ids: I64,
    views: I64,
) -> npt.NDArray[np.uint32]:
    """CRC-32 of each view, uint32 (B,); ``pixels`` on the host, ids and views int64 (B,),
    neighbours being partners if ``mixing``.
    """
    height, width = pixels.shape[2:]
    done: list[npt.NDArray[np.int64]] = []
    if reprob:
        done.append(erased_boxes(reprob, seed, sample_ids, views, height, width))
    if mixing is not None:
        pairs = sample_ids.reshape(-1, 2)
        lam, cut, boxes = mixing.draw(
            keyed.keys(seed, views[::2], pairs.min(axis=1), Stream.MIX), height, width
        )
        weight = np.rint(lam * 2**20).astype(
            np.int64
        )  # a weight's last bits are the library's business
        shared = np.concatenate(
            [weight[:, None], cut[:, None].astype(np.int64), boxes * cut[:, None]], axis=1
        )
        done += [pairs[:, ::-1].reshape(-1, 1), np.repeat(shared, 2, axis=0)]
    images = pixels.contiguous().numpy()
    if not done:
        return np.fromiter((zlib.crc32(image) for image in images), np.uint32, len(images))
    numbers = np.ascontiguousarray(np.concatenate(done, axis=1), dtype="<i8")
    return np.fromiter(
        (zlib.crc32(row, zlib.crc32(image)) for image, row in zip(images, numbers, strict=True)),
        np.uint32,
        len(images),
    )
