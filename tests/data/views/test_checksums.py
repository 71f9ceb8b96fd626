"""The checksum of a view covers its pixels and everything that is done to them afterwards."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vitdistill.data.augment import Augment
from vitdistill.data.views import checksums
from vitdistill.data.views.checksums import view_checksums
from vitdistill.data.views.mixing import Mixing

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 8, 10), dtype=np.uint8))
IDS, VIEWS = np.arange(6), np.full(6, 2)
PLAIN, ERASED, MIXED = Augment(), Augment(reprob=1.0), Augment(mixup=0.8, cutmix=1.0)
BOTH = replace(MIXED, reprob=0.5)


def made(
    augment: Augment,
    seed: int = 7,
    pixels: torch.Tensor = PIXELS,
    ids: np.ndarray = IDS,
    views: np.ndarray = VIEWS,
) -> list[int]:
    return view_checksums(pixels, augment, seed, views[: len(ids)], ids).tolist()


def test_checksums_are_frozen() -> None:
    """Stored labels carry them: another value here would refuse every label of today."""
    assert {name: made(augment)[:2] for name, augment in (("plain", PLAIN), ("both", BOTH))} == {
        "plain": [3009271021, 2385611255],
        "both": [3291830748, 3400164337],
    }


@pytest.mark.parametrize("augment", [PLAIN, ERASED, MIXED, BOTH])
def test_any_pixel_counts_and_only_for_its_own_view(augment: Augment) -> None:
    before = made(augment)
    assert len(set(before)) == 6 and before == made(augment)
    for place in ((0, 0, 0, 0), (3, 2, 7, 9), (5, 1, 4, 4)):
        pixels = PIXELS.clone()
        pixels[place] ^= 1
        after = made(augment, pixels=pixels)
        assert [i for i in range(6) if before[i] != after[i]] == [place[0]]


def test_the_erased_box_counts() -> None:
    """It depends on sample, view and seed; without erasing none of them does."""
    assert made(PLAIN) != made(ERASED) != made(ERASED, seed=8)
    assert made(PLAIN) == made(PLAIN, seed=8)
    same = PIXELS[:1].expand(2, -1, -1, -1)
    assert len(set(made(ERASED, pixels=same, ids=IDS[:2]))) == 2
    assert len(set(made(PLAIN, pixels=same, ids=IDS[:2]))) == 1


def test_the_partner_counts() -> None:
    """The key of a pair is its smaller id, so the larger one counts by itself alone."""
    a, b = (made(MIXED, pixels=PIXELS[:2], ids=np.array([0, i])) for i in (5, 9))
    assert a[0] != b[0] and a[1] == b[1]


@pytest.mark.parametrize("switch_prob", [0.0, 1.0])
def test_weight_and_box_of_mixing_count(switch_prob: float) -> None:
    mixed = replace(MIXED, mixup_switch_prob=switch_prob)
    assert all(a != b for a, b in zip(made(mixed), made(mixed, seed=8), strict=True))


def test_the_last_bits_of_a_weight_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before, draw = made(MIXED), Mixing.draw

    def shaken(*args: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lam, cut, boxes = draw(*args)
        return lam * (1 + 1e-12), cut, boxes

    monkeypatch.setattr(checksums.Mixing, "draw", shaken)
    assert made(MIXED) == before
