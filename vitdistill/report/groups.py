"""Runs of one recipe with several seeds together, and what is asked of two recipes."""

import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
        student: identifies its student, whatever weights of these runs it began with.
        taught: a teacher taught it, or what it began with.
        serves: what it is to others, a first stage or a teacher; "": it is a result.
    """

    name: str
    runs: Sequence[Run]
    paid: Sequence[Paid]
    student: str
    taught: bool
    serves: str = ""

    @property
    def recipe(self) -> Any:
        return self.runs[0].recipe

    @property
    def top1(self) -> float:
        """Top-1, mean over its finished runs; 0: there is none."""
        return self.scores.mean if self.scores else 0.0

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
    """Is ``ours`` better than ``theirs``: the best of ``best_of`` without a teacher or, at 0,
    another with one?
    """

    ours: Group
    theirs: Group
    best_of: int
    comparison: Comparison

    @property
    def measure(self) -> str:
        """Say what the other one is."""
        if not self.best_of:
            return "the first with a teacher"
        best = f"the best of {self.best_of} of " if self.best_of > 1 else ""
        return f"{best}the same student without a teacher"

    @property
    def cost_ratio(self) -> float | None:
        """Return the compute of ours over that of theirs, teachers included."""
        ours, theirs = self.ours.cost("total"), self.theirs.cost("total")
        return ours / theirs if ours and theirs else None


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by recipe, in the order in which recipes first appear."""
    costs = costs_of(runs)
    made = {digest: run for run in runs for digest in run.weights}
    together: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        together.setdefault(_key(run, made), []).append(i)
    names = [_common_name([runs[i] for i in members]) for members in together.values()]
    above = os.path.commonpath([run.path.absolute().parent for run in runs])
    groups = []
    for name, members in zip(names, together.values(), strict=True):
        first = runs[members[0]]
        group = Group(
            name if names.count(name) == 1 else os.path.relpath(first.path, above),
            [runs[i] for i in members],
            [costs[i] for i in members],
            repr(sorted(_student(first, made).items())),
            any(run.recipe.teachers for run in _lineage(first, made)),
        )
        groups.append(group)
    return [replace(group, serves=_serves(group, groups)) for group in groups]


def _serves(group: Group, groups: Sequence[Group]) -> str:
    """Say what a group only serves as. A teacher is a result if its network is also taught."""
    made = {digest for run in group.runs for digest in run.weights}
    others = [run.needed.items() for g in groups if g is not group for run in g.runs]
    fields = {field for needed in others for field, digest in needed if digest in made}
    rivals = any(other.taught and _comparable(group, other) for other in groups)
    if fields - {"student.model"} and not rivals:
        return "teacher"
    return "first stage" if fields >= {"student.model"} else ""


def _key(run: Run, made: dict[str, Run]) -> str:
    """Return the key of a run's recipe; weights of other runs stand for their recipe."""
    found = run.settings
    for field, digest in run.needed.items():
        if field in found and digest in made:
            found[field] = _key(made[digest], made)
    return repr((sorted(found.items()), run.val_images))


def _lineage(run: Run, made: dict[str, Run]) -> list[Run]:
    """Return the runs whose weights its student began with, in order, then the run itself."""
    source = made.get(run.identity.get("student.model", ""))
    return [run] if source is None or source is run else [*_lineage(source, made), run]


def _student(run: Run, made: dict[str, Run]) -> dict[str, Any]:
    """Return the settings that make students the same; their training and pooling may differ."""
    found: dict[str, Any] = {}
    for part in _lineage(run, made):
        own = {k: v for k, v in part.settings.items() if k.startswith(_STUDENT)}
        own.pop("student.model_args.global_pool", None)
        if found:  # it goes on with these weights
            own = {k: v for k, v in own.items() if k != "student.model" and v}
        found |= own
    return found


_STUDENT = ("student.model", "student.image_size", "student.checkpoint", "student.pretrained")


def _common_name(runs: Sequence[Run]) -> str:
    """Return the name that runs share, apart from the number of their seed, else the first one's;
    and their stage.
    """
    names = dict.fromkeys(run.names[0] for run in runs)
    plain = {re.sub(r"[-_. ]*(seed)?[-_. ]*\d+$", "", name) for name in names}
    common, stage = plain.pop(), runs[0].names[1]
    name = common if len(names) > 1 and common and not plain else next(iter(names))
    return f"{name} (stage {stage})" if stage else name


def ask_questions(groups: Sequence[Group]) -> list[Question]:
    """Compare every taught recipe with the same student alone, and with the first taught one.

    Of several recipes of the student alone, the best one is the measure, of those with more than
    one seed if there are any.
    """
    found = []
    for i, group in enumerate(groups):
        ours = group.scores
        if ours is None or not group.taught:
            continue
        others = [(j, o, o.scores) for j, o in enumerate(groups) if _comparable(group, o)]
        alone = [(o, theirs) for _, o, theirs in others if theirs and not o.taught]
        alone.sort(key=lambda pair: (len(pair[1].top1) > 1, pair[1].mean))
        earlier = [(o, theirs) for j, o, theirs in others if theirs and o.taught and j < i]
        for other, theirs in (*alone[-1:], *earlier[:1]):
            best_of = 0 if other.taught else len(alone)
            found.append(Question(group, other, best_of, compare(ours, theirs)))
    return found


def _comparable(one: Group, other: Group) -> bool:
    """Whether two recipes train the same student and are judged on the same images."""
    return one.student == other.student and one.runs[0].val_images == other.runs[0].val_images
