"""Which charts there are: accuracy against cost, and curves."""

from collections import Counter
from collections.abc import Sequence

from .document import Block, Chart, Charts, Series
from .groups import Group

MOST_POINTS = 300
"""Points of a curve; of a longer one every so many are drawn."""
CURVES = (
    ("eval", "top1", "Top-1 on validation images", "top-1 (%)", 100),
    ("eval", "knn_top1", "k-NN top-1 on validation images", "top-1 (%)", 100),
    ("eval", "nll", "Negative log-likelihood on validation images", "nats", 1),
    ("train", "loss", "Training loss, as weighted in each recipe", "loss", 1),
)

Numbered = Sequence[tuple[int, Group]]


def draw_scatters(groups: Sequence[Group]) -> list[Block]:
    """Draw every run by what its training took, and by what a prediction of its student takes.

    A larger student is no rival in the first: only those of the commonest size are in it.
    """
    numbered = [*enumerate(groups)]
    sizes = Counter(group.cost("prediction") for group in groups)
    size = sizes.most_common(1)[0][0]
    alike = [(i, group) for i, group in numbered if group.cost("prediction") == size]
    title = "What training took" + (", of students of one size" if len(sizes) > 1 else "")
    charts = [
        _scatter(alike, "total", title, "training compute, all together (FLOPs)"),
        _scatter(numbered, "prediction", "What a prediction takes", "a prediction (FLOPs)"),
    ]
    drawn = [chart for chart in charts if chart is not None]
    return [Charts(drawn), *([f"{c.title}: {c.alt}."] for c in drawn)] if drawn else []


def _scatter(groups: Numbered, cost: str, title: str, x: str) -> Chart | None:
    """Return the chart, with the frontier of means; None where there is nothing to compare."""
    small, large = [], []
    for number, group in groups:
        pairs = zip(group.runs, (getattr(paid, cost) for paid in group.paid), strict=True)
        points = [(c, 100 * run.scores["top1"]) for run, c in pairs if c and "top1" in run.scores]
        if points:
            costs, scores = zip(*points, strict=True)
            mean = sum(costs) / len(costs), sum(scores) / len(scores)
            large.append(Series(group.name, number, [mean]))
            small.append(Series(group.name, number, points if len(points) > 1 else ()))
    means = sorted((s.points[0] for s in large), key=lambda point: (point[0], -point[1]))
    if len({cost for cost, _ in means}) < 2:
        return None
    frontier: list[tuple[float, float]] = []
    for point in means:
        if not frontier or point[1] > frontier[-1][1]:
            frontier.append(point)
    best = ", ".join(series.name for series in large if series.points[0] in frontier)
    alt = f"on the frontier, where nothing else is as good for less: {best}"
    log = means[-1][0] > 8 * means[0][0]
    return Chart(title, alt, x, "top-1 (%)", small, False, frontier, large, log)


def draw_curves(groups: Sequence[Group]) -> list[Block]:
    """Draw what runs logged, a line a run."""
    charts = []
    for kind, name, title, y, factor in CURVES:
        drawn = [
            Series(group.name, number, _thin([(a, factor * b) for a, b in run.curve(kind, name)]))
            for number, group in enumerate(groups)
            for run in group.runs
        ]
        drawn = [series for series in drawn if len(series.points) > 1]
        if drawn:
            ends = "; ".join(f"{series.name} from {_ends(series)}" for series in drawn)
            charts.append(Chart(title, ends, "epoch", y, drawn))
    return [Charts(charts)] if charts else []


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    step = -(-len(points) // MOST_POINTS) or 1
    return points[::-step][::-1]


def _ends(series: Series) -> str:
    (first, begun), (last, ended) = series.points[0], series.points[-1]
    return f"{begun:.4g} at epoch {first:.3g} to {ended:.4g} at epoch {last:.3g}"
