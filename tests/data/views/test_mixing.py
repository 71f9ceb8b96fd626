"""Mixup and CutMix: partners, weights, boxes, distributions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitdistill import keyed
from vitdistill.data.augment import Augment
from vitdistill.data.order import Samples
from vitdistill.data.views.mixing import draw_mixing, mix, symmetric_beta
from vitdistill.keyed import Stream

MIXUP, CUTMIX, BOTH = Augment(mixup=0.8), Augment(cutmix=1.0), Augment(mixup=0.8, cutmix=1.0)
PAIRS = Samples(np.arange(40000, dtype=np.int64), np.zeros(40000, dtype=np.int64))


def mixed(augment: Augment, count: int, seed=1, view=3, rows=slice(None)) -> tuple:
    """Mix images whose pixels are their labels: (own label, images, partner's label, weight)."""
    labels = torch.arange(count)[rows]
    ids = np.arange(count, dtype=np.int64)[::-1][rows].copy()
    images = labels.float()[:, None, None, None].expand(-1, 3, 12, 12).contiguous()
    kept = images.clone()
    shown = Samples(ids, np.full(len(ids), view, dtype=np.int64), seed)
    made = mix(images, labels, augment, shown)
    assert torch.equal(images, kept)
    return labels[:, None, None, None], *made


def test_mixup_blends_partners_with_one_weight() -> None:
    own, images, other, lam = mixed(MIXUP, 8)
    assert other.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert torch.equal(lam[0::2], lam[1::2]) and len(lam.unique()) == 4
    share = lam[:, None, None, None]
    wanted = own * share + other[:, None, None, None] * (1 - share)
    assert torch.allclose(images, wanted.expand_as(images), atol=1e-6)


def test_cutmix_pastes_one_box_and_weighs_its_area() -> None:
    own, images, other, lam = mixed(CUTMIX, 64)
    kept = (images == own).all(1)
    assert ((images == own) | (images == other[:, None, None, None])).all()
    assert torch.allclose(kept.float().mean((1, 2)), lam)
    assert torch.equal(kept[0::2], kept[1::2])
    for image in ~kept:
        assert image.sum() == image.any(0).sum() * image.any(1).sum()
    assert 0.0 <= lam.min() < 0.4 and lam.max() > 0.8


def test_probabilities() -> None:
    rates = {"mixup_prob": 0.6, "mixup_switch_prob": 0.3}
    lam, cut, boxes = draw_mixing(Augment(mixup=0.8, cutmix=1.0, **rates), PAIRS, 32, 32)
    assert abs(cut.mean() - 0.3) < 0.01
    assert abs((lam[~cut] == 1.0).mean() - 0.4) < 0.01
    assert (boxes >= 0).all() and (boxes <= 32).all()
    assert not draw_mixing(MIXUP, PAIRS, 32, 32)[1].any()


def test_cutmix_has_timms_distribution() -> None:
    ours, cut, boxes = draw_mixing(CUTMIX, PAIRS, 32, 24)
    assert cut.all()
    random = np.random.default_rng(0)
    side = np.sqrt(1.0 - random.beta(1.0, 1.0, 20000))
    edges = []
    for length in (32, 24):  # timm.data.mixup.rand_bbox
        width, centre = (length * side).astype(int), random.integers(0, length, 20000)
        edges += [(centre - width // 2).clip(0, length)]
        edges += [(centre + (width + 1) // 2).clip(0, length)]
    their_boxes = np.stack(edges, axis=1)
    theirs = 1.0 - (edges[1] - edges[0]) * (edges[3] - edges[2]) / (32 * 24)
    steps = np.linspace(0, 1, 11)
    assert np.abs(np.quantile(ours, steps) - np.quantile(theirs, steps)).max() < 0.02
    assert np.abs(boxes.mean(0) - their_boxes.mean(0)).max() < 0.3
    assert np.abs(boxes.std(0) - their_boxes.std(0)).max() < 0.3


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 3.0, 50.0])
def test_beta(alpha: float) -> None:
    keys = keyed.keys(0, 0, np.arange(40000, dtype=np.int64), Stream.MIX)
    x = symmetric_beta(keys, np.full(40000, alpha))
    assert np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1
    deviation = (1 / (4 * (2 * alpha + 1))) ** 0.5
    assert abs(x.mean() - 0.5) < 5 * deviation / 200
    assert abs(x.std() - deviation) < 0.02 * deviation
    steps, most = np.linspace(0.05, 0.95, 10), 0.1 if alpha < 0.1 else 0.02
    reference = np.random.default_rng(0).beta(alpha, alpha, 40000)
    assert np.abs(np.quantile(x, steps) - np.quantile(reference, steps)).max() < most


@given(st.permutations(range(5)), st.integers(0, 3))
def test_a_pair_does_not_depend_on_its_company_or_order(order: list[int], view: int) -> None:
    _, images, _, lam = mixed(BOTH, 10, view=view)
    rows = [2 * p + swap for p in order for swap in (1, 0)]
    _, again, _, lam_again = mixed(BOTH, 10, view=view, rows=rows)
    assert torch.equal(again, images[rows]) and torch.equal(lam_again, lam[rows])
    assert not torch.equal(lam, mixed(BOTH, 10, seed=2, view=view)[3])
    assert not torch.equal(lam, mixed(BOTH, 10, view=view + 1)[3])
