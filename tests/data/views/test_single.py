"""Views of single images: pure functions of their address, with timm's semantics."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torchvision.transforms import functional as TF

from vitdistill import keyed
from vitdistill.data.augment import AUGMENTS, Augment, InputSpec
from vitdistill.data.order import Samples
from vitdistill.data.views.single import (
    eval_view,
    keep_generators,
    normalize,
    posterize,
    seed_generators,
    train_views,
)

SPEC = InputSpec((32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEIT = AUGMENTS["deit"]


def train_view(
    image: Image.Image, augment: Augment, spec: InputSpec, seed: int, view: int, sample_id: int
) -> torch.Tensor:
    views, ids = np.array([view], dtype=np.int64), np.array([sample_id], dtype=np.int64)
    return train_views(lambda _: image, augment, spec, Samples(ids, views, seed))[0]


def test_views_are_pure_and_alone_as_together(picture) -> None:
    ids, views = np.array([3, 0, 3], dtype=np.int64), np.array([1, 1, 2], dtype=np.int64)
    together = train_views(picture, DEIT, SPEC, Samples(ids, views, seed=4))
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    for i, view, got in zip(ids.tolist(), views.tolist(), together, strict=True):
        assert torch.equal(got, train_view(picture(i), DEIT, SPEC, 4, view, i))
    base = train_view(picture(3), DEIT, SPEC, 1, 2, 3)
    for address in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.equal(base, train_view(picture(3), DEIT, SPEC, *address))


def test_the_callers_generators_are_left_alone(picture) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    def fail(_: int) -> Image.Image:
        raise OSError

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    train_view(picture(0), DEIT, SPEC, 0, 0, 0)
    with pytest.raises(OSError):
        train_views(fail, DEIT, SPEC, Samples(*np.zeros((2, 1), dtype=np.int64)))
    assert draw() == wanted


def test_the_transform_is_timms(picture) -> None:
    """Under one seed our pipeline of single images gives timm's pixels."""
    options = {"interpolation": "bicubic", "mean": SPEC.mean, "std": SPEC.std, "color_jitter": 0.0}
    theirs = create_transform(32, is_training=True, auto_augment=DEIT.aa, **options)
    for i in range(20):
        image = picture(i, (48, 40))
        with keep_generators():
            seed_generators(keyed.library_seeds(0, 1, i)[0])
            expected = theirs(image)
        found = train_view(image, DEIT, SPEC, 0, 1, i)
        assert torch.equal(normalize(found[None], SPEC)[0], expected)


def test_posterize_is_pillows_and_black_at_zero_bits(picture) -> None:
    for bits in range(1, 9):
        theirs = ImageOps.posterize(picture(1), bits)
        assert posterize(picture(1), bits).tobytes() == theirs.tobytes()
    assert np.asarray(posterize(picture(1), 0)).max() == 0


POLICIES = ["rand-m0-p1.0-n4", "v0-mstd9", "augmix-m10-w2", "rand-m9-tweights", "original", "3a"]


@pytest.mark.parametrize("aa", [*POLICIES, "rand-m10-n1-p1.0-inc1"])
def test_zero_bits_of_posterize_do_not_raise(picture, aa: str) -> None:
    """They turn an image black, whichever policy keeps the operation."""
    augment = Augment(crop="center", hflip=0.0, aa=aa)
    views = [train_view(picture(0), augment, SPEC, 0, 0, i) for i in range(60)]
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in views)
    if aa not in POLICIES:  # the one that asks for 0 bits in each of 15 views
        assert 1 <= sum(int(view.max()) == 0 for view in views) <= 15


def test_small_recipe_on_single_images_crops_and_flips(picture) -> None:
    image = picture(0)
    padded = TF.pil_to_tensor(TF.pad(image, 4))
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    windows = torch.cat([windows, windows.flip(-1)])
    seen = set()
    for i in range(40):
        view = train_view(image, AUGMENTS["small"], SPEC, 0, 0, i)
        (match,) = (windows == view).flatten(1).all(1).nonzero().flatten().tolist()
        seen.add(match)
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
