"""Whether one recipe beats another, from runs with several seeds on the same images.

A difference is uncertain in two ways: another seed would train another network, and other images
would be answered otherwise. Both count. With one seed nothing is known of the first.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

ERROR_RATE = 0.05
"""Highest rate of telling equal recipes apart: half of it as better, half as worse."""

Verdict = Literal["better", "not better", "cannot tell"]
Seed = tuple[int, int]
Right = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """What the runs of one recipe score on the same images.

    Args:
        top1: of each seed.
        right: of each seed, which images were answered rightly; {} where that was not kept.
        num_images: n.
    """

    top1: Mapping[Seed, float]
    right: Mapping[Seed, Right]
    num_images: int

    @property
    def mean(self) -> float:
        """Top-1, mean over the seeds."""
        return statistics.fmean(self.top1.values())

    @property
    def seeds_error(self) -> float:
        """Standard error of the mean over seeds; NaN of one seed."""
        return _standard_error([*self.top1.values()])

    @property
    def images_error(self) -> float:
        """Standard error of the mean over images."""
        if self.right.keys() == self.top1.keys():
            return _standard_error(np.mean([*self.right.values()], axis=0))
        return math.sqrt(self.mean * (1 - self.mean) / self.num_images)


@dataclass(frozen=True)
class Comparison:
    """The top-1 of one recipe minus that of another.

    Args:
        difference: of the means.
        seeds_error, images_error: its standard errors over seeds (NaN: one seed) and over images.
        low, high: the 1 - `ERROR_RATE` confidence interval of the difference; over images alone
            if there is one seed.
        num_seeds: of the recipe that has fewer.
        paired: both have the same seeds.
    """

    difference: float
    seeds_error: float
    images_error: float
    low: float
    high: float
    num_seeds: int
    paired: bool

    @property
    def verdict(self) -> Verdict:
        if self.num_seeds < 2 or self.low <= 0 <= self.high:
            return "cannot tell"
        return "better" if self.low > 0 else "not better"


def compare(ours: Scores, theirs: Scores) -> Comparison:
    """Compare two recipes, seed by seed where both have the same seeds.

    The half width of the interval is ``sqrt((t SE_seeds)^2 + (z SE_images)^2)``: t of the seeds'
    degrees of freedom is exact where seeds alone matter, z where images alone do, and between them
    the interval is on the safe side. So are the images' errors, which include the seeds' again.
    """
    paired = ours.top1.keys() == theirs.top1.keys()
    count = min(len(ours.top1), len(theirs.top1))
    seeds = math.hypot(ours.seeds_error, theirs.seeds_error)
    if paired:
        seeds = _standard_error([ours.top1[seed] - theirs.top1[seed] for seed in ours.top1])
    images = math.hypot(ours.images_error, theirs.images_error)
    if ours.right.keys() == ours.top1.keys() and theirs.right.keys() == theirs.top1.keys():
        means = [np.mean([*side.right.values()], axis=0) for side in (ours, theirs)]
        images = _standard_error(means[0] - means[1])
    z = statistics.NormalDist().inv_cdf(1 - ERROR_RATE / 2)
    of_seeds = 0.0 if count < 2 else student_t(count - 1) * seeds
    half, difference = math.hypot(of_seeds, z * images), ours.mean - theirs.mean
    interval = difference - half, difference + half
    return Comparison(difference, seeds, images, *interval, count, paired)


@cache
def student_t(df: int) -> float:
    """Return the t that Student's distribution exceeds, on either side, at the `ERROR_RATE`.

    With ``t = sqrt(df) tan(a)`` its density is that of ``cos(a) ** (df - 1)``.

    >>> [round(student_t(df), 3) for df in (1, 2, 9, 100)]
    [12.706, 4.303, 2.262, 1.984]
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (df - 1)
    within = np.cumsum(density[1:] + density[:-1])
    angle = np.interp((1 - ERROR_RATE) * within[-1], within, angles[1:])
    return math.sqrt(df) * math.tan(angle)


def _standard_error(values: Sequence[float] | npt.NDArray[np.float64]) -> float:
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))
