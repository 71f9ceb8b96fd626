"""What a model answers, what its features are worth, and what it costs."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..data.decoded import check_images
from ..data.loader import EvalLoader
from ..data.sources.base import ImageSource, renumber
from ..data.sources.open import open_source
from ..distill.teacher import Teacher
from ..errors import ConfigError, Give
from ..evaluate.accuracy import evaluate
from ..evaluate.features import Pool, check_pool, extract
from ..evaluate.knn import knn_accuracy
from ..evaluate.linear import linear_probe
from ..messages import listed
from ..recipes.config import TeacherConfig
from ..vit.flops import forward_flops
from ..vit.needs import Needs
from ..weights.create import class_names
from ..world import World
from .display import Display
from .folder import saved_recipe
from .identity import resolve_run
from .networks import Built, amp_dtype_of, build_teacher, build_teacher_model


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is to be found out about a model."""

    model: TeacherConfig
    teacher: TeacherConfig | None = None  # whose answers are compared with the model's
    data_dir: str
    split: Literal["val", "train"] = "val"
    val_split: float | None = None  # the part of the training images that validates
    skip_damaged: bool = False
    knn: int | None = None  # judge its features by so many nearest training images
    linear_probe: bool = False
    pool: Pool = "mean"
    batch_size: int = 256  # images a step and process
    workers: int = 2
    amp_dtype: str = "auto"

    @property
    def probes(self) -> bool:
        """Whether features are judged."""
        return self.knn is not None or self.linear_probe


def images_of(models: Sequence[str]) -> tuple[str, float | None]:
    """Return ``data.dir`` and ``data.val_split`` of these runs; `ConfigError` unless all agree."""
    recipes = [saved_recipe(Path(resolve_run(model)).parent) for model in models]
    found = {(r.data.dir, r.data.val_split) for r in recipes if r is not None and r.data.dir}
    if len(found) != 1:
        what = f"no images are given, and {listed(models)} is not a run that was trained on some"
        if found:
            what = "the runs were trained on different images"
        raise ConfigError(what, Give("data_dir"), field="data_dir")
    return found.pop()


def evaluate_model(job: Evaluation, world: World, display: Display) -> dict[str, Any]:
    """Return the scores of a model, its size, FLOPs and speed, by name.

    Without a classifier for these classes its features can still be judged; ``no_top1`` then says
    why there is no accuracy. If the images show only some of its classes, ``top1`` is among all of
    them and ``top1_among`` among those shown, which ``among`` counts.

    Raises:
        ConfigError: the images have no labels, or there is nothing to judge the model by.
    """
    display.working(f"loading {job.model.model}")
    source, bank = _open_images(job)
    amp_dtype = amp_dtype_of(job.amp_dtype, world.device)
    built = build_teacher_model(job.model, "model")
    own = class_names(built.model) or ()
    for images in (source, bank):
        if images is not None and {*images.classes} < {*own}:
            renumber(images, own)
    model, no_answers = _build(job, built, source.classes, world.device)
    spec, teacher = model.spec, None
    if job.teacher is not None:
        teacher, _ = build_teacher(job.teacher, "teacher", source.classes, spec, world.device)
    how: dict[str, Any] = {"batch_size": job.batch_size, "workers": job.workers, "world": world}
    loader = EvalLoader(source, spec, **how)
    scores: dict[str, Any] = {"model": job.model.model, "num_samples": float(len(source))}
    if source.notes:
        scores["notes"] = source.notes
    if no_answers:
        scores["no_top1"] = no_answers
    else:
        shown = torch.from_numpy(np.unique(source.labels)).to(world.device)
        among = shown if len(shown) < len(source.classes) else None
        if among is not None:
            scores["among"] = f"{len(shown)} of {len(source.classes)} classes"
        tick = display.watch("evaluating", len(loader))
        scores |= evaluate(model, loader, world, amp_dtype, tick, teacher, among)
    if bank is not None:
        loaders = EvalLoader(bank, spec, **how), loader
        tick = display.watch("reading features", sum(map(len, loaders)))
        train, val = (extract(model.model, it, world, amp_dtype, job.pool, tick) for it in loaders)
        scores |= {"pool": job.pool, "num_train_samples": len(train[1])}
        if job.knn is not None:
            scores |= {"knn_k": job.knn, **knn_accuracy(*train, *val, k=job.knn)}
        if job.linear_probe:
            scores |= linear_probe(*train, *val)
    display.working("measuring its cost")
    return {
        **scores,
        "num_parameters": model.network.num_parameters,
        "flops": forward_flops(model.model, spec.image_size),
        "images_per_second": measure_speed(model, min(job.batch_size, 64), world, amp_dtype),
        "device": world.device_name,
        "threads": torch.get_num_threads(),
    }


def _open_images(job: Evaluation) -> tuple[ImageSource, ImageSource | None]:
    """Return the images, and those that probes learn from."""
    how, bank = (job.skip_damaged, job.workers), None
    if job.probes:
        bank = check_images(open_source(job.data_dir, "train", val_split=job.val_split), *how)
    classes = None if bank is None else bank.classes
    found = open_source(job.data_dir, job.split, classes=classes, val_split=job.val_split)
    source = check_images(found, *how)
    if not source.classes:
        what = f"the images in {job.data_dir} have no labels (no class folders) to evaluate against"
        raise ConfigError(what, field="data.dir")
    return source, bank


def _build(
    job: Evaluation, built: Built, classes: tuple[str, ...], device: torch.device
) -> tuple[Teacher, str]:
    """Return the model, and why its answers cannot be scored; empty if they can."""
    make = partial(build_teacher, job.model, "model", classes, built.spec, device, built=built)
    if job.probes:
        check_pool(job.pool, built.network.has_class_token)
    try:
        if not built.network.num_classes:
            what = "has no classifier, so no accuracy or agreement with a teacher"
            fixes = Give("knn"), Give("linear_probe")
            raise ConfigError(f"{job.model.model} {what}", fixes, field="model")
        return make()[0], ""
    except ConfigError as error:
        if not job.probes or job.teacher is not None:
            raise
        return make(objectives={})[0], error.what


@torch.no_grad()
def measure_speed(
    model: Teacher,
    batch_size: int,
    world: World,
    amp_dtype: torch.dtype | None,
    seconds: float = 1.0,
) -> float:
    """Return images a second of the forward pass alone, the median over ``seconds``."""
    images, times = torch.randn(batch_size, 3, *model.spec.image_size, device=world.device), [0.0]
    while len(times) < 5 or sum(times) < seconds:
        begun = time.perf_counter()
        with world.autocast(amp_dtype):
            model(images, Needs(logits=True))
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        times.append(time.perf_counter() - begun)
    return batch_size / statistics.median(times[2:])
