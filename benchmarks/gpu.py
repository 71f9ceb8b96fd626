"""Images a second on a GPU: our steps against timm's on the same work, and the whole loop.

    make bench-gpu                                        # five minutes on one GPU
    python benchmarks/gpu.py --device cuda --budget 300 --write
    python benchmarks/gpu.py --device cpu --tiny          # all of it, anywhere, in two minutes

The most valuable parts run first, each with a share of the time; results are printed at once, and
written after every part. All steps of a part run in one process, in another order every round. They
are timed by the device's own events and compared with timm's of the same round. Random images and
weights, bfloat16, one batch that stays on the device; the loop loads its images as a user's does.
"""

import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from step_cost import PAIRS, RESULTS, Pair, describe_machine, start
from steps import PLAIN, TASK, Made, Maker

from vitdistill.data.augment import Augment
from vitdistill.errors import ConfigError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.settings import DataConfig, OptimConfig, StudentConfig, TrainConfig
from vitdistill.runs.train import train
from vitdistill.storage.atomic import write_atomic
from vitdistill.world import choose_device

ALONE, STORED = "ours, student alone", "ours, KD from stored labels"
TARGETS = {  # the step compared with, and the ratio of images a second
    ALONE: (PLAIN, 1.0),
    "ours, KD": (TASK, 1.05),
    STORED: (PLAIN, 0.95),
}


def pair(title: str, student: str, teacher: str, batch_size: int, **targets: float) -> Pair:
    return Pair(title, (student, {}), (teacher, {}), 224, 1000, batch_size, targets)


_CIFAR = PAIRS["cifar"]
GPU_PAIRS = {
    "ti_s": pair("DeiT-Ti from DeiT-S", "deit_tiny_patch16_224", "deit_small_patch16_224", 256),
    "cifar": replace(_CIFAR, batch_size=1024),
    "s_b": pair("DeiT-S from DeiT3-B", "deit_small_patch16_224", "deit3_base_patch16_224", 256),
    "b_l": pair("ViT-B from ViT-L", "vit_base_patch16_224", "vit_large_patch16_224", 256),
}
MASKED_TARGET = {"s_b": 1.5}  # MaskedKD 1/2 against timm's distillation task


@dataclass(frozen=True)
class Part:
    """A pair, eager or compiled, and its share of the time; ``only``: some of its steps."""

    pair: str
    share: float
    compiled: bool = False
    only: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.pair}_compiled" if self.compiled else self.pair


SHORT = (PLAIN, TASK, ALONE, "ours, KD", "ours, MaskedKD 1/2")
PARTS = (
    Part("ti_s", 0.16),
    Part("s_b", 0.16),
    Part("cifar", 0.12),
    Part("cifar", 0.16, compiled=True, only=SHORT),
    Part("b_l", 0.16),
    Part("ti_s", 0.14, compiled=True, only=SHORT),
)
LOOP_SHARE = 0.05  # of each of the two loops
NAMES = (*(part.name for part in PARTS), "loop")


def made_tiny(found: Pair) -> Pair:
    """The same pair as small as its blocks can be, and as quick."""
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "num_heads": 2}
    name, teacher = found.student[0], found.teacher[0]
    return replace(
        found,
        student=(name, {**small, "embed_dim": 16}),
        teacher=(teacher, {**small, "embed_dim": 32, "depth": 3}),
        image_size=32,
        num_classes=20,
        batch_size=4,
    )


