"""What every method shares: counts of kept patches, and settings that are checked when they are made."""

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitdistill.errors import ConfigError
from vitdistill.method import Network, num_kept_patches
from vitdistill.methods import METHODS, method_class, method_name, method_names
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.maskedkd import MaskedKD, RandomPatches

# --- counts --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "rate", "count"),
    [(196, 0.75, 144), (196, 0.5, 98), (196, 0.4, 80), (196, 0.25, 49), (256, 0.75, 192), (256, 0.5, 128)],
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


@given(patches=patches, rate=rates)
def test_a_count_is_close_to_its_rate(patches: int, rate: float) -> None:
    count = num_kept_patches(patches, rate)
    assert abs(count - patches * rate) <= (8 if patches >= 128 else 1)


@given(patches=patches, low=rates, high=rates)
def test_more_is_never_less(patches: int, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    assert num_kept_patches(patches, low) <= num_kept_patches(patches, high)


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
    with pytest.raises(ConfigError, match="num_keep is 197, but the teacher has only 196"):
        MaskedKD(num_keep=197).count(196)


# --- settings ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0, -0.5, 1.5, math.nan, math.inf, True, "half"])
def test_a_keep_rate_is_a_fraction(rate: object) -> None:
    with pytest.raises(ConfigError, match=r"keep_rate is .*above 0 and at most 1"):
        MaskedKD(keep_rate=rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, -3, True, 1.5])
def test_a_count_is_a_whole_number_above_0(count: object) -> None:
    with pytest.raises(ConfigError, match="num_keep is "):
        RandomPatches(num_keep=count)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("kind", [CrossEntropy, SoftKD, HardKD])
def test_a_weight_is_above_0(kind: type, weight: float) -> None:
    with pytest.raises(ConfigError, match=r"weight of .* leave the objective out"):
        kind(weight=weight)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_is_above_0(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature is"):
        SoftKD(temperature=temperature)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_smoothing_is_below_1(smoothing: float) -> None:
    with pytest.raises(ConfigError, match="smoothing is"):
        CrossEntropy(smoothing=smoothing)


# --- the table -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_listed_method_is_found_by_its_name(name: str) -> None:
    assert method_name(method_class(name)()) == name
    assert name in method_names()


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


# --- descriptions ----------------------------------------------------------------------------------------------------------------


def test_networks_are_described_without_being_run() -> None:
    with torch.device("meta"):
        vit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7)
        resnet = timm.create_model("resnet18")
    network = Network.of(vit, "student", "deit_tiny_distilled_patch16_224", (224, 224))
    assert (network.grid, network.patch_size, network.num_patches, network.num_prefix_tokens) == ((14, 14), (16, 16), 196, 2)
    assert (network.depth, network.dim, network.num_classes, network.heads) == (12, 192, 7, ("class", "distillation"))
    assert network.walks and network.attention_source == "class"
    assert network.num_parameters == sum(p.numel() for p in vit.parameters())
    assert Network.of(vit, "t", "x", (224, 224), num_classes=3).num_classes == 3
    other = Network.of(resnet, "teacher", "resnet18", (224, 224))
    assert not other.walks and other.attention_source is None and other.num_patches == 0 and other.depth == 5
