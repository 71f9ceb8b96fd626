"""Preflight: before money is spent, every teacher is proved on a slice of the validation images."""

import math
from collections.abc import Callable, Iterable

import torch

from ..data.loader import Batch
from ..errors import ConfigError, NonFiniteError
from ..metrics import Metrics
from ..teacher import Teacher
from ..vit import Needs

NUM_IMAGES = 512


@torch.no_grad()
def prove_teacher(
    teacher: Teacher, batches: Iterable[Batch], num_classes: int, device: torch.device, merge: Callable[[torch.Tensor], None]
) -> dict[str, float]:
    """The teacher's metrics on labelled images it has not been trained on.

    Args:
        batches: validation images in the student's normalisation.
        merge: sums a tensor over all processes, in place.

    Raises:
        NonFiniteError: an answer is NaN or infinite.
        ConfigError: its accuracy is that of chance: weights not loaded, classes in another order, or a wrong input contract. When
            another order of its classes would explain its answers, the sentence says so.
    """
    name, architecture = teacher.network.name, teacher.network.architecture
    metrics = Metrics(device)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for batch in batches:
        logits = teacher(batch.images, Needs(logits=True)).logits
        assert logits is not None
        metrics.update(logits.float(), batch.labels)
        confusion.view(-1).index_add_(0, batch.labels * num_classes + logits.argmax(-1), torch.ones_like(batch.labels))
    merge(confusion)
    metrics.merge_across_processes()
    try:
        scores = metrics.compute()
    except NonFiniteError:
        raise NonFiniteError(
            f"the {name} ({architecture}) answers with NaN or infinity on validation images: check its weights and precision"
        ) from None
    count, accuracy = scores["num_samples"], scores["top1"]
    if accuracy > chance_level(count, num_classes):
        return scores
    reordered = reordered_accuracy(confusion)
    reason = "its weights are not loaded, its classes are in another order, or its normalisation is not its own"
    if reordered > max(0.5, 5 * chance_level(count, num_classes)) and count >= 5 * num_classes:
        reason = f"its classes look permuted: in another order it would be right on {reordered:.1%}"
    raise ConfigError(
        f"the {name} ({architecture}) is right on {accuracy:.1%} of {count:.0f} validation images, which is chance for {num_classes} "
        f"classes: {reason}"
    )


def chance_level(count: float, num_classes: int) -> float:
    """The accuracy a guessing network stays below, but for one time in a thousand: chance plus 3.1 standard deviations."""
    chance = 1 / num_classes
    return min(chance + 3.1 * math.sqrt(chance * (1 - chance) / max(count, 1)), 0.999)


def reordered_accuracy(confusion: torch.Tensor) -> float:
    """The best accuracy any reordering of the answers could have, greedily: each answer class stands for one label."""
    table = confusion.clone().cpu()
    right = 0
    for _ in range(len(table)):
        best = int(table.argmax())
        row, column = divmod(best, table.shape[1])
        right += int(table[row, column])
        table[row, :] = -1
        table[:, column] = -1
    return right / max(int(confusion.sum()), 1)
