"""Exact accuracy, log-likelihood, calibration, and agreement with a teacher."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..data.loader import EvalLoader
from ..distill.teacher import Teacher
from ..errors import NonFiniteError
from ..vit.needs import Needs
from ..vit.walk import run_vit
from ..world import World
from .features import batches_together

NUM_BINS = 15
SUMS = ("num", "bad", "labelled", "top1", "top5", "nll", "taught", "agree", "kl")
BINNED = ("bin_right", "bin_confidence")


class Metrics:
    """Sums over an evaluation in float64, exact counts too, on the device without a host sync.

    Every sample must be given exactly once over all processes (no padding). Labels of -1 mean
    unlabelled: such rows count only for the agreement with a teacher. All values are fractions in
    [0, 1] except ``nll`` and ``kl`` (nats a sample).

    >>> metrics = Metrics()
    >>> metrics.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    >>> metrics.compute()["top1"]
    0.5
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = {
            name: torch.zeros(size, dtype=torch.float64, device=device)
            for size, names in {1: SUMS, NUM_BINS: BINNED}.items()
            for name in names
        }

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._sums[name] += value

    @torch.no_grad()
    def update(
        self,
        logits: Float[Tensor, "B C"],
        labels: Int[Tensor, "B"],
        teacher_logits: Float[Tensor, "B C"] | None = None,
    ) -> None:
        num_classes = logits.shape[1]
        logits = logits.detach().double()
        log_probs = logits.log_softmax(dim=1)
        # A row with NaN compares false with everything: without this it would count as right.
        # Infinity gives NaN too; minus infinity only rules a class out.
        finite = ~log_probs.isnan().any(dim=1)
        known = labels >= 0
        usable = finite & (labels < num_classes)
        self._add(num=torch.tensor(len(logits)), bad=(~usable).sum())
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
        nll = -log_probs.gather(1, labels[:, None])[:, 0]
        self._add(
            labelled=counted.sum(),
            top1=right.sum(),
            top5=(counted & (rank < 5)).sum(),
            nll=torch.where(counted, nll, 0).sum(),
        )
        confidence = torch.where(counted, log_probs.amax(dim=1).exp(), 0)
        bins = (confidence * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
        self._sums["bin_right"].index_add_(0, bins, right.double())
        self._sums["bin_confidence"].index_add_(0, bins, confidence)

    def _add_teacher(self, student: Tensor, teacher: Tensor, student_finite: Tensor) -> None:
        counted = student_finite & ~teacher.isnan().any(dim=1)
        agree = counted & (student.argmax(dim=1) == teacher.argmax(dim=1))
        # xlogy-like: a class the teacher rules out adds nothing, whatever the student thinks of it.
        term = torch.where(teacher.isneginf(), 0, teacher.exp() * (teacher - student)).sum(dim=1)
        self._add(
            bad=(student_finite & ~counted).sum(),
            taught=counted.sum(),
            agree=agree.sum(),
            kl=torch.where(counted, term, 0).sum(),
        )

    def merge_across_processes(self) -> None:
        """Add up the sums of all processes of the default group; call it once, at the end."""
        if dist.is_available() and dist.is_initialized():
            for total in self._sums.values():
                dist.all_reduce(total)

    def compute(self) -> dict[str, float]:
        """Return ``num_samples``, and ``top1 top5 nll ece`` (labels), ``agreement kl`` (teacher).

        ``ece`` is the expected calibration error over 15 equal-width bins of the top probability
        (Guo et al. 2017, eq. 3); ``kl`` is KL(teacher || student) at temperature 1.

        Raises:
            NonFiniteError: an answer is NaN or infinite, or a label is beyond the classes.
        """
        num, bad, labelled, taught = (
            int(self._sums[name]) for name in ("num", "bad", "labelled", "taught")
        )
        if bad:
            raise NonFiniteError(
                f"{bad} of {num} answers are NaN or infinite, or to a label beyond the classes",
                "check the weights, the precision and the class list",
            )
        values: dict[str, float] = {"num_samples": float(num)}
        if labelled:
            means = {name: self._sums[name].item() / labelled for name in ("top1", "top5", "nll")}
            off = (self._sums["bin_right"] - self._sums["bin_confidence"]).abs().sum().item()
            values |= {**means, "ece": off / labelled}
        if taught:
            agree, kl = self._sums["agree"].item(), self._sums["kl"].item()
            values |= {"agreement": agree / taught, "kl": kl / taught}
        return values


@torch.no_grad()
def evaluate(
    model: nn.Module | Teacher,
    loader: EvalLoader,
    world: World,
    amp_dtype: torch.dtype | None = None,
    stop: Callable[[], bool] = lambda: False,
    teacher: Teacher | None = None,
    among: Int[Tensor, " K"] | None = None,
) -> dict[str, float]:
    """Return a classifier's `Metrics` over all processes, every image once.

    ``among``: the classes of the images, sorted, to return ``top1_among`` these alone too. Raises
    as `batches_together`.
    """
    network = model.model if isinstance(model, Teacher) else model
    answers = model if isinstance(model, Teacher) else partial(run_vit, model)
    training = network.training
    network.eval()
    metrics, part = Metrics(world.device), Metrics(world.device)
    try:
        for batch in batches_together(loader, world, stop):
            answer = None
            with world.autocast(amp_dtype):
                logits = answers(batch.images, Needs(logits=True)).logits
                if teacher is not None:
                    answer = teacher(batch.images, Needs(logits=True)).logits
            assert logits is not None
            metrics.update(logits.float(), batch.labels, None if answer is None else answer.float())
            if among is not None:
                part.update(logits[:, among].float(), torch.searchsorted(among, batch.labels))
    finally:
        network.train(training)
    metrics.merge_across_processes()
    if among is None:
        return metrics.compute()
    part.merge_across_processes()
    return {**metrics.compute(), "top1_among": part.compute()["top1"]}
