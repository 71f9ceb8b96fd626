"""What methods share: counts of kept patches, weights that change, and the table of names."""

import itertools
import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitdistill.errors import ConfigError
from vitdistill.methods import method_name
from vitdistill.methods.base import WeightSchedule
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.vit.patches import num_kept_patches

# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "rate", "count"),
    [
        (196, 0.75, 144),
        (196, 0.5, 98),
        (196, 0.4, 80),
        (196, 0.25, 49),
        (256, 0.75, 192),
        (256, 0.5, 128),
    ],
)
def test_the_papers_counts(patches: int, rate: float, count: int) -> None:
    assert num_kept_patches(patches, rate) == count


@pytest.mark.parametrize("patches", [1, 2, 16, 49, 64, 127, 128, 196, 197, 256, 576, 1369])
def test_counts_rise_with_the_rate_from_one_to_all(patches: int) -> None:
    counts = [num_kept_patches(patches, i / 1000) for i in range(1, 1001)]
    assert counts == sorted(counts) and 1 <= counts[0] <= counts[-1] == patches
    assert patches == 1 or counts[-2] < patches


@given(patches=st.integers(1, 400), parts=st.integers(1, 12))
def test_unit_fractions_that_divide_are_exact(patches: int, parts: int) -> None:
    assert num_kept_patches(patches * parts, 1 / parts) == patches


def test_an_exact_count_is_taken_as_it_is() -> None:
    assert [MaskedKD(num_keep=count).count(196) for count in (144, 196)] == [144, 196]
    with pytest.raises(ConfigError) as caught:
        MaskedKD(num_keep=197).count(196)
    assert caught.value.field == "selector.num_keep"


# --- weights that change -------------------------------------------------------------------------

fractions, weights = st.floats(0, 1), st.floats(0, 100)


@given(
    weight=weights,
    to=weights,
    moments=st.tuples(fractions, fractions),
    shape=st.sampled_from(["linear", "cosine"]),
    progress=st.lists(fractions, min_size=2, max_size=20),
)
def test_a_schedule_leads_from_the_weight_to_its_end(
    weight: float,
    to: float,
    moments: tuple[float, float],
    shape: Literal["linear", "cosine"],
    progress: list[float],
) -> None:
    schedule = WeightSchedule(to=to, begin=min(moments), end=max(moments), shape=shape)
    assert schedule.at(weight, schedule.end) == schedule.at(weight, 1.0) == to
    if schedule.begin < schedule.end:
        assert schedule.at(weight, schedule.begin) == schedule.at(weight, 0.0) == weight
    values = [schedule.at(weight, p) for p in sorted(progress)]
    sign = 1 if to >= weight else -1
    assert all(sign * (later - earlier) >= -1e-9 for earlier, later in itertools.pairwise(values))


def test_the_shapes_of_a_schedule() -> None:
    linear, cosine = (
        WeightSchedule(to=5.0, begin=0.2, end=0.6, shape=shape) for shape in ("linear", "cosine")
    )
    ways = {0.1: 0.0, 0.2: 0.0, 0.3: 0.25, 0.4: 0.5, 0.5: 0.75, 0.6: 1.0, 0.9: 1.0}
    for progress, way in ways.items():
        assert linear.at(1.0, progress) == pytest.approx(1 + 4 * way)
        assert cosine.at(1.0, progress) == pytest.approx(1 + 4 * (1 - math.cos(math.pi * way)) / 2)


@pytest.mark.parametrize("moment", [0.0, 0.5, 1.0])
def test_a_schedule_of_one_moment_changes_the_weight_at_once(moment: float) -> None:
    schedule = WeightSchedule(to=0.0, begin=moment, end=moment)
    assert schedule.at(3.0, moment) == 0.0
    assert moment == 0 or schedule.at(3.0, math.nextafter(moment, 0)) == 3.0


def test_a_method_outside_the_table_cannot_be_written_into_a_recipe() -> None:
    class Mine(SoftKD):
        pass

    with pytest.raises(ConfigError, match="Mine is not in the table"):
        method_name(Mine())
