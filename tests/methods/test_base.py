"""What every method shares: counts of kept patches, and settings that are checked when they are
made.
"""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitdistill.errors import ConfigError
from vitdistill.methods import method_class, method_name
from vitdistill.methods.base import WeightSchedule
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.config import Recipe, TeacherConfig
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.yaml import dump_recipe, load_recipe
from vitdistill.vit.families import describe_network
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


patches = st.integers(1, 2000)
rates = st.floats(0, 1, exclude_min=True)


@given(patches=patches, rate=rates)
def test_a_count_is_within_the_grid(patches: int, rate: float) -> None:
    count = num_kept_patches(patches, rate)
    assert 1 <= count <= patches
    assert count < patches or rate == 1 or patches == 1


@pytest.mark.parametrize("patches", [16, 49, 64, 196, 197, 256, 576, 1369])
def test_counts_rise_with_the_rate_without_a_dip(patches: int) -> None:
    counts = [num_kept_patches(patches, i / 1000) for i in range(1, 1001)]
    assert counts == sorted(counts)
    assert counts[-1] == patches and (patches == 1 or counts[-2] < patches)


@given(patches=st.integers(1, 400), parts=st.integers(1, 12))
def test_unit_fractions_that_divide_are_exact(patches: int, parts: int) -> None:
    assert num_kept_patches(patches * parts, 1 / parts) == patches


def test_an_exact_count_is_taken_as_it_is() -> None:
    assert MaskedKD(num_keep=144).count(196) == 144
    assert MaskedKD(num_keep=196).count(196) == 196
    with pytest.raises(ConfigError, match="at most 196"):
        MaskedKD(num_keep=197).count(196)


# --- weights that change -------------------------------------------------------------------------

Shape = Literal["linear", "cosine"]
fractions = st.floats(0, 1)
weights = st.floats(0, 100)
shapes = st.sampled_from(["linear", "cosine"])


@given(
    weight=weights,
    to=weights,
    one=fractions,
    two=fractions,
    shape=shapes,
    progress=st.lists(fractions, min_size=2, max_size=20),
)
def test_a_schedule_leads_from_the_weight_to_its_end(
    weight: float, to: float, one: float, two: float, shape: Shape, progress: list[float]
) -> None:
    schedule = WeightSchedule(to=to, begin=min(one, two), end=max(one, two), shape=shape)
    assert schedule.at(weight, schedule.end) == schedule.at(weight, 1.0) == to
    if schedule.begin < schedule.end:
        assert schedule.at(weight, schedule.begin) == schedule.at(weight, 0.0) == weight
    values = [schedule.at(weight, p) for p in sorted(progress)]
    assert all(min(weight, to) - 1e-9 <= value <= max(weight, to) + 1e-9 for value in values)
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
    assert cosine.at(1.0, 0.21) < linear.at(1.0, 0.21) and cosine.at(1.0, 0.59) > linear.at(
        1.0, 0.59
    )


@pytest.mark.parametrize("moment", [0.0, 0.5, 1.0])
def test_a_schedule_of_one_moment_changes_the_weight_at_once(moment: float) -> None:
    schedule = WeightSchedule(to=0.0, begin=moment, end=moment)
    assert schedule.at(3.0, moment) == 0.0
    assert moment == 0 or schedule.at(3.0, math.nextafter(moment, 0)) == 3.0


def test_a_schedule_survives_yaml(tmp_path: Path) -> None:
    schedule = WeightSchedule(to=0.5, begin=0.25, end=0.75, shape="cosine")
    recipe = Recipe(
        objectives={
            "ce": CrossEntropy(),
            "vitkd": ViTKD(weight=2.0, schedule=schedule, low_blocks=(0, 3)),
        },
        teachers={"teacher": TeacherConfig(model="x")},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert (
        again == recipe
        and again.objectives["vitkd"].schedule == schedule
        and again.objectives["ce"].schedule is None
    )
    moved = replace_fields(
        recipe, {"objectives.vitkd.schedule.end": 1.0, "objectives.ce.schedule": {"to": 0.0}}
    )
    assert moved.objectives["vitkd"].schedule == replace(schedule, end=1.0)
    assert moved.objectives["ce"].schedule == WeightSchedule(to=0.0)
    with pytest.raises(ConfigError, match="fractions of the run"):
        replace_fields(recipe, {"objectives.vitkd.schedule.end": 0.1})


# --- the table -----------------------------------------------------------------------------------


def test_an_unknown_method_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="'maskdkd': did you mean 'maskedkd'"):
        method_class("maskdkd")
    with pytest.raises(ConfigError, match="choose from"):
        method_class("zzz")


def test_a_method_outside_the_table_cannot_be_written_into_a_recipe() -> None:
    class Mine(SoftKD):
        pass

    with pytest.raises(ConfigError, match="Mine is not in the table"):
        method_name(Mine())


# --- descriptions --------------------------------------------------------------------------------


def test_networks_are_described_without_being_run() -> None:
    with torch.device("meta"):
        vit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7)
        resnet = timm.create_model("resnet18")
    network = describe_network(vit, "student", "deit_tiny_distilled_patch16_224", (224, 224))
    assert (network.grid, network.patch_size, network.num_patches, network.num_prefix_tokens) == (
        (14, 14),
        (16, 16),
        196,
        2,
    )
    assert (network.depth, network.dim, network.num_classes, network.heads) == (
        12,
        192,
        7,
        ("class", "distillation"),
    )
    assert network.walks and network.attention_source == "class"
    assert network.num_parameters == sum(p.numel() for p in vit.parameters())
    assert describe_network(vit, "t", "x", (224, 224), num_classes=3).num_classes == 3
    other = describe_network(resnet, "teacher", "resnet18", (224, 224))
    assert (
        not other.walks
        and other.attention_source is None
        and other.num_patches == 0
        and other.depth == 5
    )
