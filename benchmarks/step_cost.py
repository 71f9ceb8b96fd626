"""What a training step costs, in CPU time and FLOPs, against plain timm training of the student
alone.

    python benchmarks/step_cost.py                # both settings, about three minutes
    python benchmarks/step_cost.py cifar --write  # one; keep the table in benchmarks/results/

All steps take turns in one process; a step is compared only with the floor of its own round, so
that neither a slow minute nor a busy neighbour decides. The clock is the CPU time of this process.
Random images and weights, float32, no drop path, the same batch for every step.
"""

import argparse
import datetime
import inspect
import os
import platform
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdistill.data.batch import Batch
from vitdistill.data.model_input import input_spec_of
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.distill.teacher import Teacher
from vitdistill.errors import ConfigError, UserError
from vitdistill.explain.cost import Cost, cost_of
from vitdistill.methods.base import Objective, TeacherObjective, TokenSelector
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.config import OptimConfig
from vitdistill.runs.optim import gradient_norm, make_optimizer, take_step
from vitdistill.storage.atomic import write_atomic
from vitdistill.vit.families import describe_network

RESULTS = Path(__file__).resolve().parent / "results"
LR, WEIGHT_DECAY = 1e-4, 0.05


@dataclass(frozen=True)
class Pair:
    """A student, a teacher and a batch; ``targets``: the ratio each of our steps has to reach."""

    title: str
    student: tuple[str, dict[str, Any]]
    teacher: tuple[str, dict[str, Any]]
    image_size: int
    num_classes: int
    batch_size: int
    targets: dict[str, float] = field(default_factory=dict)


_CIFAR = {"img_size": 32, "patch_size": 4}
PAIRS = {
    "deit": Pair(
        title="DeiT-Ti from DeiT-S, 224 x 224",
        student=("deit_tiny_patch16_224", {}),
        teacher=("deit_small_patch16_224", {}),
        image_size=224,
        num_classes=1000,
        batch_size=8,
        targets={"student": 0.97, "kd": 2.10, "masked 1/2": 1.50, "masked 1/4": 1.27},
    ),
    "cifar": Pair(
        title="ViT of width 192, depth 6 from width 384, depth 12, patch 4 on 32 x 32",
        student=("vit_tiny_patch16_224", {**_CIFAR, "embed_dim": 192, "depth": 6, "num_heads": 3}),
        teacher=(
            "vit_small_patch16_224",
            {**_CIFAR, "embed_dim": 384, "depth": 12, "num_heads": 6},
        ),
        image_size=32,
        num_classes=100,
        batch_size=32,
        targets={"student": 0.92, "kd": 3.40, "masked 1/2": 2.15, "masked 1/4": 1.58},
    ),
}


@dataclass
class Step:
    """One training step under measurement: ``flops`` an image, and ``seconds`` of CPU time, one
    entry a round.
    """

    name: str
    run: Callable[[], None]
    flops: int
    target: float | None = None
    seconds: list[float] = field(default_factory=list)


def build_model(pair: Pair, which: Literal["student", "teacher"]) -> nn.Module:
    """A timm model with random weights, the same ones at every call."""
    name, arguments = pair.student if which == "student" else pair.teacher
    torch.manual_seed(1 if which == "student" else 2)
    return timm.create_model(name, num_classes=pair.num_classes, **arguments)


def timm_step(student: nn.Module, teacher: nn.Module | None, batch: Batch) -> Callable[[], None]:
    """The step a user writes with timm: the models' own forwards, torch's AdamW; with a teacher,
    timm's KD loss.
    """
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

    def step() -> None:
        optimizer.zero_grad()
        logits = student(batch.images)
        loss = F.cross_entropy(logits, batch.labels)
        if teacher is not None:
            with torch.no_grad():
                answer = teacher(batch.images)
            kl = F.kl_div(
                F.log_softmax(logits, -1),
                F.log_softmax(answer, -1),
                reduction="batchmean",
                log_target=True,
            )
            loss = 0.5 * loss + 0.5 * kl
        loss.backward()
        optimizer.step()

    return step


def our_step(
    distillation: Distillation, teachers: Mapping[str, Teacher], batch: Batch
) -> Callable[[], None]:
    """The step of the training loop: its optimizer, and the gradient norm and finiteness check it
    always computes.
    """
    distillation.train()
    config = OptimConfig(lr=LR, weight_decay=WEIGHT_DECAY, sched="none", warmup_epochs=0)
    optimizer = make_optimizer(distillation, config)
    sums = torch.zeros(2, dtype=torch.float64)

    def step() -> None:
        optimizer.zero_grad()
        loss: Tensor = distillation(batch, teachers)["loss"]
        loss.backward()
        sums.add_(torch.stack([loss.detach(), gradient_norm(distillation)]))
        take_step(optimizer, None, sums.isfinite().all())

    return step


