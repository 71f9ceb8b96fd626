"""What a run cost, and what had to be paid before it could begin; counted, not measured."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ..errors import UserError
from ..explain.ahead import foresee
from ..recipes.convert import replace_fields
from ..runs.stored import open_labels, stored_network
from ..vit.flops import forward_flops
from ..weights.create import create_model
from .files import Run


@dataclass(frozen=True)
class Paid:
    """FLOPs of a run; None: they cannot be told from what is there.

    Args:
        prediction: of the student, one image.
        teachers: of all teachers in training, one image; 0: none runs.
        own: of all its training steps.
        labels: of the stored labels it reads, all of them.
        before: of the runs among these whose weights it began with or learnt from.
        memory: bytes of a training step: what is kept for the backward pass, weights, gradients
            and two moments, in float32.
    """

    prediction: int | None = None
    teachers: int | None = None
    own: int | None = None
    labels: int | None = None
    before: int | None = None
    memory: int | None = None

    @property
    def total(self) -> int | None:
        """Everything that was paid for this student, as far as it happened in these runs."""
        return _sum((self.own, self.labels, self.before))


def costs_of(runs: Sequence[Run]) -> list[Paid]:
    """Return what each run cost."""
    made = {digest: i for i, run in enumerate(runs) for digest in run.weights}
    # Folders may have moved since: recognise runs by their weights.
    places = {digest: str(runs[i].path / "last") for digest, i in made.items()}
    known: dict[str, Paid] = {}  # seeds cost the same
    alone = []
    for run in runs:
        key = repr((run.settings, run.num_trained, sorted(run.recipe.teachers.items())))
        if key not in known:
            known[key] = _paid(run, places)
        alone.append(known[key])
    before = [[alone[i] for i in _ancestors(runs, made, run)] for run in runs]
    return [
        replace(paid, before=_sum(cost for p in earlier for cost in (p.own, p.labels)))
        for paid, earlier in zip(alone, before, strict=True)
    ]


def _ancestors(runs: Sequence[Run], made: dict[str, int], run: Run) -> set[int]:
    """Return the numbers of the runs whose weights a run needed, directly or indirectly.

    ``made``: the number of the run that made weights, by their digest.
    """
    found: set[int] = set()
    waiting = [run]
    while waiting:
        named = {made[digest] for digest in waiting.pop().needed.values() if digest in made}
        waiting += [runs[i] for i in named - found]
        found |= named
    return found


def _sum(costs: Iterable[int | None]) -> int | None:
    costs = [*costs]
    return None if None in costs else sum(cost or 0 for cost in costs)


def _paid(run: Run, places: dict[str, str]) -> Paid:
    named = {f: places[d] for f, d in run.identity.items() if f.endswith(".model") and d in places}
    recipe, found = replace_fields(run.recipe, named), Paid()
    with suppress(UserError):  # not trained yet, or its networks need what is gone
        student = create_model(str(run.path / "last"), pretrained=False)
        size = student.pretrained_cfg["input_size"][1:]  # type: ignore[index]
        found = replace(found, prediction=forward_flops(student, tuple(size)))
        labels = 0
        for name, store in open_labels(recipe).items():
            teacher = stored_network(store, name)
            labels += teacher.flops * store.manifest.num_samples * store.manifest.num_views
        images = run.num_trained // recipe.train.epochs
        counts = images, max(getattr(student, "num_classes", 0), 2), 0, ""
        ahead = foresee(recipe, counts)
        trained = ahead.plan.student.num_parameters + sum(ahead.cost.adapters.values())
        micro_batch = recipe.train.micro_batch()
        found = replace(
            found,
            teachers=sum(ahead.cost.teachers.values()),
            own=ahead.cost.step * run.num_trained or None,
            labels=labels,
            memory=ahead.cost.activations * micro_batch + 16 * trained,
        )
    return found
