"""The results of each recipe and what it cost, a row a recipe."""

import math
from collections.abc import Callable, Sequence

from ..messages import format_bytes, format_count, format_duration
from .document import Table
from .groups import Group

Column = Callable[[Group], str]
_PERCENT = "{:.1%}".format
_COUNT = "{:,.0f}".format


def tabulate_scores(groups: Sequence[Group]) -> Table:
    """Return accuracy, calibration, and agreement with the teacher where it is known."""

    def error(kind: str) -> Column:
        def show(group: Group) -> str:
            value = getattr(group.scores, kind, math.nan)
            return "" if math.isnan(value) else f"{100 * value:.1f}"

        return show

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
    return _table("What it learnt, means over the runs of a recipe", groups, columns)


def tabulate_costs(groups: Sequence[Group]) -> Table:
    """Return what was counted, of labels and teachers too, and what was measured."""

    def flops(name: str) -> Column:
        return _show(lambda group: group.cost(name) or None, format_count)

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
    return _table("What it cost, means over the runs of a recipe", groups, columns)


def _table(caption: str, groups: Sequence[Group], columns: dict[str, Column]) -> Table:
    """Leave out columns of which nothing is known."""
    cells = {head: [show(group) for group in groups] for head, show in columns.items()}
    known = {head: column for head, column in cells.items() if any(column)}
    rows = [(g.name, *(known[head][i] for head in known)) for i, g in enumerate(groups)]
    return Table(caption, ("recipe", *known), rows)


def _score(name: str, write: Callable[[float], str]) -> Column:
    return _show(lambda group: group.score(name), write)


def _show(read: Callable[[Group], float | None], write: Callable[[float], str]) -> Column:
    return lambda group: "" if (value := read(group)) is None else write(value)


def _count_runs(group: Group) -> str:
    done, count = sum(bool(run.summary) for run in group.runs), len(group.runs)
    return str(done) if done == count else f"{done} of {count} finished"
