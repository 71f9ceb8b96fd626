"""Sheets of pictures: what objectives have to show of a few images, and what teachers see."""

from collections.abc import Mapping
from io import BytesIO

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
    """Draw one row a name: its images side by side, back from the network's normalisation."""
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


def png(image: Image.Image) -> bytes:
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _to_pixels(images: Float[Tensor, "B 3 h w"], spec: InputSpec) -> UInt8[Tensor, "B h w 3"]:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1) * 255
    return pixels.round().byte().permute(0, 2, 3, 1)
