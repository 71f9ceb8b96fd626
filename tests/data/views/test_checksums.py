"""The checksum of a view covers its pixels and everything that is done to them afterwards."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vitdistill.data.augment import Augment
from vitdistill.data.order import Samples
from vitdistill.data.views import checksums
from vitdistill.data.views.checksums import view_checksums

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 8, 10), dtype=np.uint8))
IDS = np.arange(6)
PLAIN, ERASED, MIXED = Augment(), Augment(reprob=1.0), Augment(mixup=0.8, cutmix=1.0)
BOTH = replace(MIXED, reprob=0.5)


def made(
    augment: Augment, seed: int = 7, pixels: torch.Tensor = PIXELS, ids: np.ndarray = IDS
) -> list[int]:
    return view_checksums(pixels, augment, Samples(ids, np.full(len(ids), 2), seed)).tolist()


def test_checksums_are_frozen() -> None:
    """Stored labels carry them: another value here would refuse every label of today."""
    assert made(PLAIN)[:2] == [3009271021, 2385611255]
    assert made(BOTH)[:2] == [3291830748, 3400164337]


@pytest.mark.parametrize("augment", [PLAIN, ERASED, MIXED, BOTH])
def test_any_pixel_counts_and_only_for_its_own_view(augment: Augment) -> None:
    before = made(augment)
    assert len(set(before)) == 6
    for place in ((0, 0, 0, 0), (3, 2, 7, 9), (5, 1, 4, 4)):
        pixels = PIXELS.clone()
        pixels[place] ^= 1
        after = made(augment, pixels=pixels)
        assert [i for i in range(6) if before[i] != after[i]] == [place[0]]


def test_the_erased_box_counts() -> None:
    """It depends on sample and seed; without erasing neither counts."""
    same = {"pixels": PIXELS[:1].expand(2, -1, -1, -1), "ids": IDS[:2]}
    assert made(ERASED) != made(ERASED, seed=8) and len(set(made(ERASED, **same))) == 2
    assert made(PLAIN) == made(PLAIN, seed=8) and len(set(made(PLAIN, **same))) == 1


def test_the_partner_counts() -> None:
    """The key of a pair is its smaller id, so the larger one counts by itself alone."""
    a, b = (made(MIXED, pixels=PIXELS[:2], ids=np.array([0, i])) for i in (5, 9))
    assert a[0] != b[0] and a[1] == b[1]


@pytest.mark.parametrize("switch_prob", [0.0, 1.0])
def test_weight_and_box_of_mixing_count(switch_prob: float) -> None:
    mixed = replace(MIXED, mixup_switch_prob=switch_prob)
    assert all(a != b for a, b in zip(made(mixed), made(mixed, seed=8), strict=True))


def test_the_last_bits_of_a_weight_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before, draw = made(MIXED), checksums.draw_mixing

    def shaken(*args: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lam, cut, boxes = draw(*args)
        return lam * (1 + 1e-12), cut, boxes

    monkeypatch.setattr(checksums, "draw_mixing", shaken)
    assert made(MIXED) == before
