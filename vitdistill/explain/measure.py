"""A measured step: a few real optimizer steps on random images, and the hours they imply."""

import time
from dataclasses import replace

import torch

from ..data.batch import Batch
from ..distill.step import Distillation
from ..distill.teacher import Teacher
from ..labels.reader import blank_targets
from ..messages import format_duration, plural
from ..recipes.config import Recipe
from ..recipes.convert import replace_fields
from ..runs.networks import (
    PRECISIONS,
    amp_dtype_of,
    build_blank_teacher,
    build_student,
    plan_of,
    prefer_explicit_attention,
    reads_logits,
    trains_classifier,
)
from ..runs.optim import clip_gradients, make_optimizer
from ..world import choose_device

SECONDS = 10.0


def measure_step(
    recipe: Recipe, num_classes: int, num_images: int, device_name: str = "auto"
) -> str:
    """Time optimizer steps of ``recipe`` on this machine; one sentence or two.

    Weights are random, which costs the same. Images are random and on the device already: loading
    is not in the measure. A batch larger than what a few seconds allow is timed in part, and said
    so.
    """
    device = choose_device(device_name)
    amp_dtype = amp_dtype_of(recipe.train.amp_dtype, device)
    plain = {"student.pretrained": False, "student.checkpoint": None}
    plain |= {
        f"teachers.{name}.{key}": value
        for name in recipe.teachers
        for key, value in (("pretrained", False), ("checkpoint", None))
    }
    named, recipe = recipe.teachers, replace_fields(recipe, plain)
    student = build_student(recipe.student, num_classes)
    if not trains_classifier(recipe.objectives, student.network):
        student = build_student(recipe.student, 0)
    teachers = {}
    for name, config in named.items():
        if config.labels is not None:
            continue
        built = build_blank_teacher(config, name, recipe.objectives)
        dtype = PRECISIONS[config.precision]
        index, network = None, built.network
        if reads_logits(recipe.objectives, network):
            index = torch.arange(num_classes) % max(network.num_classes, 1)
            network = replace(network, num_classes=num_classes)
        teachers[name] = Teacher(
            built.model,
            network,
            built.spec,
            student.spec,
            class_index=index,
            dtype=dtype,
            device=device,
        )
        prefer_explicit_attention(built.model, dtype or amp_dtype, device)
    plan = plan_of(
        recipe, student.network, {name: teacher.network for name, teacher in teachers.items()}
    )
    module = Distillation(student.model, plan).to(device).train()
    prefer_explicit_attention(module, amp_dtype, device)
    optimizer = make_optimizer(module, recipe.optim)
    if recipe.train.compile:
        module.run = torch.compile(module.run)
        for teacher in teachers.values():
            teacher.run = torch.compile(teacher.run)

    def step(size: int) -> float:
        labels = torch.randint(num_classes, (size,), device=device)
        ids = torch.arange(size, device=device)
        batch = Batch(
            torch.randn(size, 3, *student.spec.image_size, device=device),
            labels,
            ids,
            torch.zeros_like(ids),
            0,
        )
        for name, layout in plan.labels.items():
            batch.targets[name] = blank_targets(layout, size, device)
        _wait(device)
        begun = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            loss = module(batch, teachers)["loss"]
        loss.backward()
        clip_gradients(module, recipe.optim.clip_grad)
        optimizer.step()
        _wait(device)
        return time.perf_counter() - begun

    whole = recipe.train.batch_size // recipe.train.accumulate
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
    per_image = sorted(times)[len(times) // 2] / size
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"this CPU ({plural(torch.get_num_threads(), 'thread')})"
    )
    part = f" (timed in batches of {size})" if size < whole else ""
    total = per_image * num_images * recipe.train.epochs
    return (
        f"Measured on {where},"
        f" {'float32' if amp_dtype is None else str(amp_dtype).removeprefix('torch.')}:"
        f" {per_image * recipe.train.batch_size:.3g} s a step of {recipe.train.batch_size}"
        f" images{part}, {1 / per_image:,.0f} images/s, median of {len(times)};\nthe whole run"
        f" would take {format_duration(total)} of one process, loading and evaluation not counted."
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
