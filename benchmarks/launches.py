"""Operations that a training step dispatches, beside timm's own step and its distillation task.

    python benchmarks/launches.py          # a minute
    python benchmarks/launches.py --write  # and keep the table in benchmarks/results/

A GPU starts a kernel or more for each; a small network on a fast card is bound by that. They are
counted on a CPU. Operations that only look at memory otherwise (views) or reserve it start nothing
and are left out, and an operation on a list of tensors (an optimizer's) counts once. timm's steps
are those of its train.py: AdamW over lists of tensors, as on a GPU. Ours has what the training loop
always does besides: the norm of all gradients, the sums of the log, and the check for NaN.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from step_cost import PAIRS, build_model, describe_machine, keep, start
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitdistill.data.batch import Batch
from vitdistill.data.model_input import input_spec_of
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.distill.teacher import Teacher
from vitdistill.methods.base import Masking, Objective, TeacherObjective, TokenSelector
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.dmae import DMAE
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.methods.masking import RandomMasking
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.config import OptimConfig
from vitdistill.runs.optim import gradient_norm, make_optimizer, take_step
from vitdistill.vit.families import describe_network

_STUDENT = PAIRS["cifar"].student
PAIR = replace(  # of twelve blocks each, as DeiT-Ti and DeiT-S are
    PAIRS["cifar"],
    title="ViT of width 192 from width 384, 12 blocks each, patch 4 on 32 x 32",
    student=(_STUDENT[0], {**_STUDENT[1], "depth": 12}),
    batch_size=4,
)
PHASES = ("student", "teachers", "losses", "backward", "rest")
RESERVES = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach")
RESERVES += ("_unsafe_view", "alias", "lift_fresh", "_reshape_alias", "promote_types")
# An optimizer that is not fused reads its step counts, which are the host's.
ON_HOST = ("_local_scalar_dense", "_record_function_enter_new", "_record_function_exit")


class Counted(TorchDispatchMode):
    """Counts operations by the phase that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "rest"
        self.counts: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in RESERVES + ON_HOST:
            self.counts[self.phase][name] += 1
        return func(*args, **(kwargs or {}))

    def during(self, phase: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``run``, its operations counted for ``phase``."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return run(*args, **kwargs)
            finally:
                self.phase = before

        return counted


Step = Callable[[Counted], None]


def timm_step(task: nn.Module, batch: Batch, with_teacher: bool) -> Step:
    """timm's train.py: its task, its optimizer."""
    optimizer = create_optimizer_v2(task.trainable_module, "adamw", lr=1e-4, foreach=True)  # type: ignore[arg-type]
    task.train()

    def step(counted: Counted) -> None:
        network: Any = task.trainable_module
        with suppress(AttributeError):
            del network.forward
        network.forward = counted.during("student", network.forward)
        if with_teacher:
            teacher: Any = task.teacher
            with suppress(AttributeError):
                del teacher.forward
            teacher.forward = counted.during("teachers", teacher.forward)
        optimizer.zero_grad()
        loss = counted.during("losses", task)(batch.images, batch.labels)["loss"]
        counted.during("backward", loss.backward)()
        optimizer.step()

    return step


def our_step(distillation: Distillation, teachers: dict[str, Teacher], batch: Batch) -> Step:
    """The training loop's step: see `Trainer.step`."""
    distillation.train()
    config = OptimConfig(lr=1e-4, sched="none", warmup_epochs=0)
    optimizer = make_optimizer(distillation, config)
    runs = distillation.run, {name: teacher.run for name, teacher in teachers.items()}
    terms = distillation.plan.objectives
    sums = torch.zeros(2 * len(terms) + 3, dtype=torch.float64)

    def step(counted: Counted) -> None:
        distillation.run = counted.during("student", runs[0])
        for name, teacher in teachers.items():
            teacher.run = counted.during("teachers", runs[1][name])
        optimizer.zero_grad()
        losses: dict[str, Tensor] = counted.during("losses", distillation)(batch, teachers, 0.0)
        counted.during("backward", losses["loss"].backward)()
        values = torch.stack([loss.detach() for loss in losses.values()])
        sums[:-2].add_(values / 1)
        sums[-2].add_(gradient_norm(distillation))
        total = sums.sum()
        finite = total - total == 0
        sums[-1].add_(finite)
        take_step(optimizer, None, finite)

    return step


def build_steps() -> dict[str, tuple[Step, str]]:
    """Every step, and the one of timm's that it is compared with."""
    size = (PAIR.image_size, PAIR.image_size)
    torch.manual_seed(0)
    ids, views = torch.arange(PAIR.batch_size), torch.zeros(PAIR.batch_size, dtype=torch.int64)
    images = torch.randn(PAIR.batch_size, 3, *size)
    batch = Batch(images, ids % PAIR.num_classes, ids, views, view=0)
    spec = input_spec_of(build_model(PAIR, "teacher"))

    def timm(teacher: bool) -> Step:
        student = build_model(PAIR, "student")
        loss = nn.CrossEntropyLoss()
        if not teacher:
            return timm_step(ClassificationTask(student, loss, verbose=False), batch, False)
        big = build_model(PAIR, "teacher").eval().requires_grad_(False)
        task = LogitDistillationTask(student, big, loss, task_loss_weight=0.5, verbose=False)
        return timm_step(task, batch, True)

    def ours(
        objectives: dict[str, Objective],
        selector: TokenSelector | None = None,
        masking: Masking | None = None,
    ) -> Step:
        classes = any(o.reads_labels for o in objectives.values())
        student = build_model(PAIR, "student")
        if not classes:
            student.reset_classifier(0)  # type: ignore[operator]
        teachers = {}
        if any(isinstance(o, TeacherObjective) for o in objectives.values()):
            model = build_model(PAIR, "teacher")
            network = describe_network(model, "teacher", PAIR.teacher[0], size)
            teachers["teacher"] = Teacher(model, network, spec, spec)
        networks = {name: teacher.network for name, teacher in teachers.items()}
        about = describe_network(student, "student", PAIR.student[0], size)
        plan = make_plan(about, networks, objectives, selector, masking)
        return our_step(Distillation(student, plan), teachers, batch)

    both: dict[str, Objective] = {"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)}
    decoder = PixelReconstruction(decoder_dim=96, decoder_depth=1, decoder_num_heads=3)
    hidden: dict[str, Objective] = {"mae": decoder, "dmae": DMAE(any_teacher=True)}
    plain, task = "timm, student alone", "timm, distillation task"
    return {
        plain: (timm(False), ""),
        "ours, student alone": (ours({"ce": CrossEntropy()}), plain),
        task: (timm(True), ""),
        "ours, KD": (ours(both), task),
        "ours, MaskedKD 1/2": (ours(both, MaskedKD(keep_rate=0.5)), task),
        "ours, CE + ViTKD": (ours({"ce": CrossEntropy(), "vitkd": ViTKD()}), task),
        "ours, CE + ViTKD + NKD": (
            ours({"ce": CrossEntropy(), "vitkd": ViTKD(), "nkd": NKD()}),
            task,
        ),
        "ours, MAE + DMAE, 75 % hidden": (
            ours(hidden, masking=RandomMasking(mask_rate=0.75)),
            task,
        ),
    }


def count(step: Step) -> Counted:
    """Count a step's operations, after two that make what is made once."""
    for _ in range(2):
        step(Counted())
    with Counted() as counted:
        step(counted)
    return counted


def main(write: bool = False, details: bool = False) -> None:
    """Count the operations of a training step.

    Args:
        write: keep the table in benchmarks/results/launches_<cpu>_<instructions>_<date>.md.
        details: also print every operation by phase.
    """
    torch.set_num_threads(1)
    lines = [f"| step | {' | '.join(PHASES)} | together | against timm's |"]
    lines.append("|---|" + "---:|" * (len(PHASES) + 2))
    totals: dict[str, int] = {}
    for name, (step, other) in build_steps().items():
        counted = count(step)
        each = [counted.counts[phase].total() for phase in PHASES]
        totals[name] = sum(each)
        share = f"{totals[name] / totals[other]:.2f}" if other else ""
        lines.append(f"| {name} | {' | '.join(map(str, each))} | **{totals[name]}** | {share} |")
        for phase in PHASES if details else ():
            print(name, phase, dict(counted.counts[phase].most_common()))
    about = f"{PAIR.title}; one micro-batch, float32."
    parts = ["# Operations a training step dispatches", describe_machine("launches.py"), about]
    parts.append("\n".join(lines))
    print("\n\n".join(parts))
    if write:
        keep("launches", parts)


if __name__ == "__main__":
    start(main)
