"""A measured step: a few real optimizer steps on random images, and the hours they imply."""

import statistics
import time
from dataclasses import replace

import torch

from ..distill.step import Distillation, blank_batch
from ..messages import format_duration, plural
from ..recipes.config import Recipe
from ..runs.networks import (
    PRECISIONS,
    amp_dtype_of,
    build_blank,
    compile_networks,
    plan_of,
)
from ..runs.optim import clip_gradients, gradient_norm, make_optimizer
from ..world import World, choose_device
from .cost import stand_in

SECONDS = 10.0


def measure_step(
    recipe: Recipe, num_classes: int, num_images: int, device_name: str = "auto"
) -> str:
    """Time optimizer steps of ``recipe`` on this machine; return one sentence or two.

    Weights are random, which costs the same. Images are random and on the device already, so that
    loading is not measured. A batch larger than a few seconds allow is timed in part.
    """
    device = choose_device(device_name)
    train, amp_dtype = recipe.train, amp_dtype_of(recipe.train.amp_dtype, device)
    step = _Step(recipe, num_classes, World(0, 1, device), amp_dtype)
    whole = train.batch_size // train.accumulate
    size = min(4, whole)
    step(size)
    pace = step(size) / size
    while size < whole and pace * size < SECONDS / 8:
        size = min(2 * size, whole)
        pace = step(size) / size
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begun < SECONDS and len(times) < 30):
        times.append(step(size))
    per_image = statistics.median_high(times) / size
    where = f"this CPU ({plural(torch.get_num_threads(), 'thread')})"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    part = f" (timed in batches of {size})" if size < whole else ""
    precision = str(amp_dtype or torch.float32).removeprefix("torch.")
    return (
        f"Measured on {where}, {precision}: {per_image * train.batch_size:.3g} s a step of"
        f" {train.batch_size} images{part}, {1 / per_image:,.0f} images/s, median of"
        f" {len(times)};\nthe whole run would take"
        f" {format_duration(per_image * num_images * train.epochs)} of one process, loading and"
        " evaluation not counted."
    )


class _Step:
    """The training step of a recipe, with random weights."""

    def __init__(
        self, recipe: Recipe, num_classes: int, world: World, amp_dtype: torch.dtype | None
    ) -> None:
        self.world, self.amp_dtype, self.num_classes = world, amp_dtype, num_classes
        self.clip_grad = recipe.optim.clip_grad
        student, teachers = build_blank(recipe, num_classes)
        networks = {name: built.network for name, built in teachers.items()}
        plan = plan_of(recipe, student.network, networks)
        self.module = Distillation(student.model, plan).to(world.device).train()
        self.teachers = {}
        for name, built in teachers.items():
            dtype = PRECISIONS[recipe.teachers[name].precision]
            self.teachers[name] = stand_in(
                built.model, built.network, self.module, world.device, dtype
            )
        self.optimizer = make_optimizer(self.module, recipe.optim)
        if recipe.train.compile:
            compile_networks(self.module, self.teachers)

    def __call__(self, size: int) -> float:
        """Take a step on ``size`` images; return its seconds."""
        device = self.world.device
        blank = blank_batch(self.module.plan, size, device)
        batch = replace(
            blank,
            images=torch.randn_like(blank.images),
            labels=torch.randint(self.num_classes, (size,), device=device),
        )
        _wait(device)
        begun = time.perf_counter()
        self.optimizer.zero_grad()
        with self.world.autocast(self.amp_dtype):
            loss = self.module(batch, self.teachers)["loss"]
        loss.backward()
        clip_gradients(self.module, self.clip_grad, gradient_norm(self.module))
        self.optimizer.step()
        _wait(device)
        return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
