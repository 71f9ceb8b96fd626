"""The one way an image file becomes RGB pixels: teacher and student, training and evaluation, all
read images here.

Rules, each tested: 16-bit grey is divided by 257 (a plain conversion would clip it to white);
transparency is composited on white; CMYK is converted; an animation gives its first frame; the EXIF
orientation is applied (an unreadable EXIF block counts as absent); colour profiles are ignored;
floating point and 32-bit pixels are refused, because their white level is unknown. Images above
`MAX_PIXELS` are refused from their header, before any pixel is decoded. A truncated file is an
error, never half an image.
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from ..errors import DataError, PermissionDenied
from ..messages import printable

MAX_PIXELS = 64 * 1024 * 1024
"""Largest image that is decoded, in pixels."""

_ORIENTATION = 0x0112
_ROTATED = (5, 6, 7, 8)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_REPLACE = "replace the file by a whole one of the same name and run the same command again."


def decode_image(data: bytes | str | os.PathLike[str], name: str | None = None) -> Image.Image:
    """An image file's content (bytes, or the path of one) as an RGB image; ``name`` is what errors
    call it.

    Raises `DataError` for anything that is not a whole, readable image, and `PermissionDenied` for
    an unreadable file.
    """
    content, name = _content(data, name)
    file = _open(content, name)
    turn = _TURNS.get(_orientation(file))
    try:
        file.load()
        image = _to_rgb(file, name)
        if turn is not None:
            image = image.transpose(turn)
    except DataError:
        raise
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError and more
        # on damaged files.
        raise DataError(
            f"{name}: the image is damaged or cut short ({_reason(error)}); {_REPLACE}"
        ) from error
    return image


def image_size(data: bytes | str | os.PathLike[str], name: str | None = None) -> tuple[int, int]:
    """(width, height) that `decode_image` would give, read from the header alone. Raises as
    `decode_image`.
    """
    if isinstance(data, bytes):
        content, name = _content(data, name)
        image = _open(content, name)
        return _upright(image)
    path = os.fspath(data)
    name = name or printable(path)
    if _file_size(path, name) == 0:
        raise DataError(_empty(name))
    with open(path, "rb") as file, _open(file, name, file.read(64)) as image:
        return _upright(image)


def _upright(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in _ROTATED else (width, height)


def _file_size(path: str, name: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise _unreadable(error, name) from error


def _unreadable(error: OSError, name: str) -> DataError | PermissionDenied:
    if isinstance(error, PermissionError):
        return PermissionDenied(
            f"{name}: no permission to read this image; change its mode or run as its owner."
        )
    return DataError(f"{name}: the image cannot be read ({error.strerror or error}).")


def _empty(name: str) -> str:
    return f"{name}: the image file is empty (0 bytes); {_REPLACE}"


def _content(data: bytes | str | os.PathLike[str], name: str | None) -> tuple[bytes, str]:
    if isinstance(data, bytes):
        content, name = data, name or "image"
    else:
        name = name or printable(os.fspath(data))
        try:
            content = Path(data).read_bytes()
        except OSError as error:
            raise _unreadable(error, name) from error
    if not content:
        raise DataError(_empty(name))
    return content, name


def _open(content: bytes | io.BufferedReader, name: str, head: bytes = b"") -> ImageFile.ImageFile:
    head = content[:64] if isinstance(content, bytes) else head
    try:
        image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{name}: the image has more than {MAX_PIXELS >> 20} megapixels; make it smaller first."
        ) from error
    except Exception as error:
        if head.lstrip()[:1] == b"<":
            raise DataError(
                f"{name}: this is a web page or markup, not an image; {_REPLACE}"
            ) from error
        raise DataError(f"{name}: not an image in a known format; {_REPLACE}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: {width} x {height} pixels is more than {MAX_PIXELS >> 20} megapixels; make it"
            " smaller first."
        )
    return image


def _reason(error: Exception) -> str:
    text = printable(" ".join(str(error).split()))
    return (text or type(error).__name__)[:120]


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _from_sixteen_bits(image)
    if image.mode in _ALPHA or (image.mode in _PLAIN and "transparency" in image.info):
        return _on_white(image)
    if image.mode in _PLAIN:
        return image.convert("RGB")
    raise DataError(
        f"{name}: pixels of mode {image.mode!r} have no known white level; convert the image to 8"
        " or 16 bits first."
    )


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    grey = (values + 128) // 257
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    colours = image.convert("RGBA")
    white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, colours).convert("RGB")
