"""Whether another order of a teacher's classes explains its answers better than the present one."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

EVIDENCE = 3.0  # nats by which another order has to be the better explanation
_SHARPNESS = tuple(2.0 ** (k / 2) for k in range(-8, 9))
_AT_RANDOM = 0.05  # fraction of answers that may be random, so that no single one decides


@dataclass(frozen=True)
class Reordering:
    """Another order of the classes that explains a teacher's answers better."""

    index: tuple[int, ...]  # the place of each of the data set's classes among the teacher's
    natural: bool  # it is that of `natural_order`
    accuracy: float  # in this order
    certain: bool  # the top answers prefer it, not just the probabilities


def natural_order(classes: Sequence[str]) -> tuple[int, ...]:
    """Return the place of each class in natural order: 2 before 10, ignoring case.

    >>> natural_order(["0", "1", "10", "11", "2"])
    (0, 1, 3, 4, 2)
    """

    def key(place: int) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", classes[place].casefold())
        parts[1::2] = [number.lstrip("0") for number in parts[1::2]]
        # Of two numbers the one with fewer digits comes first.
        return [(len(part) if i % 2 else 0, part) for i, part in enumerate(parts)]

    ordered = sorted(range(len(classes)), key=key)
    return tuple(sorted(range(len(classes)), key=ordered.__getitem__))


def alignment(logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Return how much better answers fit the labels than in a random order of the classes.

    In standard deviations over all orders (Hoeffding 1951). The rows of an untrained head are
    exchangeable, so this is about normal for it, whatever the features know of the classes.
    """
    scores = logits.double().softmax(-1)
    seen, rows = labels.unique(return_inverse=True)
    table = _add_rows(scores - scores.mean(0), rows)
    spread = (table.square().sum() / (scores.shape[1] - 1)).sqrt()
    return float(table[torch.arange(len(seen)), seen].sum() / spread.clamp_min(1e-300))


def log_likelihoods(logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the log-probability of each label, at the sharpness that maximises their sum."""
    each = [_pick(logs, labels) for logs in _temper(logits)]
    return max(each, key=lambda found: float(found.sum()))


def find_better_order(
    logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"], classes: Sequence[str]
) -> Reordering | None:
    """Return the order of the classes that explains the answers best, if it is not the present one.

    The natural order is tried, and any order of the classes that have images: there, each class
    that moves costs ``log C`` nats, the price of naming its new place.
    """
    seen, rows = labels.unique(return_inverse=True)
    present, natural = torch.arange(len(classes)), torch.tensor(natural_order(classes))
    price, found, most = math.log(len(classes)), present, -math.inf
    for logs in _temper(logits):
        chosen = _exchange(_add_rows(logs[:, seen], rows), price)
        order = present.index_copy(0, seen, seen[chosen])
        value = float(_pick(logs, order[labels]).sum() - price * (order != present).sum())
        if value > most:
            found, most = order, value
    now, then = (
        float(log_likelihoods(logits, order[labels]).sum()) for order in (present, natural)
    )
    if max(then, most) < now + EVIDENCE:
        return None
    order = natural if then > most else found
    answers = logits.argmax(1)
    new, old = answers == order[labels], answers == labels
    gained, lost = int((new & ~old).sum()), int((old & ~new).sum())
    certain = gained - lost > 4 * math.sqrt(gained + lost)
    index, accuracy = tuple(order.tolist()), float(new.double().mean())
    return Reordering(index, order is natural, accuracy, certain)


def _temper(logits: Float[Tensor, "N C"]) -> Iterator[Float[Tensor, "N C"]]:
    """Yield the log-probabilities of all answers, from nearly uniform to nearly certain.

    Networks differ in confidence; each is believed as far as its record warrants.
    """
    scores = logits.double() - logits.double().mean(1, keepdim=True)
    scores = scores / scores.std().clamp_min(1e-12)
    for sharpness in _SHARPNESS:
        answers = (scores * sharpness).softmax(-1)
        yield ((1 - _AT_RANDOM) * answers + _AT_RANDOM / scores.shape[1]).log()


def _pick(scores: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    return scores.gather(1, labels[:, None])[:, 0]


def _add_rows(scores: Float[Tensor, "N C"], rows: Int[Tensor, " N"]) -> Float[Tensor, "K C"]:
    return scores.new_zeros(int(rows.max()) + 1, scores.shape[1]).index_add_(0, rows, scores)


def _exchange(table: Float[Tensor, "K K"], price: float) -> Int[Tensor, " K"]:
    """Exchange columns while that raises the diagonal's sum less a price for each moved column."""
    rows = torch.arange(len(table))
    order, table = rows.clone(), table + price * torch.eye(len(table))
    for _ in rows:
        crossed = table[:, order]
        now = crossed.diagonal()
        gain, partner = (crossed + crossed.T - now[:, None] - now).max(1)
        # Pairs that gain most from each other are disjoint.
        pairs = (partner[partner] == rows) & (gain > 1e-9)
        if not bool(pairs.any()):
            break
        order[pairs] = order[partner[pairs]]
    return order
