"""Exact accuracy, log-likelihood, calibration, and agreement with a teacher."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..data.loader import EvalLoader
from ..distill.teacher import Teacher
from ..errors import DataError, NonFiniteError
from ..vit.needs import Needs
from ..vit.walk import run_vit
from ..world import World
from .features import Stopped, batches_together

NUM_BINS = 15


class Metrics:
    """Sums over an evaluation: counts int64, the rest float64, on the device without a host sync.

    Every sample must be given exactly once over all processes (no padding). Labels of -1 mean
    unlabelled: such rows count only for the agreement with a teacher. All values are fractions in
    [0, 1] except ``nll`` and ``kl`` (nats a sample).

    >>> metrics = Metrics()
    >>> metrics.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    >>> metrics.compute()["top1"]
    0.5
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._counts = torch.zeros(7 + 2 * NUM_BINS, dtype=torch.int64, device=device)
        self._sums = torch.zeros(2 + NUM_BINS, dtype=torch.float64, device=device)
        # Views: samples, labelled, top-1, top-5, agreeing, with a teacher, unusable; then per bin
        # how many and how many right.
        self._num, self._labelled, self._top1, self._top5, self._agree, self._taught, self._bad = (
            self._counts[:7].unbind()
        )
        self._bin_num, self._bin_right = self._counts[7:].view(2, NUM_BINS).unbind()
        self._nll, self._kl = self._sums[:2].unbind()
        self._bin_confidence = self._sums[2:]

    @torch.no_grad()
    def update(
        self,
        logits: Float[Tensor, "B C"],
        labels: Int[Tensor, "B"],
        teacher_logits: Float[Tensor, "B C"] | None = None,
    ) -> None:
        """Add a batch."""
        num_classes = logits.shape[1]
        logits = logits.detach().double()
        log_probs = logits.log_softmax(dim=1)
        # A row with NaN compares false with everything: without this it would count as right.
        # Infinity gives NaN too; minus infinity only rules a class out.
        finite = ~log_probs.isnan().any(dim=1)
        known = labels >= 0
        usable = finite & (labels < num_classes)
        self._num += logits.shape[0]
        self._bad += (~usable).sum()
        self._add_labelled(logits, log_probs, labels.clamp(0, num_classes - 1), known & usable)
        if teacher_logits is not None:
            of_teacher = teacher_logits.detach().double().log_softmax(dim=1)
            self._add_teacher(log_probs, of_teacher, finite)

    def _add_labelled(
        self, logits: Tensor, log_probs: Tensor, labels: Tensor, counted: Tensor
    ) -> None:
        own = logits.gather(1, labels[:, None])
        earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
        # Ties go to the lower class, as argmax does: a network that answers a constant is right as
        # often as its first class.
        rank = ((logits > own) | (logits == own) & earlier).sum(dim=1)
        right = counted & (rank == 0)
        self._labelled += counted.sum()
        self._top1 += right.sum()
        self._top5 += (counted & (rank < 5)).sum()
        nll = -log_probs.gather(1, labels[:, None])[:, 0]
        self._nll += torch.where(counted, nll, 0).sum()
        confidence = torch.where(counted, log_probs.amax(dim=1).exp(), 0)
        bins = (confidence * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
        self._bin_num.index_add_(0, bins, counted.long())
        self._bin_right.index_add_(0, bins, right.long())
        self._bin_confidence.index_add_(0, bins, confidence)

    def _add_teacher(self, student: Tensor, teacher: Tensor, student_finite: Tensor) -> None:
        counted = student_finite & ~teacher.isnan().any(dim=1)
        self._bad += (student_finite & ~counted).sum()
        self._taught += counted.sum()
        self._agree += (counted & (student.argmax(dim=1) == teacher.argmax(dim=1))).sum()
        # xlogy-like: a class the teacher rules out adds nothing, whatever the student thinks of it.
        term = torch.where(teacher.isneginf(), 0, teacher.exp() * (teacher - student)).sum(dim=1)
        self._kl += torch.where(counted, term, 0).sum()

    def merge_across_processes(self) -> None:
        """Add up the sums of all processes of the default group; call it once, at the end."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._counts)
            dist.all_reduce(self._sums)

    def compute(self) -> dict[str, float]:
        """Return ``num_samples``, and ``top1 top5 nll ece`` (labels), ``agreement kl`` (teacher).

        ``ece`` is the expected calibration error over 15 equal-width bins of the top probability
        (Guo et al. 2017, eq. 3); ``kl`` is KL(teacher || student) at temperature 1.

        Raises:
            NonFiniteError: an answer is NaN or infinite, or a label is beyond the classes.
            DataError: there was no sample.
        """
        counts, sums = self._counts.cpu(), self._sums.cpu()
        num, labelled, top1, top5, agree, taught, bad = counts[:7].tolist()
        if bad:
            raise NonFiniteError(
                f"{bad} of {num} answers are NaN or infinite, or to a label beyond the classes",
                "check the weights, the precision and the class list",
            )
        if num == 0:
            raise DataError("there is no image to evaluate", field="data.dir")
        values: dict[str, Any] = {"num_samples": float(num)}
        if labelled:
            bin_right, bin_confidence = counts[7 + NUM_BINS :].double(), sums[2:]
            off = (bin_right - bin_confidence).abs().sum().item()
            values |= {"top1": top1 / labelled, "top5": top5 / labelled}
            values |= {"nll": sums[0].item() / labelled, "ece": off / labelled}
        if taught:
            values |= {"agreement": agree / taught, "kl": sums[1].item() / taught}
        return values


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    world: World,
    amp_dtype: torch.dtype | None = None,
    stop: Callable[[], bool] = lambda: False,
    teacher: Teacher | None = None,
    among: Int[Tensor, " K"] | None = None,
) -> dict[str, float] | None:
    """Return a classifier's `Metrics` over all processes, every image once.

    ``among``: the classes of the images, sorted, to tell ``top1_among`` them alone too. None if
    ``stop`` returned true on one of them on the way.
    """
    training = model.training
    model.eval()
    metrics, part = Metrics(world.device), Metrics(world.device)
    try:
        for batch in batches_together(loader, world, stop):
            answer = None
            with world.autocast(amp_dtype):
                logits = run_vit(model, batch.images, Needs(logits=True)).logits
                if teacher is not None:
                    answer = teacher(batch.images, Needs(logits=True)).logits
            assert logits is not None
            metrics.update(logits.float(), batch.labels, None if answer is None else answer.float())
            if among is not None:
                part.update(logits[:, among].float(), torch.searchsorted(among, batch.labels))
    except Stopped:
        return None
    finally:
        model.train(training)
    metrics.merge_across_processes()
    if among is None:
        return metrics.compute()
    part.merge_across_processes()
    return {**metrics.compute(), "top1_among": part.compute()["top1"]}
