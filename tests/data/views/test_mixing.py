"""Mixup and CutMix: partners, weights, boxes, distributions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitdistill import keyed
from vitdistill.data.views.mixing import Mixing, check_even, symmetric_beta
from vitdistill.errors import ConfigError
from vitdistill.keyed import Stream


def batch(
    count: int = 8, size: int = 12
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    images = torch.arange(count).float()[:, None, None, None] + torch.zeros(count, 3, size, size)
    ids = np.arange(count, dtype=np.int64)[::-1].copy()
    return images, torch.arange(count), ids, np.full(count, 3, dtype=np.int64)


def test_mixup_blends_partners_with_one_weight() -> None:
    images, labels, ids, views = batch()
    mixed, other, lam = Mixing(0.8, 0.0)(images, labels, 1, ids, views)
    assert other.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert torch.equal(lam[0::2], lam[1::2]) and len(lam.unique()) == 4
    wanted = labels.float() * lam + other.float() * (1 - lam)
    assert torch.allclose(mixed, wanted[:, None, None, None].expand_as(mixed), atol=1e-6)
    assert torch.equal(images, batch()[0])


def test_cutmix_pastes_one_box_and_weighs_its_area() -> None:
    images, labels, ids, views = batch(64)
    mixed, other, lam = Mixing(0.0, 1.0)(images, labels, 1, ids, views)
    own = (mixed == labels[:, None, None, None]).all(1)
    assert ((mixed == labels[:, None, None, None]) | (mixed == other[:, None, None, None])).all()
    assert torch.allclose(own.float().mean((1, 2)), lam)
    assert torch.equal(own[0::2], own[1::2])
    for image in ~own:
        assert image.sum() == image.any(0).sum() * image.any(1).sum()
    assert 0.0 <= lam.min() < 0.4 and lam.max() > 0.8


def test_probabilities() -> None:
    pairs = 0, np.arange(40000, dtype=np.int64), np.zeros(40000, dtype=np.int64)
    lam, cut, boxes = Mixing(0.8, 1.0, prob=0.6, switch_prob=0.3).draw(*pairs, 32, 32)
    assert abs(cut.mean() - 0.3) < 0.01
    assert abs((lam[~cut] == 1.0).mean() - 0.4) < 0.01
    assert ((boxes[lam == 1.0][:, 1] - boxes[lam == 1.0][:, 0]) == 0).all() or (lam[cut] < 1).any()
    assert (boxes >= 0).all() and (boxes <= 32).all()
    lam, cut, _ = Mixing(0.8, 0.0).draw(*pairs, 32, 32)
    assert not cut.any()
    lam, cut, _ = Mixing(0.0, 1.0).draw(*pairs, 32, 32)
    assert cut.all()


def test_cutmix_has_timms_distribution() -> None:
    pairs = 0, np.arange(40000, dtype=np.int64), np.zeros(40000, dtype=np.int64)
    ours, _, boxes = Mixing(0.0, 1.0).draw(*pairs, 32, 24)
    random = np.random.default_rng(0)
    side = np.sqrt(1.0 - random.beta(1.0, 1.0, 20000))
    edges = []
    for length in (32, 24):  # timm.data.mixup.rand_bbox
        cut, centre = (length * side).astype(int), random.integers(0, length, 20000)
        edges += [(centre - cut // 2).clip(0, length), (centre + (cut + 1) // 2).clip(0, length)]
    their_boxes = np.stack(edges, axis=1)
    theirs = 1.0 - (edges[1] - edges[0]) * (edges[3] - edges[2]) / (32 * 24)
    steps = np.linspace(0, 1, 11)
    assert np.abs(np.quantile(ours, steps) - np.quantile(theirs, steps)).max() < 0.02
    assert np.abs(boxes.mean(0) - their_boxes.mean(0)).max() < 0.3
    assert np.abs(boxes.std(0) - their_boxes.std(0)).max() < 0.3


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.8, 1.0, 3.0, 50.0])
def test_beta(alpha: float) -> None:
    keys = keyed.keys(0, 0, np.arange(40000, dtype=np.int64), Stream.MIX)
    x = symmetric_beta(keys, np.full(40000, alpha))
    assert np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1
    deviation = (1 / (4 * (2 * alpha + 1))) ** 0.5
    assert abs(x.mean() - 0.5) < 5 * deviation / 200
    assert abs(x.std() - deviation) < 0.02 * deviation
    reference = np.random.default_rng(0).beta(alpha, alpha, 40000)
    steps = np.linspace(0.05, 0.95, 10)
    assert np.abs(np.quantile(x, steps) - np.quantile(reference, steps)).max() < max(
        0.02, 0.1 * (alpha < 0.1)
    )


@given(st.permutations(range(5)), st.integers(0, 3))
def test_a_pair_does_not_depend_on_its_company_or_order(order: list[int], view: int) -> None:
    images, labels, ids, _ = batch(10)
    views = np.full(10, view, dtype=np.int64)
    mixing = Mixing(0.8, 1.0)
    mixed, _, lam = mixing(images, labels, 5, ids, views)
    rows = [2 * p + swap for p in order for swap in (1, 0)]
    again, _, lam_again = mixing(images[rows], labels[rows], 5, ids[rows], views)
    assert torch.equal(again, mixed[rows]) and torch.equal(lam_again, lam[rows])
    assert not torch.equal(lam, mixing(images, labels, 6, ids, views)[2])
    assert not torch.equal(lam, mixing(images, labels, 5, ids, views + 1)[2])
    check_even(4)
    with pytest.raises(ConfigError):
        check_even(3)
