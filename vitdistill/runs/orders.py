"""Whether a teacher's answers fit the classes in the order they have, or in another one better."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

EVIDENCE = 3.0  # nats by which another order has to be the better explanation
_SHARPNESS = tuple(2.0 ** (k / 2) for k in range(-8, 9))
_AT_RANDOM = 0.05  # of the images may be answered at random, so that no single one decides


@dataclass(frozen=True)
class Reordering:
    """Another order of the classes that explains a teacher's answers better."""

    index: tuple[int, ...]  # the place of each of the data set's classes among the teacher's
    natural: bool  # it is that of `natural_order`
    accuracy: float  # in this order
    certain: bool  # the answers themselves prefer it, not their probabilities alone


def natural_order(classes: Sequence[str]) -> tuple[int, ...]:
    """Return the place of each class when people sort them: 2 before 10, capitals as small letters.

    >>> natural_order(["0", "1", "10", "11", "2"])
    (0, 1, 3, 4, 2)
    """

    def key(place: int) -> list[tuple[int, str]]:
        parts = enumerate(re.split(r"(\d+)", classes[place].casefold()))
        numbers = [(i % 2, part.lstrip("0") if i % 2 else part) for i, part in parts]
        return [(len(part) * is_number, part) for is_number, part in numbers]

    ordered = sorted(range(len(classes)), key=key)
    return tuple(sorted(range(len(classes)), key=ordered.__getitem__))


def alignment(logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Return how much better answers fit the labels than in a random order of the classes.

    In standard deviations over all orders (Hoeffding 1951). The rows of an untrained head are
    exchangeable, so this is about normal for one, whatever the features below know of the classes.
    """
    scores = logits.double().softmax(-1)
    seen, rows = labels.unique(return_inverse=True)
    table = scores.new_zeros(len(seen), scores.shape[1])
    table.index_add_(0, rows, scores - scores.mean(0))
    spread = (table.square().sum() / (scores.shape[1] - 1)).sqrt()
    return float(table[torch.arange(len(seen)), seen].sum() / spread.clamp_min(1e-300))


def log_likelihoods(
    logits: Float[Tensor, "N C"], orders: Sequence[Int[Tensor, " N"]]
) -> Float[Tensor, "N C"]:
    """Return the log-probability of every answer, as sharp as suits the best of ``orders`` best.

    Networks are sure of themselves to different degrees, and one is believed as far as its record
    warrants.
    """
    scores = logits.double() - logits.double().mean(1, keepdim=True)
    scores = scores / scores.std().clamp_min(1e-12)
    images, best, found = torch.arange(len(scores)), -math.inf, scores
    for sharpness in _SHARPNESS:
        answers = (scores * sharpness).softmax(-1)
        logs = ((1 - _AT_RANDOM) * answers + _AT_RANDOM / scores.shape[1]).log()
        likelihood = max(float(logs[images, order].sum()) for order in orders)
        if likelihood > best:
            best, found = likelihood, logs
    return found


def find_better_order(
    logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"], classes: Sequence[str]
) -> Reordering | None:
    """Return the order of the classes that explains the answers best, if it is not the present one.

    The natural order is tried, and any order of the classes that have images: there, each class
    that moves costs ``log C`` nats, the price of naming its new place.
    """
    images, answers = torch.arange(len(labels)), logits.argmax(1)
    seen, rows = labels.unique(return_inverse=True)
    natural, present = torch.tensor(natural_order(classes)), torch.arange(len(seen))

    def sums(scores: Float[Tensor, "N C"]) -> Float[Tensor, "K K"]:
        return scores.new_zeros(len(seen), len(seen)).index_add_(0, rows, scores[:, seen])

    start = _improve(sums(logits.double() - logits.double().mean(0)), present)
    logs = log_likelihoods(logits, [labels, natural[labels], seen[start][rows]])
    table = sums(logs) + math.log(len(classes)) * torch.eye(len(seen))
    orders = [_improve(table, order) for order in (present, start)]
    values = [float(table[present, order].sum() - table.trace()) for order in orders]
    gain = float((logs[images, natural[labels]] - logs[images, labels]).sum())
    is_natural = gain > max(EVIDENCE, *values)
    if not is_natural and max(values) < EVIDENCE:
        return None
    index = natural
    if not is_natural:
        index = torch.arange(len(classes))
        index[seen] = seen[orders[values.index(max(values))]]
    moved = index[labels] != labels
    new, old = answers == index[labels], answers == labels
    gained, lost = int((new & moved).sum()), int((old & moved).sum())
    certain = gained - lost > 4 * math.sqrt(gained + lost)
    return Reordering(tuple(index.tolist()), is_natural, float(new.double().mean()), certain)


def _improve(table: Float[Tensor, "K K"], order: Int[Tensor, " K"]) -> Int[Tensor, " K"]:
    """Exchange columns of pairs of rows as long as that raises the sum."""
    order, rows = order.clone(), torch.arange(len(order))
    for _ in rows:
        crossed = table[:, order]
        now = crossed.diagonal()
        gain, partner = (crossed + crossed.T - now[:, None] - now).max(1)
        # Pairs that gain most by each other do not disturb one another.
        pairs = (partner[partner] == rows) & (gain > 1e-9)
        if not bool(pairs.any()):
            break
        order[pairs] = order[partner[pairs]]
    return order
