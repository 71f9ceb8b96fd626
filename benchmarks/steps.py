"""Training steps of one student and one teacher, timm's and ours, on any device.

timm's steps are those of its train.py: its task, AdamW over lists of tensors. Ours are the training
loop's (`Trainer.step`), which adds the norm of all gradients, the sums of the log and the check for
NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from step_cost import LR, WEIGHT_DECAY, Pair, build_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask
from torch import Tensor, nn

from vitdistill.data.batch import Batch
from vitdistill.data.model_input import input_spec_of
from vitdistill.distill.plan import Plan, make_plan
from vitdistill.distill.step import Distillation
from vitdistill.distill.teacher import Teacher
from vitdistill.explain.cost import Cost, cost_of
from vitdistill.labels.encoding import LogitEncoding
from vitdistill.labels.layout import Layout
from vitdistill.methods.base import Masking, Objective, TeacherObjective, TokenSelector
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.dmae import DMAE
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.methods.masking import RandomMasking
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.models.mae import hold_positions
from vitdistill.recipes.config import OptimConfig
from vitdistill.runs.networks import compile_networks
from vitdistill.runs.optim import gradient_norm, make_optimizer, take_step
from vitdistill.vit.families import describe_network

CPU = torch.device("cpu")
PLAIN, TASK = "timm, student alone", "timm, distillation task"

During = Callable[[str, Callable[..., Any]], Callable[..., Any]]
"""``during(phase, run)``: ``run``, watched as a phase of a step."""


def unwatched(phase: str, run: Callable[..., Any]) -> Callable[..., Any]:
    return run


@dataclass
class Made:
    """A step: ``run`` takes one; ``flops`` an image; ``other``: timm's that it is compared with."""

    name: str
    run: Callable[[During], None]
    flops: int
    other: str = PLAIN


