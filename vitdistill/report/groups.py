"""Runs of one recipe with several seeds together, and what is asked of two recipes."""

import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .cost import Paid, costs_of
from .files import Run
from .verdict import Comparison, Scores, compare


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds.

    Args:
        name: what people call it.
        runs: at least one, with what each cost.
    """

    name: str
    runs: Sequence[Run]
    paid: Sequence[Paid]

    @property
    def recipe(self) -> Any:
        return self.runs[0].recipe

    @property
    def taught(self) -> bool:
        return bool(self.recipe.teachers)

    def mean(self, read: Callable[[Run], float | None]) -> float | None:
        """Return the mean over the runs; None where one of them does not say."""
        values = [read(run) for run in self.runs]
        return None if None in values else statistics.fmean(value or 0 for value in values)

    def score(self, name: str) -> float | None:
        return self.mean(lambda run: run.scores.get(name))

    def cost(self, name: str) -> float | None:
        """Return the mean of a cost over the runs; None where it is not known of one."""
        values = [getattr(paid, name) for paid in self.paid]
        return None if None in values else statistics.fmean(values)

    @property
    def scores(self) -> Scores | None:
        """Return the top-1 of its finished runs, for statistics; None: there is none."""
        done = [run for run in self.runs if run.summary and "top1" in run.scores]
        if not done:
            return None
        answered = {
            run.seed: run.answers.right
            for run in done
            if run.answers is not None and run.answers.images == run.val_images
        }
        count = int(min(run.scores.get("num_samples", 1) for run in done))
        return Scores({run.seed: run.scores["top1"] for run in done}, answered, count)


@dataclass(frozen=True)
class Question:
    """Is ``ours`` better than ``theirs``, which is ``baseline`` or ``rival``."""

    ours: Group
    theirs: Group
    comparison: Comparison

    @property
    def cost_ratio(self) -> float | None:
        """Return how many times the compute of the other one this one took, teachers included."""
        ours, theirs = self.ours.cost("total"), self.theirs.cost("total")
        return ours / theirs if ours and theirs else None


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs of one recipe together, in the order in which each recipe comes first."""
    costs = costs_of(runs)
    made = {digest: run for run in runs for digest in run.weights}
    together: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        together.setdefault(_key(run, made), []).append(i)
    names = [_common_name([runs[i] for i in members]) for members in together.values()]
    above = os.path.commonpath([run.path.absolute().parent for run in runs])
    return [
        Group(
            name if names.count(name) == 1 else os.path.relpath(runs[members[0]].path, above),
            [runs[i] for i in members],
            [costs[i] for i in members],
        )
        for name, members in zip(names, together.values(), strict=True)
    ]


def _key(run: Run, made: dict[str, Run]) -> str:
    """Return what runs of one recipe share: weights of other runs are known by their recipe."""
    found = run.settings
    for field, digest in run.identity.items():
        if field in found and digest in made:
            found[field] = _key(made[digest], made)
    return repr((sorted(found.items()), run.val_images))


def _common_name(runs: Sequence[Run]) -> str:
    """Return the name that runs share, but for the number of their seed, or that of the first."""
    names = dict.fromkeys(run.recipe.name for run in runs)
    plain = {re.sub(r"[-_. ]*(seed)?[-_. ]*\d+$", "", name) for name in names}
    common = plain.pop()
    return common if len(names) > 1 and common and not plain else next(iter(names))


def ask_questions(groups: Sequence[Group]) -> list[Question]:
    """Compare every taught recipe with the same student alone, and with the first taught one.

    Of several recipes of the student alone, the best one is the measure.
    """
    found = []
    for i, group in enumerate(groups):
        if group.scores is not None and group.taught:
            others = [o for o in groups if o is not group and _comparable(group, o)]
            alone = sorted((o for o in others if not o.taught), key=_top1)
            earlier = [o for o in groups[:i] if o in others and o.taught]
            for other in (*alone[-1:], *earlier[:1]):
                assert other.scores is not None
                found.append(Question(group, other, compare(group.scores, other.scores)))
    return found


def _top1(group: Group) -> float:
    return 0.0 if group.scores is None else group.scores.mean


def _comparable(one: Group, other: Group) -> bool:
    """Whether two recipes train the same student and are judged on the same images."""
    sides = [
        ({k: v for k, v in run.settings.items() if k.startswith(_STUDENT)}, run.val_images)
        for run in (one.runs[0], other.runs[0])
    ]
    return one.scores is not None and other.scores is not None and sides[0] == sides[1]


_STUDENT = ("student.model", "student.image_size", "student.checkpoint", "student.pretrained")
"""What makes two students the same; how they are trained may differ."""