def build_steps(pair: Pair, batch_size: int) -> list[Step]:
    """Every step of one setting, the floor first; each trains its own copy of the same student on
    the same batch.
    """
    size = (pair.image_size, pair.image_size)
    torch.manual_seed(0)
    batch = Batch(
        images=torch.randn(batch_size, 3, *size),
        labels=torch.randint(pair.num_classes, (batch_size,)),
        ids=torch.arange(batch_size),
        views=torch.zeros(batch_size, dtype=torch.int64),
        view=0,
    )
    teacher_model = build_model(pair, "teacher").eval().requires_grad_(False)
    network = describe_network(teacher_model, "teacher", pair.teacher[0], size)
    spec = input_spec_of(teacher_model)
    teacher = Teacher(teacher_model, network, spec, spec)

    def ours(
        objectives: dict[str, Objective], selector: TokenSelector | None = None
    ) -> tuple[Callable[[], None], Cost]:
        student = build_model(pair, "student")
        teachers = (
            {"teacher": teacher}
            if any(isinstance(o, TeacherObjective) for o in objectives.values())
            else {}
        )
        networks = {name: network for name in teachers}
        plan = make_plan(
            describe_network(student, "student", pair.student[0], size),
            networks,
            objectives,
            selector,
        )
        run = our_step(Distillation(student, plan), teachers, batch)
        return run, cost_of(plan, student, {name: teacher_model for name in teachers}, batch_size)

    both: dict[str, Objective] = {"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)}
    alone, alone_cost = ours({"ce": CrossEntropy()})
    kd, kd_cost = ours(both)
    half, half_cost = ours(both, MaskedKD(keep_rate=0.5))
    quarter, quarter_cost = ours(both, MaskedKD(keep_rate=0.25))
    features: dict[str, Objective] = {"ce": CrossEntropy(), "nkd": NKD(), "vitkd": ViTKD()}
    vitkd, vitkd_cost = ours(features)
    masked, masked_cost = ours(features, MaskedKD(keep_rate=0.5))
    floor = alone_cost.student_plain

    def by_timm(with_teacher: bool) -> Callable[[], None]:
        return timm_step(
            build_model(pair, "student"), teacher_model if with_teacher else None, batch
        )

    return [
        Step("plain timm training, student alone", by_timm(False), alone_cost.student_plain),
        Step("the same once more (control)", by_timm(False), alone_cost.student_plain),
        Step("ours, student alone", alone, alone_cost.step, pair.targets["student"]),
        Step("plain KD with timm", by_timm(True), kd_cost.plain_kd),
        Step("ours, KD", kd, kd_cost.step, pair.targets["kd"]),
        Step("ours, MaskedKD, keep 1/2", half, half_cost.step, pair.targets["masked 1/2"]),
        Step("ours, MaskedKD, keep 1/4", quarter, quarter_cost.step, pair.targets["masked 1/4"]),
        Step("ours, CE + NKD + ViTKD", vitkd, vitkd_cost.step, 1.05 * vitkd_cost.step / floor),
        Step(
            "ours, CE + NKD + ViTKD + MaskedKD, keep 1/2",
            masked,
            masked_cost.step,
            1.05 * masked_cost.step / floor,
        ),
    ]


def measure(steps: list[Step], rounds: int) -> None:
    """Run every step once a round, after two rounds of warm-up, each round in another order."""
    # Shuffled, so that no step always inherits the caches and free memory of the same predecessor.
    shuffle = random.Random(0).shuffle
    for r in range(-2, rounds):
        order = list(steps)
        shuffle(order)
        for step in order:
            start = time.process_time()
            step.run()
            if r >= 0:
                step.seconds.append(time.process_time() - start)


def ratios(step: Step, floor: Step) -> list[float]:
    """The step's cost in floors, round by round."""
    return [mine / its for mine, its in zip(step.seconds, floor.seconds, strict=True)]


def table(steps: list[Step], batch_size: int) -> Iterator[str]:
    """Markdown rows: CPU milliseconds an image, ratio to the floor with quartiles and range, FLOPs
    ratio, target.
    """
    yield (
        "| step | ms / image | ratio to the floor | quartiles | min .. max | FLOPs ratio | GFLOPs /"
        " image | target |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    floor = steps[0]
    for step in steps:
        relative = ratios(step, floor)
        median = statistics.median(relative)
        low, _, high = statistics.quantiles(relative, n=4, method="inclusive")
        target = (
            ""
            if step.target is None
            else f"{step.target:.2f} {'met' if median <= step.target else 'MISSED'}"
        )
        cells = (
            step.name,
            f"{1e3 * statistics.median(step.seconds) / batch_size:.2f}",
            f"**{median:.3f}**",
            f"{low:.3f} .. {high:.3f}",
            f"{min(relative):.3f} .. {max(relative):.3f}",
            f"{step.flops / floor.flops:.3f}",
            f"{step.flops / 1e9:.2f}",
            target,
        )
        yield f"| {' | '.join(cells)} |"


def cpu_name() -> str:
    """The processor's model name as lscpu prints it, or what the platform knows."""
    info = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if info.is_file()
        else None
    )
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def describe_machine(script: str = "step_cost.py") -> str:
    """Everything the numbers of ``script`` depend on, one Markdown list."""
    lines = {
        "date": datetime.date.today().isoformat(),
        "CPU": f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "software": (
            f"Python {platform.python_version()}, torch {torch.__version__}, timm"
            f" {timm.__version__}"
        ),
        "command": f"`python {shlex.join([f'benchmarks/{script}', *sys.argv[1:]])}`",
    }
    return "\n".join(f"- {key}: {value}" for key, value in lines.items())


def main(
    setting: Literal["both", "deit", "cifar"] = "both",
    /,
    rounds: int = 9,
    batch_size: int | None = None,
    write: bool = False,
) -> None:
    """Measure training steps against plain timm training of the student alone.

    Args:
        setting: deit (DeiT-Ti from DeiT-S at 224), cifar (patch 4 on 32 x 32), or both.
        rounds: of all steps, at least 7.
        batch_size: images; default: 8 for deit, 32 for cifar.
        write: also write the tables to benchmarks/results/step_cost_<cpu>_<instructions>_<date>.md.
    """
    if rounds < 7:
        raise ConfigError(f"--rounds is {rounds}: medians need at least 7")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}: it has to be at least 1")
    torch.set_num_threads(1)
    parts = ["# Cost of a training step", describe_machine()]
    for name in ("deit", "cifar") if setting == "both" else (setting,):
        pair = PAIRS[name]
        images = batch_size or pair.batch_size
        steps = build_steps(pair, images)
        measure(steps, rounds)
        note = (
            f"Batch {images}, {rounds} rounds, float32, one thread; the ratio is the median over"
            " rounds."
        )
        parts += [f"## {name}: {pair.title}", note, "\n".join(table(steps, images))]
        print("\n\n".join(parts[-3:]) + "\n", flush=True)
    print(describe_machine())
    if write:
        keep("step_cost", parts)