@dataclass
class Device:
    """Where steps run, and its clock."""

    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU"

    def seconds(self, run: Callable[[], Any], times: int = 1) -> float:
        """How long the device works on it, each time."""
        if not self.on_gpu:
            begun = time.perf_counter()
            for _ in range(times):
                run()
            return (time.perf_counter() - begun) / times
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(times):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / times

    def peak(self, run: Callable[[], Any]) -> float:
        """The most memory at once that it takes beyond what is held before, in GB."""
        if not self.on_gpu:
            run()
            return float("nan")
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        run()
        return (torch.cuda.max_memory_allocated(self.device) - held) / 1e9

    def kernels(self, run: Callable[[], Any]) -> dict[str, tuple[float, int]]:
        """Seconds and launches of every kernel of one run, the longest first; {} on a CPU."""
        if not self.on_gpu:
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize(self.device)
        found = [
            (event.key, (event.self_device_time_total / 1e6, event.count))
            for event in profile.key_averages()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        return dict(sorted(found, key=lambda item: -item[1][0]))

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """FLOPs a second of one large product."""
        side = 8192 if self.on_gpu else 256
        a = torch.randn(side, side, device=self.device, dtype=dtype)
        for _ in range(3):
            a @ a
        return 2 * side**3 / self.seconds(lambda: a @ a, 10)


@dataclass
class Timed:
    """A step's times, one entry a round; ``kernels``: what the device did in one."""

    made: Made
    peak: float
    kernels: dict[str, tuple[float, int]]
    seconds: list[float] = field(default_factory=list)

    @property
    def busy(self) -> float:
        """The share of a step in which the device computes: else it waits for the host."""
        return sum(s for s, _ in self.kernels.values()) / statistics.median(self.seconds)

    @property
    def launches(self) -> int:
        return sum(count for _, count in self.kernels.values())


def measure(
    maker: Maker, device: Device, names: tuple[str, ...], until: float
) -> tuple[dict[str, Timed], list[str]]:
    """Run the steps round after round until then, at least twice; and what went wrong."""
    steps: dict[str, Timed] = {}
    wrong = []
    for name, make in maker.all().items():
        if names and name not in names:
            continue
        try:
            made = make()
            for _ in range(2):
                made.run()
            steps[name] = Timed(made, device.peak(made.run), device.kernels(made.run))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a benchmark says what it can
            wrong.append(f"{name}: {type(error).__name__}: {str(error).strip()[:300]}")
            print(f"  {wrong[-1]}", flush=True)
    once = sum(device.seconds(step.made.run) for step in steps.values())
    times = max(1, min(10, int((until - time.monotonic()) / (4 * max(once, 1e-6)))))
    shuffle, rounds = random.Random(0).shuffle, 0
    while rounds < 2 or (time.monotonic() < until and rounds < 15):
        order = list(steps.values())
        shuffle(order)
        for step in order:
            step.seconds.append(device.seconds(step.made.run, times))
        rounds += 1
    return steps, wrong


def rows(
    steps: dict[str, Timed], batch_size: int, rate: float, masked: float | None
) -> Iterator[str]:
    """Markdown rows: images a second, ratio to the floor and to timm's step, and what bounds it."""
    head = "step", "images/s", "to the floor", "to timm's", "quartiles", "of matmul", "busy"
    yield f"| {' | '.join(head)} | kernels | peak GB | target |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|"
    targets = TARGETS | ({} if masked is None else {"ours, MaskedKD 1/2": (TASK, masked)})
    for name, step in steps.items():
        pace = [batch_size / s for s in step.seconds]
        images = statistics.median(pace)

        def against(other: str, step: Timed = step) -> list[float]:
            if other not in steps:
                return [float("nan")] * 2
            return [a / b for a, b in zip(steps[other].seconds, step.seconds, strict=True)]

        low, middle, high = statistics.quantiles(against(step.made.other), n=4, method="inclusive")
        target = ""
        if name in targets:
            other, wanted = targets[name]
            reached = statistics.median(against(other))
            target = f"{wanted:g} {'met' if reached >= wanted else f'MISSED ({reached:.2f})'}"
        cells = (
            name,
            f"{images:,.0f}",
            f"**{statistics.median(against(PLAIN)):.2f}**",
            f"{middle:.2f}",
            f"{low:.2f} .. {high:.2f}",
            f"{images * step.made.flops / rate:.0%}",
            f"{step.busy:.0%}",
            f"{step.launches}",
            f"{step.peak:.1f}",
            target,
        )
        yield f"| {' | '.join(cells)} |"


def longest_kernels(steps: dict[str, Timed], names: list[str], count: int = 12) -> Iterator[str]:
    """Where the time of these steps goes: their longest kernels, in milliseconds a step."""
    for name in names:
        kernels = steps[name].kernels
        if not kernels:
            continue
        total = sum(s for s, _ in kernels.values())
        yield f"{name}: {1e3 * total:.2f} ms in {steps[name].launches} kernels, of it"
        lines = [
            f"{1e3 * seconds:8.3f} ms  {times:5d} x  {kernel[:100]}"
            for kernel, (seconds, times) in [*kernels.items()][:count]
        ]
        yield "\n".join(["```", *lines, "```"])


# -- the whole loop -------------------------------------------------------------------------------


def random_images(folder: Path, count: int, side: int, classes: int) -> str:
    """Write images of noise, as photos are stored where they are large."""
    draw, kind = np.random.default_rng(0), "png" if side < 100 else "jpg"
    for split, number in (("train", count), ("val", max(count // 20, classes))):
        for i in range(number):
            path = folder / split / f"c{i % classes:02d}" / f"{i:05d}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = draw.integers(0, 256, (max(side // 8, 4),) * 2 + (3,), dtype=np.uint8)
            Image.fromarray(coarse).resize((side, side)).save(path)
    return str(folder)


def loop(
    found: Pair, images: str, photos: bool, workers: int, seconds: float, pace: float, device: str
) -> dict[str, float]:
    """Train the student alone for about so long; images a second while it trains, and in all."""
    count = sum(1 for _ in Path(images, "train").rglob("*.*"))
    batch_size = min(found.batch_size, count)
    epochs = max(2, int(seconds * pace / count))
    hard = Augment(crop="rrc", aa="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, reprob=0.25)
    size = {} if "img_size" in found.student[1] else {"img_size": found.image_size}
    steps = count // batch_size
    recipe = Recipe(
        student=StudentConfig(model=found.student[0], model_args={**found.student[1], **size}),
        objectives={"ce": CrossEntropy()},
        data=DataConfig(
            dir=images,
            workers=workers if photos else 0,
            augment=hard if photos else Augment(crop="pad", crop_padding=4),
        ),
        optim=OptimConfig(warmup_epochs=0),
        train=TrainConfig(
            epochs=epochs,
            batch_size=batch_size,
            amp_dtype="bfloat16",
            log_every=max(1, min(50, steps * epochs // 8)),
            eval_every=epochs,
            save_every=max(1, steps * epochs // 2),
            log_to=(),
        ),
    )
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        out = Path(folder) / "run"
        summary = train(recipe, out, device=device, console=Console(file=nowhere))
        lines = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines[1:] or lines]
    return {
        "steady": statistics.median(rates) if rates else float("nan"),
        "whole": summary["steps"] * batch_size / summary["seconds"],
        "wait": statistics.median([line["wait_share"] for line in lines]) if lines else 0.0,
    }


# -- all of it ------------------------------------------------------------------------------------


def main(
    device: str = "auto",
    budget: float | None = None,
    tiny: bool = False,
    write: bool = False,
    parts: tuple[str, ...] = (),
    images: str = "",
    photos: str = "",
    workers: int = 16,
) -> None:
    """Measure training steps and the loop on a device.

    Args:
        device: auto, cpu, cuda or cuda:N.
        budget: seconds for all parts together; default: 300, with --tiny 30 and no part left out.
        tiny: the smallest networks and batches: whether all of it runs, anywhere.
        write: keep the tables in benchmarks/results/gpu_<device>_<date>.md, after every part.
        parts: some of ti_s, s_b, cifar, cifar_compiled, b_l, ti_s_compiled and loop, which needs
            cifar or ti_s; default: all.
        images: a folder of small images for the loop; default: random ones.
        photos: a folder of photos for the loop; default: random ones.
        workers: loader processes for photos.
    """
    budget = (30 if tiny else 300) if budget is None else budget
    if budget <= 0:
        raise ConfigError(f"--budget is {budget}: it has to be above 0")
    if unknown := {*parts} - {*NAMES}:
        raise ConfigError(f"--parts has {min(unknown)}: parts are {', '.join(NAMES)}")
    begun, where = time.monotonic(), Device(choose_device(device))
    torch.set_num_threads(1)
    if not where.on_gpu:  # whose code takes minutes to make
        torch.compile = partial(torch.compile, backend="eager")
    rate = where.matmul_rate(torch.bfloat16)
    head = f"- device: {where.name}, {rate / 1e12:.3g} TFLOP/s in one large bfloat16 product"
    texts = ["# Steps a second", f"{describe_machine('gpu.py')}\n{head}"]
    print("\n\n".join(texts), flush=True)
    path = (
        RESULTS
        / f"gpu_{re.sub(r'[^a-z0-9]+', '-', where.name.lower())}_{time.strftime('%Y-%m-%d')}.md"
    )
    alone: dict[str, float] = {}
    short: list[str] = []

    def known(*more: str) -> None:
        print("\n\n".join(["", *more]), flush=True)
        texts.extend(more)
        if write:
            write_atomic(path, ("\n\n".join([*texts, *short]) + "\n").encode())

    at = begun
    wanted = [part for part in PARTS if part.name in (parts or NAMES)]
    loops = LOOP_SHARE if "loop" in (parts or NAMES) else 0.0
    budget_of_a_share = budget / (sum(part.share for part in wanted) + 2 * loops)
    for part in wanted:
        at += part.share * budget_of_a_share
        title = part.name
        if time.monotonic() > begun + budget and not tiny:
            known(f"## {title}", "Left out: the time is over.")
            continue
        found = made_tiny(GPU_PAIRS[part.pair]) if tiny else GPU_PAIRS[part.pair]
        decoder = (512, 8, 16) if found.image_size == 224 else (96, 1, 3)
        batch_size, steps = found.batch_size, dict[str, Timed]()
        while batch_size:
            maker = Maker(found, batch_size, where.device, torch.bfloat16, part.compiled, decoder)
            try:
                steps, wrong = measure(maker, where, part.only, at)
                break
            except torch.OutOfMemoryError:
                batch_size //= 2
                del maker
                torch.cuda.empty_cache()
        if not batch_size or PLAIN not in steps:
            known(f"## {title}: {found.title}", "It did not run.", *wrong)
            continue
        if not part.compiled:
            alone[part.pair] = batch_size / statistics.median(steps[ALONE].seconds)
        number = len(steps[PLAIN].seconds)
        about = f"Batch {batch_size}, bfloat16, {number} rounds; ratios are medians over rounds."
        table = list(rows(steps, batch_size, rate, MASKED_TARGET.get(part.pair)))
        short += [f"{title}: {' | '.join(line.split(' | ')[:3])[2:]}" for line in table[2:]]
        missed = [
            name
            for row in table
            if "MISSED" in row
            for name in steps
            if row.startswith(f"| {name} |")
        ]
        seen = dict.fromkeys(n for name in missed for n in (name, steps[name].made.other))
        longest = longest_kernels(steps, [*seen])
        known(f"## {title}: {found.title}", about, "\n".join(table), *wrong, *longest)
        del maker, steps
        torch.compiler.reset()
        if where.on_gpu:
            torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        for key, given, side in (("cifar", images, 32), ("ti_s", photos, 256)):
            name = "photos" if side == 256 else "small images"
            if key not in alone or not loops:
                continue
            found = made_tiny(GPU_PAIRS[key]) if tiny else GPU_PAIRS[key]
            number = 16 if tiny else 8192 if side == 32 else 1024
            place = given or random_images(Path(folder) / key, number, side, 4)
            given_to = place, side == 256, workers, loops * budget_of_a_share, alone[key], device
            got = loop(found, *given_to)
            share = got["steady"] / alone[key]
            target = "" if side == 256 else f" (target 0.9 {'met' if share >= 0.9 else 'MISSED'})"
            line = (
                f"{got['steady']:,.0f} images/s while it trains, {share:.2f} of the bare step's"
                f" {alone[key]:,.0f}{target}; {got['whole']:,.0f} with evaluation and checkpoints;"
                f" {got['wait']:.0%} waiting for images."
            )
            short.append(f"loop, {name}: {line}")
            known(f"## The loop, {name}: {found.title}, student alone", line)
    took = f"{time.monotonic() - begun:.0f} s in all"
    known("## In short", "\n".join(f"- {line}" for line in short), took)
    sys.stdout.flush()


if __name__ == "__main__":
    start(main)
