"""Sheets of pictures: what objectives have to show of a few images, and what teachers see."""

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import accumulate

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from ..data.augment import InputSpec

NUM_PICTURES = 8
SMALLEST = 96  # pixels a side below which images are enlarged
MARGIN, GAP = 130, 6  # pixels left of the images, for the rows' names, and between them


def size_in_sheet(spec: InputSpec) -> tuple[int, int]:
    """Return height and width of an image in a sheet, pixels."""
    scale = max(1, -(-SMALLEST // min(spec.image_size)))
    return scale * spec.image_size[0], scale * spec.image_size[1]


def draw_sheet(rows: Mapping[str, Float[Tensor, "B 3 h w"]], spec: InputSpec) -> Image.Image:
    """Draw a row for each name: its images side by side, their normalisation undone."""
    pixels = {name: _to_pixels(images, spec) for name, images in rows.items()}
    height, width = size_in_sheet(spec)
    count = max(len(images) for images in pixels.values())
    size = (MARGIN + count * (width + GAP), len(pixels) * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for r, (name, images) in enumerate(pixels.items()):
        top = GAP + r * (height + GAP)
        middle = top + height / 2 - 9 * len(name.splitlines())
        draw.text((8, middle), name, fill="black", font_size=16)
        for i, image in enumerate(images.numpy()):
            enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (MARGIN + i * (width + GAP), top))
    return sheet


def stack(bands: Sequence[Image.Image]) -> Image.Image:
    """Stack sheets vertically into one."""
    tops = [*accumulate((band.height for band in bands), initial=0)]
    whole = Image.new("RGB", (bands[0].width, tops[-1]), "white")
    for band, top in zip(bands, tops, strict=False):
        whole.paste(band, (0, top))
    return whole


def write_below(sheet: Image.Image, said: Sequence[Mapping[str, list[str]]]) -> Image.Image:
    """Return the sheet with the text on each image written below it."""
    size, width = 12, (sheet.width - MARGIN) // len(said)
    columns = [
        "\n".join(
            textwrap.fill(part, max(width // 7, 8))
            for name, found in words.items()
            for part in (f"{name}:", *found)
        )
        for words in said
    ]
    height = max((text.count("\n") + 1) * (size + 4) + 6 for text in columns) * any(columns)
    whole = Image.new("RGB", (sheet.width, sheet.height + height), "white")
    whole.paste(sheet)
    for i, text in enumerate(columns):
        place = MARGIN + i * width, sheet.height
        draw = ImageDraw.Draw(whole)
        draw.multiline_text(place, text, fill="black", font_size=size, spacing=4)
    return whole


def png(image: Image.Image) -> bytes:
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _to_pixels(images: Float[Tensor, "B 3 h w"], spec: InputSpec) -> UInt8[Tensor, "B h w 3"]:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1) * 255
    return pixels.round().byte().permute(0, 2, 3, 1)
