"""One training step: what every network says of a batch, and the losses of it."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import keyed
from ..data.batch import Batch
from ..labels.layout import Targets
from ..labels.reader import StoredAnswer, blank_targets
from ..methods.base import Scalar, TeacherObjective
from ..vit.output import ViTOutput
from ..vit.patches import show_patches
from ..vit.walk import run_vit
from .plan import Plan
from .teacher import Teacher

Order = Int[Tensor, "B N"] | None
UNWEIGHTED = "_unweighted"

Answers = dict[str, ViTOutput | StoredAnswer]
"""What each teacher says of a batch, by name."""


class Distillation(nn.Module):
    """Everything that is trained (student and adapters), and the losses of one batch."""

    def __init__(self, student: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.student = student
        self.plan = plan
        self.adapters = nn.ModuleDict()
        for name, objective in plan.objectives.items():
            teacher = None
            if isinstance(objective, TeacherObjective):
                teacher = plan.teachers[objective.teacher]
            adapter = objective.adapter(plan.student, teacher)
            if adapter is not None:
                self.adapters[name] = adapter
        self.run = run_vit

    def forward(
        self, batch: Batch, teachers: Mapping[str, Teacher], progress: float = 0.0
    ) -> dict[str, Scalar]:
        """Return the weighted loss of every objective by name, and their sum as ``loss``.

        ``NAME_unweighted`` is each without its weight. Losses are means over the batch;
        ``progress`` is the fraction of the run that is done. The sum is NaN when a teacher's logits
        are not finite, which an argmax would hide.
        """
        student, answers = self.answer(batch, teachers)
        losses, unweighted = {}, {}
        for name, objective in self.plan.objectives.items():
            loss = self.loss(name, student, answers, batch)
            losses[name] = objective.weight_at(progress) * loss
            unweighted[f"{name}{UNWEIGHTED}"] = loss  # a detached one is too much for inductor
        losses["loss"] = torch.stack(list(losses.values())).sum()
        for answer in answers.values():
            live = answer.live if isinstance(answer, StoredAnswer) else answer
            if live is not None and live.logits is not None:
                # 0 times NaN or infinity is NaN.
                losses["loss"] = losses["loss"] + 0 * live.logits.sum(dtype=torch.float32)
        return losses | unweighted

    def answer(self, batch: Batch, teachers: Mapping[str, Teacher]) -> tuple[ViTOutput, Answers]:
        """Return what the student and each teacher record of a batch.

        The student runs first, because it may choose what its teachers see. If a teacher sees more
        patches than the student, only the student's are returned. A teacher with stored labels
        runs only on images without a record.
        """
        plan = self.plan
        order = self.mask(batch)
        student = self._student(batch, order, self.run)
        answers: Answers = {}
        for name, needs in plan.stored.items():
            targets: Targets = batch.targets[name]
            answers[name] = stored = StoredAnswer(targets, plan.teachers[name])
            if len(targets.missing):
                stored.live = teachers[name](batch.images[targets.missing], needs)
        for name, teacher in teachers.items():
            if name in plan.stored:
                continue
            seen = None if order is None else order[:, : plan.num_keep[name]]
            if seen is None:
                seen = self.choose(name, teacher, batch, student)
            answer = teacher(batch.images, plan.live[name], seen)
            answers[name] = answer if student.keep is None else answer.first_patches(student.keep)
        return student, answers

    def loss(self, name: str, student: ViTOutput, answers: Answers, batch: Batch) -> Scalar:
        """Return the loss of one objective, without its weight.

        An objective that reads labels sees only the labelled images.
        """
        objective = self.plan.objectives[name]
        teacher = answers[objective.teacher] if isinstance(objective, TeacherObjective) else None
        if isinstance(teacher, StoredAnswer):
            teacher = teacher.at(self.plan.temperatures.get(name))
        if objective.reads_labels and batch.labelled is not None:
            rows = batch.labelled
            student, batch = student.rows(rows), batch.rows(rows)
            teacher = None if teacher is None else teacher.rows(rows)
        return objective.loss(student, teacher, batch, self._adapter(name))

    def _adapter(self, name: str) -> nn.Module | None:
        return self.adapters[name] if name in self.adapters else None  # noqa: SIM401  (ModuleDict)

    def _student(self, batch: Batch, order: Order, run: Callable[..., ViTOutput]) -> ViTOutput:
        """Run the student on the patches that ``order`` leaves it; ``run``: compiled or not."""
        keep = None if order is None else order[:, : self.plan.student_keep]
        return run(self.student, batch.images, self.plan.student_needs, keep)

    @torch.no_grad()
    def pictures(
        self, batch: Batch, teachers: Mapping[str, Teacher]
    ) -> dict[str, Float[Tensor, "B 3 h w"]]:
        """Return pictures of objectives and selector, the input first; {} if there are none."""
        order = self.mask(batch)
        output = self._student(batch, order, run_vit)
        shown: dict[str, Tensor] = {}
        for name, teacher in teachers.items():
            keep = self.choose(name, teacher, batch, output) if order is None else None
            if keep is not None:
                grid, number = self.plan.teachers[name].grid, keep.shape[1]
                row = f"{name}\nsees {number} of {grid[0] * grid[1]}"
                shown[row] = show_patches(batch.images, keep, grid)
        for name, objective in self.plan.objectives.items():
            pictures = objective.pictures(output, batch, self._adapter(name))
            shown |= {f"{name}: {what}": images for what, images in pictures.items()}
        return {"input": batch.images, **shown} if shown else {}

    @torch.no_grad()
    def mask(self, batch: Batch) -> Order:
        """Order the student's patches, those to be seen first; None: nothing is hidden."""
        if self.plan.masking is None:
            return None
        noise = batch.uniforms(self.plan.student.num_patches, keyed.Stream.PATCHES)
        return self.plan.masking.order(noise)

    @torch.no_grad()
    def choose(
        self, name: str, teacher: Teacher, batch: Batch, student: ViTOutput
    ) -> Int[Tensor, "B K"] | None:
        """Choose the patches teacher ``name`` sees of each image; None: all of them."""
        plan, selector = self.plan, self.plan.selector
        num_keep = plan.num_keep[name]
        if selector is None or num_keep is None:
            return None
        network = plan.teachers[name]
        noise = None
        if selector.reads_noise:
            noise = batch.uniforms(network.num_patches, keyed.Stream.PATCHES)
        guide = teacher(batch.images, plan.guides[name]) if name in plan.guides else None
        return selector.select(network.grid, num_keep, student, guide, noise)


def blank_batch(plan: Plan, count: int, device: torch.device | str) -> Batch:
    """Make a batch of ``count`` black images of class 0 to try a plan on, with blank labels."""
    zeros = torch.zeros(count, dtype=torch.int64, device=device)
    images = torch.zeros(count, 3, *plan.student.image_size, device=device)
    targets = {name: blank_targets(layout, count, device) for name, layout in plan.labels.items()}
    return Batch(images, zeros, ids=zeros, views=zeros, view=0, targets=targets)
