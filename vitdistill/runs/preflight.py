"""Preflight: before money is spent, every teacher is proved on a slice of the validation images."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..data.batch import Batch
from ..distill.teacher import Teacher
from ..errors import ConfigError, NonFiniteError
from ..memory import SMALLER_EVALUATION, memory_errors
from ..vit.needs import Needs
from ..world import World, agreed

NUM_IMAGES = 512


@dataclass(frozen=True)
class Proof:
    """A teacher's accuracy on ``num_images`` validation images, and what its answers would reach
    without looking at them.
    """

    accuracy: float
    chance: float
    num_images: int


@torch.no_grad()
def prove_teacher(
    teacher: Teacher, batches: Iterable[Batch], classes: Sequence[str], world: World
) -> Proof:
    """Prove a teacher on this process's share of labelled images it has not been trained on; call
    it on every process.

    Args:
        batches: validation images in the student's normalisation.
        classes: of the data set, in the order of the logits.

    Raises:
        NonFiniteError: an answer is NaN or infinite.
        ConfigError: its accuracy is that of chance: weights not loaded, classes in another order,
            or a wrong input contract. When another order of its classes would explain its answers,
            the sentence says so.
    """
    name = f"the {teacher.network.name} ({teacher.network.architecture})"
    pairs: list[tuple[int, int]] = []
    with world.together(), memory_errors("while the teacher was tried", SMALLER_EVALUATION):
        for batch in batches:
            logits = teacher(batch.images, Needs(logits=True)).logits
            assert logits is not None
            if not bool(logits.isfinite().all()):
                raise NonFiniteError(
                    f"{name} answers with NaN or infinity on validation images: check its weights"
                    " and precision"
                )
            pairs += zip(batch.labels.tolist(), logits.argmax(-1).tolist(), strict=True)
    return _judge(teacher, [pair for part in world.gather(pairs) for pair in part], classes)


def _judge(teacher: Teacher, pairs: Sequence[tuple[int, int]], classes: Sequence[str]) -> Proof:
    """Compare answers with labels, the same (label, answer) pairs on every process."""
    count, right = len(pairs), sum(label == answer for label, answer in pairs)
    proof = Proof(right / max(count, 1), chance_accuracy(pairs), count)
    if proof.accuracy > chance_level(proof.chance, count):
        return proof
    reason = (
        "its weights are not loaded, its classes are in another order, or its normalisation is not"
        " its own"
    )
    order = best_order(pairs)
    reordered = sum(order.get(answer) == label for label, answer in pairs) / max(count, 1)
    # Half the way from chance to perfection: luck and the freedom to choose an order stay below.
    moved = sorted((answer, label) for answer, label in order.items() if answer != label)
    if moved and count >= 5 * len(classes) and reordered > (1 + proof.chance) / 2:
        answer, label = moved[0]
        reason = (
            f"its classes look permuted: in another order it would be right on {reordered:.1%} (its"
            f" class {answer} is the data set's {label}, {classes[label]!r})"
        )
    name = teacher.network.name
    raise agreed(
        ConfigError(
            f"the {name} ({teacher.network.architecture}) is right on {proof.accuracy:.1%} of"
            f" {count} validation images, which is not above chance ({proof.chance:.1%} for"
            f" {len(classes)} classes): {reason}",
            field=f"teachers.{name}",
        )
    )


@torch.no_grad()
def prove_features(teacher: Teacher, needs: Needs, batches: Iterable[Batch], world: World) -> None:
    """Check what is recorded of a teacher without a classifier to judge it by; call it on every
    process.

    Raises:
        NonFiniteError: something recorded is NaN or infinite.
        ConfigError: it is the same for every image, which no trained network gives.
    """
    name = f"the {teacher.network.name} ({teacher.network.architecture})"
    with world.together(), memory_errors("while the teacher was tried", SMALLER_EVALUATION):
        for batch in batches:
            for recorded in teacher(batch.images, needs).tensors():
                if not bool(recorded.isfinite().all()):
                    raise NonFiniteError(
                        f"{name} gives NaN or infinity on validation images: check its weights and"
                        " precision"
                    )
                if len(recorded) > 1 and bool((recorded == recorded[:1]).all()):
                    raise ConfigError(
                        f"{name} gives the same features for every image: its weights are not"
                        " loaded"
                    )


def chance_accuracy(pairs: Sequence[tuple[int, int]]) -> float:
    """The accuracy of these (label, answer) pairs if answers had nothing to do with labels; 1/C
    only where both are balanced.
    """
    labels, answers = Counter(label for label, _ in pairs), Counter(answer for _, answer in pairs)
    return sum(labels[c] * answers[c] for c in labels) / max(len(pairs), 1) ** 2


def chance_level(chance: float, count: int) -> float:
    """The accuracy a guessing network stays below, but for one time in a thousand: chance plus 3.1
    standard deviations.

    Never more than 0.1 above chance, so that a useful teacher is not refused because few images are
    there to prove it on.
    """
    return chance + min(3.1 * math.sqrt(chance * (1 - chance) / max(count, 1)), 0.1)


def best_order(pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Which label each answer class would best stand for, each label once; greedily, the surest
    first.
    """
    order: dict[int, int] = {}
    for (label, answer), _ in Counter(pairs).most_common():
        if answer not in order and label not in order.values():
            order[answer] = label
    return order