def keep(name: str, parts: list[str]) -> None:
    """Write a result to benchmarks/results/<name>_<cpu>_<instructions>_<date>.md."""
    slug = re.sub(
        r"[^a-z0-9]+", "-", f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}".lower()
    ).strip("-")
    path = RESULTS / f"{name}_{slug}_{datetime.date.today().isoformat()}.md"
    write_atomic(path, ("\n\n".join(parts) + "\n").encode())
    print(f"\nwritten: {path}")


def start(command: Callable[..., None]) -> None:
    """Run a benchmark from the command line; a user's mistake is one sentence."""
    given = vars(make_parser(command).parse_args())
    words = [given.pop(name) for name in _positional(command)]
    try:
        command(*words, **given)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def make_parser(command: Callable[..., None]) -> argparse.ArgumentParser:
    """Return the parser of a function: its signature, and the ``Args:`` of its docstring."""
    about, _, args = inspect.getdoc(command).partition("Args:\n")  # type: ignore[union-attr]
    helps = dict(re.findall(r"^    (\w+): ((?:.|\n     )+)", args, re.MULTILINE))
    parser = argparse.ArgumentParser(description=about)
    for name, parameter in inspect.signature(command).parameters.items():
        kind: Any = parameter.annotation
        options: dict[str, Any] = {"default": parameter.default}
        inner = [arg for arg in get_args(kind) if arg not in (type(None), ...)]
        positional = name in _positional(command)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = inner
        else:
            options["type"] = inner[0] if inner else kind
        if positional or get_origin(kind) is tuple:
            options["nargs"] = "?" if positional else "+"
        flag = name if positional else f"--{name.replace('_', '-')}"
        parser.add_argument(flag, help=" ".join(helps.get(name, "").split()), **options)
    return parser


def _positional(command: Callable[..., None]) -> list[str]:
    parameters = inspect.signature(command).parameters.items()
    return [name for name, each in parameters if each.kind is each.POSITIONAL_ONLY]


if __name__ == "__main__":
    start(main)
