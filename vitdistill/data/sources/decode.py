"""The one way an image file becomes RGB pixels, for teacher and student, training and evaluation.

Rules, each tested: 16-bit grey is divided by 257 (a plain conversion would clip it to white);
transparency is composited on white; CMYK is converted; an animation gives its first frame; the
orientation in the file is applied once (an unreadable EXIF block counts as absent); colour profiles
are ignored; floating point and 32-bit pixels are refused, because their white level is unknown.
Images above `MAX_PIXELS` are refused from their header, before any pixel is decoded. A truncated
file, or one with a wrong checksum, is an error, never half an image.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ...errors import DataError, PermissionDenied, Set, UserError

MAX_PIXELS = 64 * 1024 * 1024
"""Largest image that is decoded, in pixels."""

MAX_BYTES = 2**30
"""Largest file that is decoded."""

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_REMEDY = ("replace or remove the file", Set("data.skip_damaged", True))


class DamagedImage(DataError):
    """An image that cannot be decoded."""


def decode_image(data: bytes | Path, name: str) -> Image.Image:
    """Decode a file's content, or the file at a path, as RGB; errors call it ``name``.

    Raises `DamagedImage` unless it is a whole image, and `PermissionDenied` for a file that may not
    be read.
    """
    with _opened(data, name) as image:
        if image.format == "PNG":
            # Pillow reads pixels without checking their checksums.
            with _opened(data, name) as twin:
                twin.verify()
        image.load()
        with suppress(Exception):  # an EXIF block that cannot be read
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, name)


def image_size(data: bytes | Path, name: str) -> tuple[int, int]:
    """Read the (width, height) that `decode_image` would give, from the header; raises alike."""
    with _opened(data, name) as image:
        width, height = image.size
        with suppress(Exception):
            # Pillow turns a TIFF by itself, both the header's size and the pixels.
            turn = image.getexif().get(ExifTags.Base.Orientation, 1)
            if image.format != "TIFF" and turn in (5, 6, 7, 8):
                return height, width
        return width, height


@contextmanager
def _opened(data: bytes | Path, name: str) -> Iterator[Image.Image]:
    """Open an image; any error inside the ``with`` block names it."""
    try:
        size = len(data) if isinstance(data, bytes) else os.path.getsize(data)
        if not 0 < size <= MAX_BYTES:
            state = "is larger than 1 GiB" if size else "is empty"
            raise DamagedImage(f"{name}: the file {state}", _REMEDY)
        with (
            io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file,
            Image.open(file) as image,
        ):
            width, height = image.size
            if width * height > MAX_PIXELS:
                what = f"{width} x {height} pixels is more than {MAX_PIXELS >> 20} megapixels"
                raise DamagedImage(f"{name}: {what}", "make the image smaller")
            yield image
    except UserError:
        raise
    except PermissionError as error:
        raise PermissionDenied(f"{name}: no permission to read this image") from error
    except UnidentifiedImageError as error:
        raise DamagedImage(f"{name}: not an image in a known format", _REMEDY) from error
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, a
        # DecompressionBombError and more.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        what = f"{name}: the image is damaged or cut short ({reason})"
        raise DamagedImage(what, _REMEDY) from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = (np.asarray(image).astype(np.int64) + 128) // 257
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    elif image.mode in _ALPHA or (image.mode in _PLAIN and "transparency" in image.info):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    elif image.mode not in _PLAIN:
        what = f"{name}: pixels of mode {image.mode!r} have no known white level"
        raise DamagedImage(what, "convert the image to 8 or 16 bits")
    return image.convert("RGB")
