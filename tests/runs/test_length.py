"""A run says how many steps it has, and refuses an average that would not forget its beginning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitdistill.errors import ConfigError, Set
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.length import FEW_STEPS, check_length


def told(num_images, batch_size, epochs, **changes):
    """What is said of a run, and its steps."""
    settings = {"train.batch_size": batch_size, "train.epochs": epochs, "optim.warmup_epochs": 0.0}
    recipe = replace_fields(Recipe(), {**settings, **changes})
    lines = []
    check_length(recipe, num_images, num_images // batch_size, lines.append)
    return lines, num_images // batch_size * epochs


def test_a_small_folder_under_a_recipe_made_for_imagenet():
    (about, advice), _ = told(2000, 1024, 90, **{"optim.warmup_epochs": 30.0, "optim.lr": 8e-4})
    assert "90 steps, 1 an epoch, 30 of them warm-up" in about
    assert "leaves out 976 of 2,000 images (49%)" in about
    assert advice.fixes[0] == Set("train.batch_size", 128) and "1,350 steps" in advice.what


def test_of_images_that_are_shown_several_times_an_epoch_all_are_counted():
    settings = {"data.unlabelled": "rest", "train.batch_size": 128, "optim.warmup_epochs": 0.0}
    recipe = replace_fields(Recipe(), settings)
    lines = []
    check_length(replace_fields(recipe, {"train.epochs": 1}), 3000, 46, lines.append)
    assert len(lines) == 2 and "368 steps" in lines[1].what  # 46 * 128 // 16


@given(
    num_images=st.integers(1, 2_000_000),
    batch_size=st.integers(1, 4096),
    epochs=st.integers(1, 1000),
)
def test_what_is_advised_is_better(num_images, batch_size, epochs):
    num_images = max(num_images, batch_size)
    (about, *advice), steps = told(num_images, batch_size, epochs)
    left_out = num_images % batch_size
    assert (f"leaves out {left_out:,} of {num_images:,} images" in about) == (left_out > 0)
    assert bool(advice) == (steps < FEW_STEPS or left_out > num_images / 10)
    for line in advice:
        size = line.fixes[0].value
        assert size < batch_size or batch_size == 1
        assert num_images // size * epochs >= steps


def average(decay, steps):
    """What is said of a moving average in a run of so many steps of a batch."""
    lines, _ = told(steps, 1, 1, **{"train.ema_decay": decay})
    return [line for line in lines if "moving average" in str(line)]


@pytest.mark.parametrize(
    ("decay", "steps"), [(0.9998, 450), (0.99996, 9000), (0.9999, 1), (0.999, 600), (0.5, 1)]
)
def test_an_average_of_the_first_weights_is_refused(decay, steps):
    if decay**steps <= 0.5:
        assert average(decay, steps)
        return
    with pytest.raises(ConfigError) as caught:
        average(decay, steps)
    (fix,) = caught.value.fixes
    assert caught.value.field == fix.field == "train.ema_decay"
    assert fix.value == "none" or average(float(fix.value), steps) == []


@given(decay=st.floats(0.5, 0.999999), steps=st.integers(1, 10**6))
def test_an_average_is_silent_only_where_its_memory_is_far_below_the_run(decay, steps):
    share = decay**steps
    if share > 0.5:
        with pytest.raises(ConfigError) as caught:
            average(decay, steps)
        assert all(isinstance(fix, Set) for fix in caught.value.fixes)
    else:
        assert bool(average(decay, steps)) == (share > 0.01)
