"""Views: settings that mean something, pure functions of their address, and timm's semantics."""

import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional as TF

from vitdistill import keyed
from vitdistill.data.augment import AUGMENTS, Augment, InputSpec
from vitdistill.data.views.single import (
    eval_view,
    keep_generators,
    normalize,
    seed_generators,
    train_views,
)

SPEC = InputSpec((32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def train_view(
    image: Image.Image, augment: Augment, spec: InputSpec, seed: int, view: int, sample_id: int
) -> torch.Tensor:
    views, ids = np.array([view], dtype=np.int64), np.array([sample_id], dtype=np.int64)
    return train_views(lambda _: image, augment, spec, seed, views, ids)[0]


def test_views_of_one_image_are_pure(picture) -> None:
    augment = replace(AUGMENTS["deit"], color_jitter=0.0)
    image = picture(3, (50, 41))
    base = train_view(image, augment, SPEC, 1, 2, 3)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert torch.equal(base, train_view(image, augment, SPEC, 1, 2, 3))
    others = [
        train_view(image, augment, SPEC, *address) for address in ((0, 2, 3), (1, 0, 3), (1, 2, 0))
    ]
    assert all(not torch.equal(base, other) for other in others)


def test_several_views_are_the_single_ones(picture) -> None:
    augment, ids, views = (
        AUGMENTS["deit"],
        np.array([3, 0, 3], dtype=np.int64),
        np.array([1, 1, 2], dtype=np.int64),
    )
    together = train_views(picture, augment, SPEC, 4, views, ids)
    for i, view, got in zip(ids.tolist(), views.tolist(), together, strict=True):
        assert torch.equal(got, train_view(picture(i), augment, SPEC, 4, view, i))


def test_the_callers_generators_are_left_alone(picture) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    whole = io.BytesIO()
    picture(0).save(whole, "PNG")
    cut_short = whole.getvalue()[:300]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    train_view(picture(0), AUGMENTS["deit"], SPEC, 0, 0, 0)
    with pytest.raises(OSError):
        train_view(Image.open(io.BytesIO(cut_short)), AUGMENTS["deit"], SPEC, 0, 0, 0)
    assert draw() == wanted


def test_the_transform_is_timms(picture) -> None:
    """Under one seed our pipeline of single images gives timm's pixels."""
    augment = AUGMENTS["deit"]
    options = {"interpolation": "bicubic", "mean": SPEC.mean, "std": SPEC.std, "color_jitter": 0.0}
    theirs = create_transform(32, is_training=True, auto_augment=augment.aa, **options)
    for i in range(20):
        image = picture(i, (48, 40))
        with keep_generators():
            seed_generators(keyed.library_seeds(0, 1, i)[0])
            expected = theirs(image)
        found = train_view(image, augment, SPEC, 0, 1, i)
        assert torch.equal(normalize(found[None], SPEC)[0], expected)


def test_zero_bits_of_posterize_do_not_raise(picture) -> None:
    """A magnitude of 10 asks timm for 0 bits; the image turns black, whichever policy keeps the
    operation.
    """
    augment = Augment(crop="center", hflip=0.0, aa="rand-m10-n1-p1.0-inc1")
    images = [train_view(picture(0), augment, SPEC, 0, 0, i) for i in range(120)]
    black = sum(int(image.max()) == 0 for image in images)
    assert 1 <= black <= 25
    policies = (
        "rand-m0-p1.0-n4",
        "v0-mstd9",
        "augmix-m10-w2",
        "rand-m9-tweights",
        "original",
        "3a",
    )
    for aa in policies:
        for i in range(60):
            view = train_view(picture(0), Augment(aa=aa), SPEC, 0, 0, i)
            assert view.shape == (3, 32, 32) and view.dtype == torch.uint8


def test_small_recipe_on_single_images_crops_and_flips(picture) -> None:
    image = picture(0)
    padded = TF.pil_to_tensor(TF.pad(image, 4))
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    windows = torch.cat([windows, windows.flip(-1)])
    seen = set()
    for i in range(40):
        view = train_view(image, AUGMENTS["small"], SPEC, 0, 0, i)
        match = (windows == view).flatten(1).all(1).nonzero().flatten().tolist()
        assert len(match) == 1
        seen.add(match[0])
    assert len(seen) > 25


@pytest.mark.parametrize("size", [(32, 32), (28, 40), (100, 37)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("image_size", [(32, 32), (24, 48)])
def test_the_evaluation_crop_is_timms(picture, size, mode, image_size):
    spec = InputSpec(image_size, SPEC.mean, SPEC.std, "bicubic", 0.9, mode)
    image = picture(1, size)
    options = {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": mode}
    wanted = create_transform((3, *image_size), mean=spec.mean, std=spec.std, **options)(image)
    found = eval_view(image, spec)
    assert torch.equal(normalize(found[None], spec)[0], wanted)
    assert torch.equal(train_view(image, AUGMENTS["none"], spec, 0, 0, 0), found)
