"""Which number of a step was the first to be NaN or infinite."""

from pathlib import Path
from typing import NamedTuple

import torch

from ..data.batch import Batch
from ..errors import Fix, NonFiniteError, Set
from ..vit.output import ViTOutput
from ..world import agreed
from .prepare import Prepared


class _Culprit(NamedTuple):
    kind: str  # answer, loss or gradient
    name: str  # of the teacher, the objective or the parameter
    samples: str = ""


def nonfinite_error(
    prepared: Prepared,
    micro_batches: tuple[Batch, ...],
    step: int,
    progress: float,
    output: Path,
) -> NonFiniteError:
    """Repeat a step's forward passes to name the culprit; call it on every process."""
    own = _culprit(prepared, micro_batches, step, progress)
    found = [culprit for culprit in prepared.world.gather(own) if culprit is not None]
    # One process's loss is in everybody's gradients: the cause comes first.
    first = min(found, key=lambda c: c.kind == "gradient", default=_Culprit("loss", "loss"))
    fixes: tuple[Fix, ...]
    if first.kind == "answer":
        field = f"teachers.{first.name}"
        fixes = ("check its weights", Set(f"{field}.precision", "float32"))
    else:
        field = f"objectives.{first.name}" if first.kind == "loss" else ""
        fixes = (Set("optim.lr"), Set("optim.clip_grad"), Set("train.amp_dtype", "float32"))
    of = {"answer": f"the answer of the {first.name}", "loss": f"the loss {first.name!r}"}
    what = of.get(first.kind, f"the gradient of {first.name}")
    return agreed(
        NonFiniteError(
            f"{what}{first.samples} is NaN or infinite at step {step}; the step was not applied,"
            f" and {last_good(output)}",
            fixes,
            field=field,
        )
    )


@torch.no_grad()
def _culprit(
    prepared: Prepared, micro_batches: tuple[Batch, ...], step: int, progress: float
) -> _Culprit | None:
    distillation, teachers = prepared.distillation, prepared.teachers
    for i, batch in enumerate(micro_batches):
        samples = f" (samples {', '.join(map(str, batch.ids[:4].tolist()))}, ...)"
        with prepared.in_micro_batch(step, i):
            _, answers = distillation.answer(batch, teachers)
        for name, answer in answers.items():
            if isinstance(answer, ViTOutput) and not _all_finite(answer.tensors()):
                return _Culprit("answer", name, samples)
        with prepared.in_micro_batch(step, i):
            losses = distillation(batch, teachers, progress)
        for name, loss in losses.items():
            if not _all_finite([loss]):
                return _Culprit("loss", name, samples)
    for name, parameter in distillation.named_parameters():
        if parameter.grad is not None and not _all_finite([parameter.grad]):
            return _Culprit("gradient", name)
    return None


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def last_good(output: Path) -> str:
    """Name the last checkpoint of a run, in words."""
    saved = sorted((output / "checkpoints").glob("step-*"))
    if not saved:
        return "no checkpoint had been saved yet"
    return f"the last good checkpoint is {saved[-1]}"
