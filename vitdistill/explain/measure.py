"""A measured step: a few real optimizer steps on random images, and the hours they imply."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..distill.step import Distillation, blank_batch
from ..errors import UserError
from ..messages import format_duration, plural
from ..recipes.config import Recipe
from ..runs.networks import (
    PRECISIONS,
    amp_dtype_of,
    build_blank,
    compile_errors,
    compile_networks,
    name_precision,
)
from ..runs.optim import clip_gradients, gradient_norm, make_optimizer
from ..runs.prepare import prepare, shares_at_start
from ..world import World, choose_device, join_world
from .ahead import Forecast
from .cost import stand_in

SECONDS = 10.0


@dataclass(frozen=True)
class Measured:
    """Seconds an image of a training step: the median of ``count`` steps of ``size`` images."""

    per_image: float
    count: int
    size: int
    device: torch.device


def time_step(ahead: Forecast, device_name: str = "auto") -> Measured:
    """Time optimizer steps of a run on this machine.

    Weights are random, which costs the same. Images are random and on the device already, so that
    loading is not measured. A batch larger than a few seconds allow is timed in part.
    """
    world, train = World(0, 1, choose_device(device_name)), ahead.recipe.train
    step, whole = _make_step(ahead, world), train.micro_batch()
    size = min(4, whole)
    with compile_errors(train.compile):
        step(size)
    while size < whole and step(size) < SECONDS / 8:
        size = min(2 * size, whole)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begun < SECONDS and len(times) < 30):
        times.append(step(size))
    return Measured(statistics.median_high(times) / size, len(times), size, world.device)


def measure_step(ahead: Forecast, device_name: str = "auto") -> str:
    """Time optimizer steps of a run on this machine; return one sentence or two."""
    found, train = time_step(ahead, device_name), ahead.recipe.train
    per_image = found.per_image
    where = f"this CPU ({plural(torch.get_num_threads(), 'thread')})"
    if found.device.type == "cuda":
        where = torch.cuda.get_device_name(found.device)
    part = f" (timed in batches of {found.size})" if found.size < train.micro_batch() else ""
    hours = format_duration(per_image * ahead.num_images * train.epochs)
    return (
        f"Measured on {where}, {name_precision(amp_dtype_of(train.amp_dtype, found.device))}:"
        f" {per_image * train.batch_size:.3g} s a step of {train.batch_size} images{part},"
        f" {1 / per_image:,.0f} images/s, median of {found.count};\nthe whole run would take"
        f" {hours} of one process, loading and evaluation not counted."
    )


def shares_ahead(recipe: Recipe, device_name: str = "auto") -> list[str | UserError]:
    """Return what a run will say of its objectives' shares; raises as `prepare` does."""
    with join_world(device_name) as world:
        return shares_at_start(prepare(recipe, world, lambda text: None))


def _make_step(ahead: Forecast, world: World) -> Callable[[int], float]:
    """Return a function that takes a step on that many images and returns its seconds."""
    recipe, plan, device = ahead.recipe, ahead.plan, world.device
    amp_dtype = amp_dtype_of(recipe.train.amp_dtype, device)
    heads = {name: teacher.num_classes for name, teacher in plan.teachers.items()}
    student, built = build_blank(recipe, ahead.num_classes, heads)
    module = Distillation(student.model, plan).to(device).train()
    teachers = {}
    for name, teacher in built.items():
        dtype = PRECISIONS[recipe.teachers[name].precision]
        teachers[name] = stand_in(teacher.model, plan.teachers[name], module, device, dtype)
    optimizer = make_optimizer(module, recipe.optim)
    if recipe.train.compile:
        compile_networks(module, *teachers.values())

    def step(size: int) -> float:
        blank = blank_batch(plan, size, device)
        labels = torch.randint(ahead.num_classes, (size,), device=device)
        batch = replace(blank, images=torch.randn_like(blank.images), labels=labels)
        _wait(device)
        begun = time.perf_counter()
        optimizer.zero_grad()
        with world.autocast(amp_dtype):
            loss = module(batch, teachers)["loss"]
        loss.backward()
        clip_gradients(module, recipe.optim.clip_grad, gradient_norm(module))
        optimizer.step()
        _wait(device)
        return time.perf_counter() - begun

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
