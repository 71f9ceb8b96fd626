"""Random masking: how many patches stay visible, and which."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitdistill.errors import ConfigError, Set
from vitdistill.methods.masking import num_visible, random_masking

counts = st.integers(1, 2000)
rates = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    ("num_patches", "expected"),
    [
        (196, {0.0: 196, 0.75: 49, 0.8: 39, 0.85: 29, 0.9: 19, 0.95: 9, 0.98: 3}),
        (100, {0.8: 19, 0.9: 9}),  # exact arithmetic would say 20 and 10
        (400, {0.8: 79, 0.9: 39}),
    ],
)
def test_the_counts_of_the_authors(num_patches: int, expected: dict[float, int]) -> None:
    assert {rate: num_visible(num_patches, rate) for rate in expected} == expected


@given(num_patches=counts, rate=rates)
def test_the_rate_that_is_told_works_and_is_the_highest(num_patches: int, rate: float) -> None:
    exact = num_patches * (1 - rate)
    try:
        assert exact - 1 <= num_visible(num_patches, rate) <= exact + 1e-9
    except ConfigError as error:
        (fix,) = error.fixes
        assert isinstance(fix, Set) and fix.field == error.field == "masking.mask_rate"
        told = fix.value
        assert num_visible(num_patches, told) == 1
        assert told < rate and 1 - 1 / num_patches - told < 0.02


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    num_patches=st.integers(2, 60),
    rate=st.floats(0, 0.5),
)
def test_keep_restore_and_mask_say_the_same(
    seed: int, batch: int, num_patches: int, rate: float
) -> None:
    noise = torch.rand(batch, num_patches, generator=torch.Generator().manual_seed(seed))
    keep, restore, mask = random_masking(noise, rate)
    visible = num_visible(num_patches, rate)
    assert (
        keep.shape == (batch, visible)
        and keep.dtype is restore.dtype is torch.int64
        and mask.dtype is torch.float32
    )
    for row in range(batch):
        order = sorted(range(num_patches), key=lambda patch: noise[row, patch].item())
        assert keep[row].tolist() == order[:visible]
        assert torch.tensor(order)[restore[row]].tolist() == list(range(num_patches))
        assert {i for i in range(num_patches) if mask[row, i] == 0} == set(order[:visible])
        assert mask[row].sum() == num_patches - visible
