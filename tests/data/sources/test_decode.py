"""Decoding: every kind of image reads right, every damaged one is named, and nothing is decoded
twice differently.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vitdistill.data.sources.decode import MAX_PIXELS, DamagedImage, decode_image, image_size
from vitdistill.errors import DataError, PermissionDenied

GREY = np.linspace(0, 65535, 20 * 30).reshape(20, 30)
LOSSLESS = {"WEBP": {"lossless": True}}


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **LOSSLESS.get(kind, {}), **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data, "x")
    assert image.mode == "RGB" and image.size == image_size(data, "x")
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM"])
def test_sixteen_bit_grey_is_scaled_and_not_white(kind):
    if kind == "PGM":
        data = b"P5 30 20 65535\n" + GREY.astype(">u2").tobytes()
    else:
        data = encoded(Image.fromarray(GREY.astype(np.uint16)), kind)
    assert (pixels(data) == np.rint(np.trunc(GREY) / 257)[..., None]).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_composited_on_white(kind: str) -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[..., 0] = 200
    rgba[:2, :, 3] = 255
    rgba[2, :, 3] = 128
    got = pixels(encoded(Image.fromarray(rgba), kind))
    assert (got[0] == (200, 0, 0)).all() and (got[3] == 255).all()
    assert np.abs(got[2] - (227, 127, 127)).max() <= 1
    grey_alpha = Image.merge("LA", [Image.new("L", (4, 4), 10), Image.new("L", (4, 4), 0)])
    assert (pixels(encoded(grey_alpha, kind)) == 255).all()


def test_palettes_and_transparent_colours() -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    plain = pixels(encoded(image, "PNG"))
    assert plain[0, 0].tolist() == [200, 100, 50] and plain[1, 1].tolist() == [10, 20, 30]
    clear = pixels(encoded(image, "PNG", transparency=0))
    assert clear[0, 0].tolist() == [200, 100, 50] and clear[1, 1].tolist() == [255, 255, 255]
    grey = Image.new("L", (2, 2), 7)
    grey.putpixel((0, 0), 9)
    got = pixels(encoded(grey, "PNG", transparency=7))
    assert got[0, 0].tolist() == [9, 9, 9] and got[1, 1].tolist() == [255] * 3
    rgb = Image.new("RGB", (2, 2), (1, 2, 3))
    assert (pixels(encoded(rgb, "PNG", transparency=(1, 2, 3))) == 255).all()


def test_other_modes() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for data in (encoded(cmyk, "JPEG", quality=95), encoded(cmyk, "TIFF")):
        got = pixels(data)
        assert got[..., 0].min() > 230 and got[..., 1:].max() < 40
    assert (pixels(encoded(Image.new("1", (9, 9), 1), "PNG")) == 255).all()
    for mode, value in (("F", 0.5), ("I", 70000)):
        data = encoded(Image.new(mode, (4, 4), value), "TIFF")
        with pytest.raises(DataError, match=f"^x: pixels of mode '{mode}'"):
            decode_image(data, "x")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels(data) == (250, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in ("PNG", "WEBP", "JPEG", "AVIF", "TIFF")),
        *(("TIFF", {"compression": how}) for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits")),
    ],
)
def test_the_orientation_is_applied_once(picture, kind, options, orientation: int) -> None:
    exif, image = Image.Exif(), picture(1, (48, 32)).resize((96, 64))
    exif[0x0112] = orientation
    got = pixels(encoded(image, kind, exif=exif, **options))
    wanted = {
        1: image,
        2: ImageOps.mirror(image),
        3: image.rotate(180),
        4: ImageOps.flip(image),
        5: ImageOps.mirror(image).rotate(90, expand=True),
        6: image.rotate(-90, expand=True),
        7: ImageOps.mirror(image).rotate(-90, expand=True),
        8: image.rotate(90, expand=True),
    }[orientation]
    assert got.shape[:2] == wanted.size[::-1]
    assert np.abs(got - np.asarray(wanted)).mean() < (20 if kind in ("JPEG", "AVIF") else 1e-9)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_counts_as_none(picture) -> None:
    unknown = Image.Exif()
    unknown[0x0112] = 9
    for exif in (b"Exif\0\0MM\0*\xff\xff\xff\xff", unknown):
        data = encoded(picture(1, (6, 4)), "JPEG", exif=exif)
        assert np.array_equal(pixels(data), pixels(encoded(picture(1, (6, 4)), "JPEG")))


EVERY_KIND = ["PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "TGA", "PPM", "ICO"]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_images_that_end_early_are_named(picture, kind: str) -> None:
    data = encoded(picture(2, (64, 64)), kind)
    lengths = range(1, len(data) - 26, len(data) // 40)  # without the footer that TGA has
    for length in lengths:
        with pytest.raises(DamagedImage, match=r"^cat/1\.img: "):
            decode_image(data[:length], "cat/1.img")


@pytest.mark.parametrize("options", [{}, {"save_all": True}, {"optimize": True}, {"exif": True}])
def test_a_flipped_bit_of_a_png_is_never_other_pixels(picture, options: dict) -> None:
    """With the orientation behind the pixels, as some programs write it, too."""
    image = picture(4, (40, 30))
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(image, "PNG", **(options | {"exif": exif} if "exif" in options else options))
    whole, refused = pixels(data), 0
    for i in range(200):
        damaged = bytearray(data)
        damaged[len(data) * i // 200] ^= 1 << i % 8
        try:
            assert np.array_equal(pixels(bytes(damaged)), whole)
        except DamagedImage:
            refused += 1
    assert refused > 190


def test_a_file_of_many_bytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(20 * 2**30)
    for read in (decode_image, image_size):
        with pytest.raises(DamagedImage, match="larger than 1 GiB"):
            read(tmp_path / "sparse.png", "sparse.png")


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>", b"hello" * 40, bytes(100), None])
def test_what_is_no_image(data: bytes | None, tmp_path: Path) -> None:
    for read in (decode_image, image_size):
        with pytest.raises(DataError, match=r"^x\.jpg: "):
            read(tmp_path / "nothere" if data is None else data, "x.jpg")


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (9400, 9400), (65535, 65535)])
def test_bombs_are_refused_from_the_header(width: int, height: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    assert width * height > MAX_PIXELS
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match=r"^bomb\.png: "):
        decode_image(b"\x89PNG\r\n\x1a\n" + data, "bomb.png")


def test_files(picture, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.png"
    picture(1, (5, 4)).save(path)
    assert decode_image(path, "a").tobytes() == picture(1, (5, 4)).tobytes()
    assert image_size(path, "a") == (5, 4)

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionDenied, match=r"^a\.png: "):
        decode_image(path, "a.png")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]),
    st.integers(0, 10**6),
    st.integers(0, 255),
)
def test_damage_gives_an_image_or_a_sentence_and_nothing_else(picture, kind, where, value):
    data = bytearray(encoded(picture(3, (24, 24)), kind))
    data[where % len(data)] = value
    try:
        assert decode_image(bytes(data), "x").mode == "RGB"
    except DataError as error:
        assert str(error).startswith("x: ") and "\n" not in str(error)