@dataclass
class Maker:
    """Makes steps of a pair, each with a student of its own, on one batch and one teacher."""

    pair: Pair
    batch_size: int
    device: torch.device = CPU
    dtype: torch.dtype | None = None  # of autocast
    compiled: bool = False
    decoder: tuple[int, int, int] = (96, 1, 3)  # of a masked autoencoder: width, depth, heads

    def __post_init__(self) -> None:
        pair, size = self.pair, (self.pair.image_size,) * 2
        torch.manual_seed(0)
        ids = torch.arange(self.batch_size)
        images = torch.randn(self.batch_size, 3, *size).to(self.device)
        labels, ids = (ids % pair.num_classes).to(self.device), ids.to(self.device)
        self.batch = Batch(images, labels, ids, ids * 0, view=0)
        self.model = build_model(pair, "teacher").eval().requires_grad_(False)
        network = describe_network(self.model, "teacher", pair.teacher[0], size)
        spec = input_spec_of(self.model)
        self.teacher = Teacher(self.model, network, spec, spec, device=self.device)
        if self.compiled:
            compile_networks(self.teacher)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def all(self) -> dict[str, Callable[[], Made]]:
        """Return how each step is made, in the order of a table."""
        both: dict[str, Objective] = {"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)}
        published: dict[str, Objective] = {"ce": CrossEntropy(), "vitkd": ViTKD()}
        dim, depth, heads = self.decoder
        pixels = PixelReconstruction(decoder_dim=dim, decoder_depth=depth, decoder_num_heads=heads)
        hidden: dict[str, Objective] = {"mae": pixels, "dmae": DMAE(any_teacher=True)}
        half, quarter = MaskedKD(keep_rate=0.5), MaskedKD(keep_rate=0.25)
        ours: dict[str, tuple[Any, ...]] = {
            "ours, student alone": ({"ce": CrossEntropy()},),
            "ours, KD": (both,),
            "ours, MaskedKD 1/2": (both, half),
            "ours, MaskedKD 1/4": (both, quarter),
            "ours, CE + ViTKD": (published,),
            "ours, CE + ViTKD + NKD": (published | {"nkd": NKD()},),
            "ours, KD from stored labels": (both, None, None, self._layout()),
            "ours, MAE + DMAE, 75 % hidden": (hidden, None, RandomMasking(mask_rate=0.75)),
        }
        steps = {PLAIN: lambda: self.timm(False), TASK: lambda: self.timm(True)}
        return steps | {
            name: (lambda name=name, given=given: self.ours(name, *given))
            for name, given in ours.items()
        }

    def timm(self, taught: bool) -> Made:
        student = build_model(self.pair, "student")
        terms: dict[str, Objective] = {"ce": CrossEntropy()}
        cost = self._plan(terms | ({"kd": SoftKD()} if taught else {}), student)[1]
        loss = nn.CrossEntropyLoss()
        task: nn.Module = ClassificationTask(student, loss, verbose=False)
        if taught:
            task = LogitDistillationTask(
                student, self.model, loss, task_loss_weight=0.5, verbose=False
            )
        task = task.to(self.device).train()
        decay = {"lr": LR, "weight_decay": WEIGHT_DECAY}
        optimizer = create_optimizer_v2(student, "adamw", **decay, foreach=True)
        networks = {"student": student, **({"teachers": self.model} if taught else {})}
        plain = {phase: network.forward for phase, network in networks.items()}
        call: Any = torch.compile(task) if self.compiled else task

        def run(during: During = unwatched) -> None:
            for phase, network in networks.items():
                network.forward = during(phase, plain[phase])
            optimizer.zero_grad()
            with self.autocast():
                loss = during("losses", call)(self.batch.images, self.batch.labels)["loss"]
            during("backward", loss.backward)()
            optimizer.step()

        return Made(TASK if taught else PLAIN, run, cost.plain_kd if taught else cost.student_plain)

    def _plan(
        self, objectives: dict[str, Objective], student: nn.Module, *more: Any
    ) -> tuple[Plan, Cost]:
        pair, size = self.pair, (self.pair.image_size,) * 2
        taught = any(isinstance(o, TeacherObjective) for o in objectives.values())
        networks = {"teacher": self.teacher.network} if taught else {}
        about = describe_network(student, "student", pair.student[0], size)
        plan = make_plan(about, networks, objectives, *more)
        models = {"teacher": self.model} if taught else {}
        return plan, cost_of(plan, student, models, self.batch_size)

    def ours(
        self,
        name: str,
        objectives: dict[str, Objective],
        selector: TokenSelector | None = None,
        masking: Masking | None = None,
        layout: Layout | None = None,
    ) -> Made:
        student = build_model(self.pair, "student")
        if not any(o.reads_labels for o in objectives.values()):
            student.reset_classifier(0)  # type: ignore[operator]
        if masking is not None:  # as MAE's recipes do
            hold_positions(student)
        labels = None if layout is None else {"teacher": layout}
        plan, cost = self._plan(objectives, student, selector, masking, labels)
        taught = bool(plan.live)
        distillation = Distillation(student, plan).to(self.device).train()
        teachers = {"teacher": self.teacher} if taught else {}
        batch = self.batch
        if layout is not None:
            batch = batch.rows(torch.arange(self.batch_size, device=self.device))
            batch.targets["teacher"] = self._stored(layout)
        optimizer = make_optimizer(
            distillation,
            OptimConfig(lr=LR, weight_decay=WEIGHT_DECAY, sched="none", warmup_epochs=0),
        )
        if self.compiled:
            compile_networks(distillation)
        runs = distillation.run, self.teacher.run
        sums = torch.zeros(2 * len(objectives) + 3, dtype=torch.float64, device=self.device)

        def run(during: During = unwatched) -> None:
            distillation.run = during("student", runs[0])
            self.teacher.run = during("teachers", runs[1])
            optimizer.zero_grad()
            with self.autocast():
                losses: dict[str, Tensor] = during("losses", distillation)(batch, teachers, 0.0)
            during("backward", losses["loss"].backward)()
            values = torch.stack([loss.detach() for loss in losses.values()])
            sums[:-2].add_(values / 1)
            sums[-2].add_(gradient_norm(distillation))
            total = sums.sum()
            finite = total - total == 0
            sums[-1].add_(finite)
            take_step(optimizer, None, finite)

        return Made(name, run, cost.step, TASK if taught or layout is not None else PLAIN)

    def _layout(self) -> Layout:
        kept = min(10, self.pair.num_classes - 1)
        logits = LogitEncoding(
            kind="topk", num_classes=self.pair.num_classes, k=kept, temperatures=(1.0,)
        )
        return Layout(logits=logits)

    def _stored(self, layout: Layout) -> Any:
        logits = torch.randn(self.batch_size, self.pair.num_classes)
        records = layout.encode(logits, {}, None, np.zeros(self.batch_size, np.uint32))
        return layout.targets(records).to(self.device)
