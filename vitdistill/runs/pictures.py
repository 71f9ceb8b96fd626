"""A sheet of pictures: what objectives have to show of a few images, one row a kind."""

from collections.abc import Mapping
from io import BytesIO

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from ..data.augment import InputSpec

NUM_PICTURES = 8
SMALLEST = 96
"""Pixels a side below which images are enlarged, so that there is something to see."""

_MARGIN, _GAP = 130, 6


def draw_sheet(rows: Mapping[str, Float[Tensor, "B 3 h w"]], spec: InputSpec) -> Image.Image:
    """One row a name: its images side by side, back from the network's normalisation to pixels."""
    pixels = {name: _to_pixels(images, spec) for name, images in rows.items()}
    height, width = spec.image_size
    scale = max(1, -(-SMALLEST // min(height, width)))
    size = (width * scale, height * scale)
    count = max(len(images) for images in pixels.values())
    sheet = Image.new(
        "RGB", (_MARGIN + count * (size[0] + _GAP), len(pixels) * (size[1] + _GAP) + _GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for r, (name, images) in enumerate(pixels.items()):
        top = _GAP + r * (size[1] + _GAP)
        draw.text((8, top + size[1] / 2 - 9), name, fill="black", font_size=16)
        for i, image in enumerate(images.numpy()):
            sheet.paste(
                Image.fromarray(image).resize(size, Image.Resampling.NEAREST),
                (_MARGIN + i * (size[0] + _GAP), top),
            )
    return sheet


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _to_pixels(images: Float[Tensor, "B 3 h w"], spec: InputSpec) -> UInt8[Tensor, "B h w 3"]:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (
        ((images.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    )
