"""Random erasing: timm's distribution, keyed noise, and independence of the batch."""

import random

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing

from vitdistill.data.views.erasing import erase


def erased(
    count: int, prob: float, size: tuple[int, int] = (20, 30), start: int = 0
) -> torch.Tensor:
    """``count`` images of 7s, erased."""
    ids = np.arange(start, start + count, dtype=np.int64)
    return erase(
        torch.full((count, 3, *size), 7.0), prob, 1, ids, np.full(count, 4, dtype=np.int64)
    )


def test_one_rectangle_of_noise() -> None:
    for image in erased(200, 1.0):
        hole = (image != 7.0).all(0)
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole.sum() == len(rows) * len(columns) > 0
        assert rows[-1] - rows[0] == len(rows) - 1 and columns[-1] - columns[0] == len(columns) - 1
        assert len(rows) < 20 and len(columns) < 30
    noise = torch.cat([image[image != 7.0] for image in erased(500, 1.0)])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert len(noise.unique()) > 0.98 * len(noise)


def test_frequency_and_areas_are_timms() -> None:
    ours = (erased(4000, 0.25) != 7.0).any(1).float().mean((1, 2))
    random.seed(0)
    theirs_op = RandomErasing(0.25, mode="pixel", device="cpu")
    theirs = (theirs_op(torch.full((4000, 3, 20, 30), 7.0)) != 7.0).any(1).float().mean((1, 2))
    assert abs((ours > 0).float().mean() - 0.25) < 0.03
    assert abs(ours[ours > 0].mean() - theirs[theirs > 0].mean()) < 0.01
    assert abs(ours[ours > 0].std() - theirs[theirs > 0].std()) < 0.01
    assert abs(ours.max() - theirs.max()) < 0.03


def test_an_image_depends_on_its_address_and_not_on_its_company():
    assert torch.equal(erased(10, 0.5, start=13), erased(40, 0.5)[13:23])
    ids, views = np.arange(50, dtype=np.int64), np.zeros(50, dtype=np.int64)
    blank = torch.full((50, 3, 16, 16), 7.0)
    base = erase(blank.clone(), 0.5, 1, ids, views)
    assert not torch.equal(base, erase(blank.clone(), 0.5, 2, ids, views))
    assert not torch.equal(base, erase(blank.clone(), 0.5, 1, ids, views + 1))
    assert torch.equal(erase(blank.clone(), 0.0, 1, ids, views), blank)
    tiny = torch.full((50, 3, 1, 1), 7.0)  # too small for any rectangle
    assert torch.equal(erased(50, 1.0, (1, 1)), tiny)
