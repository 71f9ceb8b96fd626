"""Random erasing: timm's distribution, keyed noise, and independence of the batch."""

import random

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing

from vitdistill.data.order import Samples
from vitdistill.data.views.erasing import erase


def erased(ids: range, prob: float, size: tuple[int, int] = (20, 30), seed=1, view=4):
    """Images of 7s, erased."""
    blank, views = torch.full((len(ids), 3, *size), 7.0), np.full(len(ids), view)
    return erase(blank, prob, Samples(np.array(ids), views, seed))


def test_one_rectangle_of_noise() -> None:
    images = erased(range(500), 1.0)
    for image in images:
        hole = (image != 7.0).all(0)
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole.sum() == len(rows) * len(columns) > 0
        assert rows[-1] - rows[0] == len(rows) - 1 and columns[-1] - columns[0] == len(columns) - 1
        assert len(rows) < 20 and len(columns) < 30
    noise = images[images != 7.0]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert len(noise.unique()) > 0.98 * len(noise)


def test_frequency_and_areas_are_timms() -> None:
    ours = (erased(range(4000), 0.25) != 7.0).any(1).float().mean((1, 2))
    random.seed(0)
    theirs_op = RandomErasing(0.25, mode="pixel", device="cpu")
    theirs = (theirs_op(torch.full((4000, 3, 20, 30), 7.0)) != 7.0).any(1).float().mean((1, 2))
    assert abs((ours > 0).float().mean() - 0.25) < 0.03
    assert abs(ours[ours > 0].mean() - theirs[theirs > 0].mean()) < 0.01
    assert abs(ours[ours > 0].std() - theirs[theirs > 0].std()) < 0.01
    assert abs(ours.max() - theirs.max()) < 0.03


@pytest.mark.parametrize("change", [{"seed": 2}, {"view": 5}])
def test_an_image_depends_on_its_address_and_not_on_its_company(change: dict) -> None:
    whole = erased(range(40), 0.5)
    assert torch.equal(erased(range(13, 23), 0.5), whole[13:23])
    assert not torch.equal(erased(range(40), 0.5, **change), whole)


@pytest.mark.parametrize(("prob", "size"), [(0.0, (20, 30)), (1.0, (1, 1))])
def test_nothing_is_erased_from_tiny_images_or_without_a_probability(prob, size) -> None:
    assert (erased(range(50), prob, size) == 7.0).all()
