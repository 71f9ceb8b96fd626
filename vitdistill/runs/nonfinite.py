"""Errors that end a step: out of memory, and the first NaN or infinite number."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import NonFiniteError, Set
from ..memory import memory_errors
from ..messages import plural
from ..vit.output import ViTOutput
from ..world import agreed
from .prepare import Prepared

_CALMER = (Set("optim.lr"), Set("optim.clip_grad"), Set("train.amp_dtype", "float32"))


def nonfinite_error(prepared: Prepared, step: int, num_steps: int) -> NonFiniteError:
    """Repeat a step that was not applied, to name the culprit; call it on every process."""
    found = [e for e in prepared.world.gather(_find_culprit(prepared, step, num_steps)) if e]
    # One process's loss reaches all gradients: prefer an error that names a teacher or objective.
    unknown = NonFiniteError("the loss is NaN or infinite", _CALMER)
    return agreed(min(found, key=lambda error: error.field == unknown.field, default=unknown))


def _find_culprit(prepared: Prepared, step: int, num_steps: int) -> NonFiniteError | None:
    distillation, teachers = prepared.distillation, prepared.teachers
    named = {name: p for name, p in distillation.named_parameters() if p.requires_grad}
    (micro_batches,) = prepared.loaders.train.batches(step, 1)
    for i, batch in enumerate(micro_batches):
        samples = f"(samples {', '.join(map(str, batch.ids[:4].tolist()))}, ...) is NaN or infinite"
        # Each pass starts from the step's random state, so it repeats its dropout.
        with torch.no_grad(), prepared.in_micro_batch(step, i):
            _, answers = distillation.answer(batch, teachers)
        for name, answer in answers.items():
            if isinstance(answer, ViTOutput) and not _all_finite(answer.tensors()):
                field = f"teachers.{name}"
                fixes = "check its weights", Set(f"{field}.precision", "float32")
                return NonFiniteError(f"the answer of the {name} {samples}", fixes, field=field)
        with prepared.in_micro_batch(step, i):
            losses = distillation(batch, teachers, step / num_steps)
        for name, loss in losses.items():
            if not _all_finite([loss]):
                field = f"objectives.{name}"
                return NonFiniteError(f"the loss {name!r} {samples}", _CALMER, field=field)
        grads = torch.autograd.grad(losses["loss"], [*named.values()], allow_unused=True)
        for name, grad in zip(named, grads, strict=True):
            if grad is not None and not _all_finite([grad]):
                return NonFiniteError(f"the gradient of {name} is NaN or infinite", _CALMER)
    return None


def _all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@contextmanager
def step_errors(prepared: Prepared, output: Path, step: Callable[[], int]) -> Iterator[None]:
    """Add to an error where it happened, and what is left; ``step`` returns the current one."""
    size = prepared.recipe.train.micro_batch(prepared.world.size)
    where = (
        f"in a training step of {plural(size, 'image')} at once; the batch size is part of what a"
        " run computes, so another one needs another output"
    )
    fixes = Set("train.accumulate"), Set("train.batch_size"), "explain says what an image needs"
    try:
        with memory_errors(where, fixes):
            yield
    except NonFiniteError as error:
        last = max((output / "checkpoints").glob("step-*"), default="none")
        what = f"at step {step()}, {error.what}; last good checkpoint: {last}"
        raise agreed(NonFiniteError(what, error.fixes, field=error.field)) from error


def refuse_nonfinite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `NonFiniteError` that names the first of a run's tensors with a NaN or an infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _all_finite([tensor]):
            raise NonFiniteError(f"{name} of the state is NaN or infinite", _CALMER)
