"""Which charts there are: accuracy against cost, and curves."""

from collections import Counter
from collections.abc import Sequence

from .document import Block, Chart, Charts, Point, Series
from .groups import Group

MOST_POINTS = 300
"""Points drawn of a curve; longer ones are thinned out."""
MOST_LINES = 8  # the best ones, all their runs
CURVES = (
    ("eval", "top1", "Top-1 on validation images", "top-1 (%)", 100),
    ("eval", "knn_top1", "k-NN top-1 on validation images", "top-1 (%)", 100),
    ("eval", "nll", "Negative log-likelihood on validation images", "nats", 1),
    ("train", "loss", "Training loss, as weighted in each recipe", "loss", 1),
)


def draw_scatters(groups: Sequence[Group]) -> list[Block]:
    """Plot every run by the compute of its training, and by that of a prediction.

    The first chart has students of the commonest size only: larger ones are no rivals.
    """
    numbered = [*enumerate(groups)]
    rivals = [pair for pair in numbered if not pair[1].serves]
    sizes = Counter(group.cost("prediction") for _, group in rivals)
    alike = [(i, g) for i, g in rivals if g.cost("prediction") == sizes.most_common(1)[0][0]]
    title = "What training took" + (", of students of one size" if len(sizes) > 1 else "")
    charts = [
        _scatter(alike, "total", title, "training compute, all together (FLOPs)"),
        _scatter(numbered, "prediction", "What a prediction takes", "a prediction (FLOPs)"),
    ]
    drawn = [chart for chart in charts if chart is not None]
    return [Charts(drawn), *([f"{c.title}: {c.alt}."] for c in drawn)] if drawn else []


def _scatter(groups: Sequence[tuple[int, Group]], cost: str, title: str, x: str) -> Chart | None:
    """Return the chart, with the frontier of means; None where there is nothing to compare."""
    drawn: list[tuple[Point, Series]] = []
    for number, group in groups:
        pairs = zip(group.runs, (getattr(paid, cost) for paid in group.paid), strict=True)
        points = [(c, 100 * run.scores["top1"]) for run, c in pairs if c and "top1" in run.scores]
        if points:
            mean = sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)
            alone = len(points) == 1
            drawn.append((mean, Series(group.name, number, () if alone else points, mean)))
    means = sorted((mean for mean, _ in drawn), key=lambda point: (point[0], -point[1]))
    if len({mean[0] for mean in means}) < 2:
        return None
    frontier: list[Point] = []
    for point in means:
        if not frontier or point[1] > frontier[-1][1]:
            frontier.append(point)
    best = ", ".join(series.name for mean, series in drawn if mean in frontier)
    alt = f"on the Pareto frontier: {best}"
    log = means[-1][0] > 8 * means[0][0]
    return Chart(title, alt, x, "top-1 (%)", [s for _, s in drawn], frontier, log)


def draw_curves(groups: Sequence[Group]) -> list[Block]:
    """Draw what the runs of the best logged, a line a run."""
    charts, rivals = [], [*enumerate(group for group in groups if not group.serves)]
    for kind, name, title, y, factor in CURVES:
        drawn, ends = [], []
        for number, group in rivals[:MOST_LINES]:
            for points in (run.curve(kind, name) for run in group.runs):
                if len(points) > 1:
                    scaled = [(a, factor * b) for a, b in points]
                    step = -(-len(points) // MOST_POINTS)
                    drawn.append(Series(group.name, number, scaled[::-step][::-1]))
                    ends.append(f"{group.name} from {scaled[0][1]:.4g} to {scaled[-1][1]:.4g}")
        if drawn:
            charts.append(Chart(title, "; ".join(ends), "epoch", y, drawn, whole=True))
    left = [[f"Of the best {MOST_LINES} of {len(rivals)}:"]] if len(rivals) > MOST_LINES else []
    return [*left, Charts(charts)] if charts else []
