"""The checksum of a view covers its pixels and everything that is done to them afterwards."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vitdistill import keyed
from vitdistill.data.views import checksums
from vitdistill.data.views.checksums import view_checksums
from vitdistill.data.views.mixing import Mixing

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 8, 10), dtype=np.uint8))
IDS, VIEWS = np.arange(6), np.full(6, 2)
MIXING = Mixing(0.8, 1.0, 1.0, 0.5)


def made(reprob: float = 0.0, mixing: Mixing | None = None, seed: int = 7) -> list[int]:
    return view_checksums(PIXELS, reprob, mixing, seed, IDS, VIEWS).tolist()


@pytest.mark.parametrize(
    ("reprob", "mixing"), [(0.0, None), (1.0, None), (0.0, MIXING), (0.5, MIXING)]
)
def test_any_pixel_counts_and_only_for_its_own_view(reprob: float, mixing: Mixing | None) -> None:
    before = made(reprob, mixing)
    assert len(set(before)) == 6 and before == made(reprob, mixing)
    for place in ((0, 0, 0, 0), (3, 2, 7, 9), (5, 1, 4, 4)):
        pixels = PIXELS.clone()
        pixels[place] ^= 1
        after = view_checksums(pixels, reprob, mixing, 7, IDS, VIEWS).tolist()
        assert [i for i in range(6) if before[i] != after[i]] == [place[0]]


def test_the_erased_box_counts() -> None:
    """Which depends on sample, view and seed; without erasing none of them does."""
    before = made(reprob=1.0)
    assert before != made() and before != made(reprob=1.0, seed=8) and made() == made(seed=8)
    same = PIXELS[:1].expand(2, -1, -1, -1)
    erased = view_checksums(same, 1.0, None, 7, np.array([0, 1]), np.array([2, 2]))
    assert (
        erased[0] != erased[1]
        and len(
            set(view_checksums(same, 0.0, None, 7, np.array([0, 1]), np.array([2, 2])).tolist())
        )
        == 1
    )


def test_the_partner_counts() -> None:
    """Of one pair, the key is its smaller id: the larger one is known by itself alone."""
    ids, others = np.array([0, 5]), np.array([0, 9])
    views = np.array([2, 2])
    a, b = (view_checksums(PIXELS[:2], 0.0, MIXING, 7, pair, views) for pair in (ids, others))
    assert a[0] != b[0] and a[1] == b[1]


@pytest.mark.parametrize("switch_prob", [0.0, 1.0])
def test_weight_and_box_of_mixing_count(switch_prob: float) -> None:
    mixing = replace(MIXING, switch_prob=switch_prob)
    before = made(mixing=mixing)
    after = made(mixing=mixing, seed=8)
    assert all(a != b for a, b in zip(before, after, strict=True)) and before != made()


def test_the_last_bits_of_a_weight_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = made(mixing=MIXING)
    draw = Mixing.draw

    def shaken(
        self: Mixing, keys: keyed.I64, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lam, cut, boxes = draw(self, keys, height, width)
        return lam * (1 + 1e-12), cut, boxes

    monkeypatch.setattr(checksums.Mixing, "draw", shaken)
    assert made(mixing=MIXING) == before
