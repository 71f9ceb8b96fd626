"""What a run's student and its teachers say of each validation image, kept beside the run.

A run keeps only sums. Which images two networks answer alike, which classes are confused, and how
certain a difference over images is can only be told from single answers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.decoded import check_images
from ..data.loader import EvalLoader
from ..data.sources.base import ImageSource
from ..data.sources.open import open_source
from ..distill.teacher import Teacher
from ..errors import MissingSplit, UserError
from ..evaluate.accuracy import Metrics
from ..keyed import I64
from ..recipes.config import Recipe, TeacherConfig
from ..recipes.yaml import load_recipe
from ..runs.evaluate import measure_speed
from ..runs.identity import RECIPE, WEIGHTS, read_record
from ..runs.networks import Built, amp_dtype_of, build_teacher, build_teacher_model
from ..runs.stored import with_teachers
from ..storage.atomic import sha256_file, write_atomic
from ..vit.needs import Needs
from ..world import World
from .verdict import Right

ANSWERS = "answers.json"
STUDENT = "last"
_KEYS = ("weights", "images", "classes", "labels", "student", "teachers", "scores")


@dataclass(frozen=True)
class Answers:
    """What was said of N validation images, by class number.

    Args:
        images: their fingerprint.
        classes: their names.
        labels, student: (N,).
        teachers: by name, (N,).
        scores: of the student, as `Metrics` has them, agreement with each teacher as
            ``agreement.NAME`` and ``kl.NAME``, its own top-1 as ``teacher.NAME``, and speed.
    """

    images: str
    classes: tuple[str, ...]
    labels: I64
    student: I64
    teachers: dict[str, I64]
    scores: dict[str, float]

    @property
    def right(self) -> Right:
        return self.student == self.labels

    @property
    def taught(self) -> Right:
        """Which images its first teacher answers correctly."""
        return next(iter(self.teachers.values())) == self.labels


def read_answers(run: Path) -> Answers | None:
    """Read the answers of a run's last weights; None if there are none, or of other weights."""
    found, weights = read_record(run / ANSWERS, _KEYS), run / STUDENT / WEIGHTS
    if found is None or not weights.is_file() or found["weights"] != sha256_file(weights):
        return None
    labels, student = np.array(found["labels"]), np.array(found["student"])
    teachers = {name: np.array(said) for name, said in found["teachers"].items()}
    names = tuple(found["classes"])
    return Answers(found["images"], names, labels, student, teachers, found["scores"])


def open_validation(recipe: Recipe) -> ImageSource | None:
    """Open a run's validation images; None where it has no labelled ones."""
    data = recipe.data
    try:
        source = open_source(data.dir, "val", val_split=data.val_split)
    except MissingSplit:
        return None
    return check_images(source, data.skip_damaged, data.workers) if source.classes else None


@torch.no_grad()
def ask(run: Path, device: torch.device, say: Callable[[str], None]) -> None:
    """Have a run's last student, and its teachers that are there, answer to its validation images.

    Do nothing if they already did, or if there is nobody or nothing to ask.

    Raises:
        UserError: the images that the recipe names are not there.
    """
    weights = run / STUDENT / WEIGHTS
    if not weights.is_file() or read_answers(run) is not None:
        return
    recipe = load_recipe(run / RECIPE)
    built = build_teacher_model(TeacherConfig(model=str(run / STUDENT)), "student")
    source = open_validation(recipe) if built.network.num_classes else None
    if source is None:
        return
    say(f"asking {run}")
    # Answers are kept in the images' order, so one process has them all.
    world, size = World(0, 1, device), recipe.train.eval_batch_size
    networks = _build(recipe, built, source, device, say)
    loader = EvalLoader(
        source, built.spec, batch_size=size, workers=recipe.data.workers, world=world
    )
    amp_dtype, needs = amp_dtype_of(recipe.train.amp_dtype, device), Needs(logits=True)
    said = {name: np.zeros(len(source), np.int64) for name in networks}
    sums = {name: Metrics(device) for name in networks}
    for batch in loader:
        with world.autocast(amp_dtype):
            found = {name: run(batch.images, needs).logits for name, run in networks.items()}
        logits = {name: values.float() for name, values in found.items() if values is not None}
        for name, values in logits.items():
            said[name][batch.ids.numpy(force=True)] = values.argmax(1).numpy(force=True)
            sums[name].update(logits[""], batch.labels, values if name else None)
    scores = sums.pop("").compute()
    for name, both in sums.items():
        of_both = both.compute()
        scores |= {f"{key}.{name}": of_both[key] for key in ("agreement", "kl")}
        scores[f"teacher.{name}"] = float(np.mean(said[name] == source.labels))
    how = networks[""], min(size, 64), world, amp_dtype
    scores["images_per_second"] = measure_speed(*how, seconds=0.25)
    kept = {
        "weights": sha256_file(weights),
        "images": source.fingerprint(),
        "classes": source.classes,
        "labels": source.labels.tolist(),
        "student": said.pop("").tolist(),
        "teachers": {name: answers.tolist() for name, answers in said.items()},
        "scores": scores,
    }
    write_atomic(run / ANSWERS, json.dumps(kept).encode())


def _build(
    recipe: Recipe,
    built: Built,
    source: ImageSource,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Teacher]:
    """Return the student as "", and the teachers with a classifier that are there."""
    place = source.classes, built.spec, device
    student, _ = build_teacher(TeacherConfig(model="student"), "student", *place, built=built)
    networks = {"": student}
    try:
        recipe = with_teachers(recipe)
    except UserError as error:
        say(f"teachers behind stored labels cannot be asked: {error.what}")
    for name, config in recipe.teachers.items():
        if not config.model:
            continue
        try:
            teacher = build_teacher_model(config, name)
            if teacher.network.num_classes:
                networks[name], _ = build_teacher(config, name, *place, built=teacher)
        except UserError as error:
            say(f"{name} cannot be asked: {error.what}")
    return networks
