"""Verdicts on results whose truth is known: equal recipes are seldom told apart, unequal ones are."""

import math
from collections import Counter

import numpy as np
import pytest

from vitdistill.report.verdict import ERROR_RATE, Scores, compare

TRIALS = 500


def drawn(
    random: np.random.Generator,
    seeds: int,
    images: int,
    of_seeds: float,
    gain: float = 0.0,
    shared: float = 0.0,
    kept: bool = True,
    others: bool = False,
) -> tuple[Scores, Scores]:
    """Two recipes on the same images, of which some are harder; a run is good or bad by luck.

    ``of_seeds``: deviation of that luck, in logits; ``shared``: how much of it both have.
    """
    hard = random.normal(1.0, 2.0, images)
    luck = random.normal(0, of_seeds, seeds)
    sides = []
    for side, more in enumerate((gain, 0.0)):
        own = shared * luck + math.sqrt(1 - shared**2) * random.normal(0, of_seeds, seeds)
        logits = hard + more + own[:, None]
        right = random.random((seeds, images)) < 1 / (1 + np.exp(-logits))
        names = [(i + (seeds * side if others else 0), 0) for i in range(seeds)]
        top1 = dict(zip(names, right.mean(1).tolist(), strict=True))
        answers = dict(zip(names, right, strict=True)) if kept else {}
        sides.append(Scores(top1, answers, images))
    return sides[0], sides[1]


@pytest.mark.parametrize("seeds", [2, 3, 6])
@pytest.mark.parametrize("of_seeds", [0.0, 0.5])
@pytest.mark.parametrize("how", ["paired", "paired, alike", "other seeds", "sums alone"])
def test_equal_recipes_are_better_by_chance_at_most_at_the_stated_rate(
    seeds: int, of_seeds: float, how: str
) -> None:
    random = np.random.default_rng(0)
    options = {"shared": 0.9 * (how == "paired, alike"), "kept": how != "sums alone"}
    said = Counter(
        compare(
            *drawn(random, seeds, 150, of_seeds, others=how == "other seeds", **options)
        ).verdict
        for _ in range(TRIALS)
    )
    rate = ERROR_RATE / 2
    most = TRIALS * rate + 3 * math.sqrt(TRIALS * rate * (1 - rate))
    assert said["better"] <= most and said["not better"] <= most, said


def test_what_is_better_is_found_and_the_more_often_the_better_it_is() -> None:
    random = np.random.default_rng(1)
    found = []
    for gain in (0.3, 0.6, 1.2):
        pairs = (drawn(random, 4, 400, 0.1, gain, shared=0.5) for _ in range(150))
        found.append(sum(compare(*pair).verdict == "better" for pair in pairs) / 150)
    assert found == sorted(found) and found[-1] > 0.95, found


def test_the_interval_holds_the_true_difference() -> None:
    random = np.random.default_rng(2)
    hard = random.normal(1.0, 2.0, 200_000)
    true = float(np.mean(1 / (1 + np.exp(-hard - 0.5))) - np.mean(1 / (1 + np.exp(-hard))))
    held = [
        c.low <= true <= c.high
        for c in (compare(*drawn(random, 3, 150, 0.0, 0.5)) for _ in range(TRIALS))
    ]
    assert np.mean(held) > 1 - ERROR_RATE - 3 * math.sqrt(ERROR_RATE / TRIALS)


def test_pairs_of_seeds_are_sharper_where_seeds_have_luck_in_common() -> None:
    ours, theirs = ({(i, 0): x + d for i, x in enumerate((0.5, 0.7, 0.9))} for d in (0.02, 0.0))
    many = 10**9
    paired = compare(Scores(ours, {}, many), Scores(theirs, {}, many))
    others = {(i + 9, 0): x for (i, _), x in theirs.items()}
    unpaired = compare(Scores(ours, {}, many), Scores(others, {}, many))
    assert paired.verdict == "better" and unpaired.verdict == "cannot tell"
    assert paired.paired and not unpaired.paired
    assert paired.difference == pytest.approx(0.02) == unpaired.difference


def test_one_seed_never_tells() -> None:
    one = compare(Scores({(0, 0): 0.9}, {}, 10**6), Scores({(0, 0): 0.1}, {}, 10**6))
    assert one.verdict == "cannot tell" and one.low > 0


def test_answers_to_the_same_images_are_compared_image_by_image() -> None:
    right = np.arange(1000) < 800
    better = np.arange(1000) < 830  # right wherever the other one is
    seeds = [(0, 0), (1, 0)]
    sides = [
        Scores({s: float(r.mean()) for s in seeds}, {s: r for s in seeds}, 1000)
        for r in (better, right)
    ]
    told = compare(*sides)
    blind = compare(*(Scores(s.top1, {}, 1000) for s in sides))
    assert told.images_error == pytest.approx(math.sqrt(0.03 * 0.97 / 999))
    assert blind.images_error > 3 * told.images_error
    assert (told.verdict, blind.verdict) == ("better", "cannot tell")
