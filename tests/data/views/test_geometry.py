"""Batched geometry against Pillow and torchvision, pixel for pixel."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from vitdistill import keyed
from vitdistill.data.views.geometry import (
    CROP_UNIFORMS,
    affine,
    crop_and_flip,
    random_boxes,
    resize_boxes,
)
from vitdistill.keyed import Stream

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), interpolation=st.sampled_from(["bilinear", "bicubic"]))
def test_resize_boxes_is_pillows(picture, stack, data, interpolation: str) -> None:
    width, height = data.draw(st.integers(8, 60)), data.draw(st.integers(8, 60))
    size = (data.draw(st.integers(4, 50)), data.draw(st.integers(4, 50)))
    images = [picture(i, (width, height)) for i in range(3)]
    boxes = []
    for _ in images:
        h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        boxes.append(
            (data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w)
        )
    got = resize_boxes(stack(images), torch.tensor(boxes), size, interpolation)
    for image, box, ours in zip(images, boxes, got, strict=True):
        rows_first = TF.crop(image, *box).resize((size[1], box[2]), PILLOW[interpolation])
        assert torch.equal(
            ours, TF.pil_to_tensor(rows_first.resize(size[::-1], PILLOW[interpolation]))
        ), box
        either = TF.pil_to_tensor(TF.resized_crop(image, *box, size, MODES[interpolation]))
        assert (ours.int() - either.int()).abs().max() <= 2, box


@settings(max_examples=40, deadline=None)
@given(data=st.data(), padding=st.integers(0, 6))
def test_crop_and_flip_is_torchvisions(picture, stack, data, padding: int) -> None:
    images = [picture(i, (11, 9)) for i in range(4)]
    offsets = [
        data.draw(st.tuples(*[st.integers(0, 2 * padding)] * 2, st.integers(0, 1))) for _ in images
    ]
    top, left, flip = torch.tensor(offsets).T
    got = crop_and_flip(stack(images), top, left, flip, padding)
    for image, (t, x, f), ours in zip(images, offsets, got, strict=True):
        padded = TF.crop(TF.pad(image, padding), t, x, 9, 11)
        assert torch.equal(ours, TF.pil_to_tensor(TF.hflip(padded) if f else padded))


@settings(max_examples=60, deadline=None)
@given(
    matrix=st.tuples(
        *[st.floats(-1.5, 1.5)] * 2,
        st.floats(-20, 20),
        *[st.floats(-1.5, 1.5)] * 2,
        st.floats(-20, 20),
    ),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_affine_is_pillows(picture, stack, matrix: tuple[float, ...], interpolation: str) -> None:
    images = [picture(i, (19, 14)) for i in range(2)]
    fill = (124, 116, 104)
    got = affine(
        stack(images),
        torch.tensor([matrix] * 2, dtype=torch.float64),
        torch.tensor(fill, dtype=torch.uint8),
        interpolation,
    )
    for image, ours in zip(images, got, strict=True):
        theirs = image.transform(
            image.size, Image.Transform.AFFINE, matrix, PILLOW[interpolation], fillcolor=fill
        )
        assert (ours.int() - TF.pil_to_tensor(theirs).int()).abs().max() == 0


def test_boxes_have_timms_distribution() -> None:
    """Means and spreads of 20,000 boxes against as many of timm's, on a wide image where the
    fallback happens too.
    """
    height, width, count = 40, 100, 20000
    scale, ratio = (0.3, 1.0), (3 / 4, 4 / 3)
    keys = keyed.keys(0, 0, np.arange(count, dtype=np.int64), Stream.CROP)
    ours = np.stack(
        random_boxes(keyed.uniforms(keys, CROP_UNIFORMS), height, width, scale, ratio), axis=1
    )
    random.seed(0)
    image = Image.new("RGB", (width, height))
    theirs = np.array(
        [RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(count)]
    )
    top, left, h, w = ours.T
    assert min(top.min(), left.min()) >= 0
    assert (top + h).max() <= height and (left + w).max() <= width
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.4
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 0.4
    whole = (0, 23, 40, 53)
    assert abs((ours == whole).all(1).mean() - (theirs == whole).all(1).mean()) < 0.02


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 50), (50, 2), (3, 3)])
def test_tiny_images_still_have_boxes(height: int, width: int) -> None:
    draws = keyed.uniforms(
        keyed.keys(0, 0, np.arange(500, dtype=np.int64), Stream.CROP), CROP_UNIFORMS
    )
    top, left, h, w = random_boxes(draws, height, width, (0.08, 1.0), (3 / 4, 4 / 3))
    assert min(h.min(), w.min()) >= 1
    assert (top + h).max() <= height and (left + w).max() <= width
