"""Sheets of pictures: what objectives have to show of a few images, and what teachers see."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from ..data.augment import InputSpec
from ..data.loader import EvalLoader
from ..data.model_input import input_spec_of
from ..data.sources.open import open_source
from ..methods.maskedkd import select_patches
from ..vit.needs import Needs
from ..vit.patches import num_kept_patches
from ..vit.walk import run_vit
from ..weights.create import create_model

NUM_PICTURES = 8
SMALLEST = 96
"""Pixels a side below which images are enlarged, so that there is something to see."""

_MARGIN, _GAP = 130, 6


def draw_sheet(
    rows: Mapping[str, Float[Tensor, "B 3 h w"]],
    spec: InputSpec,
    margin: int = _MARGIN,
    gap: int = _GAP,
) -> Image.Image:
    """Draw one row a name: its images side by side, back from the network's normalisation."""
    pixels = {name: _to_pixels(images, spec) for name, images in rows.items()}
    height, width = (side * _scale(spec) for side in spec.image_size)
    count = max(len(images) for images in pixels.values())
    size = (margin + count * (width + gap), len(pixels) * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for r, (name, images) in enumerate(pixels.items()):
        top = gap + r * (height + gap)
        middle = top + height / 2 - 9 * len(name.splitlines())
        draw.text((8, middle), name, fill="black", font_size=16)
        for i, image in enumerate(images.numpy()):
            enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (margin + i * (width + gap), top))
    return sheet


@torch.no_grad()
def draw_choices(folder: Path, images: str, rates: Sequence[float], count: int = 10) -> Image.Image:
    """Draw a validation image of each class, and the patches a student gives its teacher.

    Args:
        folder: the student, an export.
        images: the data set.
        rates: one row each: the fraction of the patches that the teacher keeps.
        count: images, at most.
    """
    model = create_model(str(folder)).eval()
    spec, source = input_spec_of(model), open_source(images, "val")
    first = {int(label): i for i, label in reversed(list(enumerate(source.labels)))}
    chosen = [first[label] for label in sorted(first)][:count]
    batch = torch.cat([b.images for b in EvalLoader(source, spec, batch_size=256)])[chosen]
    output = run_vit(model, batch, Needs(attention=frozenset({-1})))
    (attention,) = output.attention.values()
    columns, total = output.grid[1], output.grid[0] * output.grid[1]
    kept = {rate: num_kept_patches(total, rate) for rate in rates}
    names = {
        rate: f"teacher at {rate * 100:g} %\n{n} of {total} patches" for rate, n in kept.items()
    }
    rows = {f"the student sees\n{total} of {total} patches": batch}
    rows |= dict.fromkeys(names.values(), batch)
    margin, gap, scale = 190, 8, _scale(spec)
    sheet = draw_sheet(rows, spec, margin, gap)
    draw, patch = ImageDraw.Draw(sheet), spec.image_size[0] // output.grid[0] * scale
    size = spec.image_size[0] * scale
    for r, number in enumerate(kept.values(), 1):
        seen = select_patches(attention, number, output.num_prefix_tokens).tolist()
        for i, indices in enumerate(seen):
            for y, x in (divmod(index, columns) for index in {*range(total)} - {*indices}):
                left = margin + i * (size + gap) + x * patch
                top = gap + r * (size + gap) + y * patch
                box = (left, top, left + patch - 1, top + patch - 1)
                draw.rectangle(box, fill="#d8dde6", outline="#c4cbd8")
    return sheet


def _scale(spec: InputSpec) -> int:
    return max(1, -(-SMALLEST // min(spec.image_size)))


def png(image: Image.Image) -> bytes:
    """Return the image as a PNG file."""
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _to_pixels(images: Float[Tensor, "B 3 h w"], spec: InputSpec) -> UInt8[Tensor, "B h w 3"]:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (
        ((images.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    )
