"""Tables of verdicts, scores and costs, with a row for each recipe."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..messages import format_bytes, format_count, format_duration
from .document import Table, Word
from .groups import Group, Question
from .verdict import ERROR_RATE

Column = Callable[[Any], str]
_PERCENT = "{:.1%}".format
_COUNT = "{:,.0f}".format


def tabulate_questions(questions: Sequence[Question]) -> Table:
    """Return the answers to questions against the same runs, the best first."""
    asked = sorted(questions, key=lambda q: -q.comparison.difference)
    several = any(q.comparison.num_seeds > 1 for q in asked)
    columns: dict[str, Column] = {
        "top-1": lambda q: _PERCENT(q.ours.top1),
        "difference, points": lambda q: f"{100 * q.comparison.difference:+.1f}",
        f"{1 - ERROR_RATE:.0%} interval": lambda q: (
            f"{100 * q.comparison.low:+.1f} to {100 * q.comparison.high:+.1f}"
        ),
        "verdict": lambda q: Word(q.comparison.verdict) if several else "",
        "times its training compute": _show(lambda q: q.cost_ratio, "{:.2g}".format),
        "difference ± images": lambda q: _points(q.comparison.images_error),
        "difference ± seeds": lambda q: _points(q.comparison.seeds_error),
        "seeds": lambda q: f"{q.comparison.num_seeds}" if several else "",
    }
    counts = Counter(q.comparison.verdict for q in asked if several).items()
    words = ", ".join(f"{word} ({count})" for word, count in counts)
    caption = f"Against {asked[0].theirs.name}, {asked[0].measure}"
    caption += f"; verdicts: {words}" if several else ""
    return _table(caption, [q.ours.name for q in asked], asked, columns)


def tabulate_scores(groups: Sequence[Group]) -> Table:
    """Return accuracy, calibration, and agreement with the teacher where it is known."""

    def error(kind: str) -> Column:
        return lambda group: _points(getattr(group.scores, kind, math.nan))

    def of_teachers(read: Callable[[Group, str], str]) -> Column:
        def show(group: Group) -> str:
            known = {name: read(group, name) for name in group.recipe.teachers}
            texts = [(name, text) for name, text in known.items() if text]
            return ", ".join(text if len(texts) == 1 else f"{n} {text}" for n, text in texts)

        return show

    def top1(group: Group, teacher: str) -> str:
        value = group.mean(lambda run: run.top1_of(teacher)[0])
        count = min(run.top1_of(teacher)[1] for run in group.runs)
        return "" if value is None else f"{value:.1%} of {count:,}"

    def agreement(group: Group, teacher: str) -> str:
        value = group.score(f"agreement.{teacher}")
        return "" if value is None else f"{value:.1%}"

    columns = {
        "role": lambda group: group.serves or f"with{'' if group.taught else 'out'} a teacher",
        "runs": _count_runs,
        "top-1": _score("top1", _PERCENT),
        "± seeds": error("seeds_error"),
        "± images": error("images_error"),
        "top-1, best epoch": _show(
            lambda group: group.mean(lambda run: run.summary.get("best_top1")), _PERCENT
        ),
        "k-NN top-1": _score("knn_top1", _PERCENT),
        "calibration error": _score("ece", _PERCENT),
        "negative log-likelihood": _score("nll", "{:.3f}".format),
        "its teacher's top-1": of_teachers(top1),
        "agrees with it on": of_teachers(agreement),
    }
    return _table("What it learnt", [group.name for group in groups], groups, columns)


def tabulate_costs(groups: Sequence[Group]) -> Table:
    """Return what was counted, of labels and teachers too, and what was measured."""

    def flops(name: str) -> Column:
        return _show(lambda group: group.cost(name) or None, lambda count: format_count(count, ""))

    columns = {
        "a prediction": flops("prediction"),
        "teachers, a training image": flops("teachers"),
        "this training": flops("own"),
        "stored labels": flops("labels"),
        "runs before it": flops("before"),
        "all together": flops("total"),
        "time": _show(lambda g: g.mean(lambda run: run.summary.get("seconds")), format_duration),
        "images/s": _show(lambda g: g.mean(lambda run: run.images_per_second), _COUNT),
        "memory": _show(lambda g: g.cost("memory"), lambda value: format_bytes(int(value))),
        "predictions/s": _score("images_per_second", _COUNT),
    }
    caption = "What it cost: FLOPs, then what was measured"
    return _table(caption, [group.name for group in groups], groups, columns)


def _table(
    caption: str, names: Sequence[str], items: Sequence[Any], columns: dict[str, Column]
) -> Table:
    """Leave out columns of which nothing is known."""
    cells = {head: [show(item) for item in items] for head, show in columns.items()}
    known = {head: column for head, column in cells.items() if any(column)}
    return Table(caption, ("name", *known), [*zip(names, *known.values(), strict=True)])


def _points(part: float) -> str:
    return "" if math.isnan(part) else f"{100 * part:.1f}"


def _score(name: str, write: Callable[[float], str]) -> Column:
    return _show(lambda group: group.score(name), write)


def _show(read: Callable[[Any], float | None], write: Callable[[float], str]) -> Column:
    return lambda item: "" if (value := read(item)) is None else write(value)


def _count_runs(group: Group) -> str:
    done, count = sum(bool(run.summary) for run in group.runs), len(group.runs)
    return str(done) if done == count else f"{done} of {count} finished"
