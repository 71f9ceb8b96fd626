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
from vitdistill.keyed import F64, Stream

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
ANY_MODE = st.sampled_from(sorted(MODES))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), interpolation=ANY_MODE)
def test_resize_boxes_is_pillows(picture, stack, data, interpolation: str) -> None:
    width, height = data.draw(st.integers(8, 60)), data.draw(st.integers(8, 60))
    size = (data.draw(st.integers(4, 50)), data.draw(st.integers(4, 50)))
    images = [picture(i, (width, height)) for i in range(3)]
    boxes = []
    for _ in images:
        h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
        boxes.append((top, left, h, w))
    got = resize_boxes(stack(images), torch.tensor(boxes), size, interpolation)
    for image, box, ours in zip(images, boxes, got, strict=True):
        rows_first = TF.crop(image, *box).resize((size[1], box[2]), PILLOW[interpolation])
        theirs = rows_first.resize(size[::-1], PILLOW[interpolation])
        assert torch.equal(ours, TF.pil_to_tensor(theirs)), box
        either = TF.pil_to_tensor(TF.resized_crop(image, *box, size, MODES[interpolation]))
        assert (ours.int() - either.int()).abs().max() <= 2, box


@settings(max_examples=40, deadline=None)
@given(data=st.data(), padding=st.integers(0, 6))
def test_crop_and_flip_is_torchvisions(picture, stack, data, padding: int) -> None:
    images = [picture(i, (11, 9)) for i in range(4)]
    place = st.tuples(*[st.integers(0, 2 * padding)] * 2, st.integers(0, 1))
    offsets = [data.draw(place) for _ in images]
    got = crop_and_flip(stack(images), *torch.tensor(offsets).T, padding)
    for image, (t, x, f), ours in zip(images, offsets, got, strict=True):
        padded = TF.crop(TF.pad(image, padding), t, x, 9, 11)
        assert torch.equal(ours, TF.pil_to_tensor(TF.hflip(padded) if f else padded))


@settings(max_examples=60, deadline=None)
@given(
    matrix=st.tuples(*[*[st.floats(-1.5, 1.5)] * 2, st.floats(-20, 20)] * 2), interpolation=ANY_MODE
)
def test_affine_is_pillows(picture, stack, matrix: tuple[float, ...], interpolation: str) -> None:
    image, fill = picture(0, (19, 14)), (124, 116, 104)
    matrices = torch.tensor([matrix], dtype=torch.float64)
    ours = affine(stack([image]), matrices, torch.tensor(fill, dtype=torch.uint8), interpolation)
    mode, affinely = PILLOW[interpolation], Image.Transform.AFFINE
    theirs = image.transform(image.size, affinely, matrix, mode, fillcolor=fill)
    assert torch.equal(ours[0], TF.pil_to_tensor(theirs))


def draws(count: int) -> F64:
    ids = np.arange(count, dtype=np.int64)
    return keyed.uniforms(keyed.keys(0, 0, ids, Stream.CROP), CROP_UNIFORMS)


def test_boxes_have_timms_distribution() -> None:
    """On a wide image, where the fallback happens too."""
    height, width, count = 40, 100, 20000
    scale, ratio = (0.3, 1.0), (3 / 4, 4 / 3)
    ours = np.stack(random_boxes(draws(count), height, width, scale, ratio), axis=1)
    random.seed(0)
    image, box = Image.new("RGB", (width, height)), RandomResizedCropAndInterpolation.get_params
    theirs = np.array([box(image, scale, ratio) for _ in range(count)])
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.4
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 0.4
    whole = (0, 23, 40, 53)
    assert abs((ours == whole).all(1).mean() - (theirs == whole).all(1).mean()) < 0.02


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 50), (50, 2), (3, 3), (40, 100)])
def test_boxes_lie_in_the_image(height: int, width: int) -> None:
    top, left, h, w = random_boxes(draws(500), height, width, (0.08, 1.0), (3 / 4, 4 / 3))
    assert min(h.min(), w.min()) >= 1 and min(top.min(), left.min()) >= 0
    assert (top + h).max() <= height and (left + w).max() <= width
