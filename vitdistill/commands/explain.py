"""``vitdistill explain``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch

from ..build import Built, build_student, build_teacher_model, plan_of, reads_logits, trains_classifier
from ..cost import IMAGENET_TRAIN_IMAGES, cost_of, explain
from ..data.source import open_source
from ..errors import ConfigError, UserError
from ..recipe import Recipe, dump_recipe
from .flags import TEXT, about, wrap
from .recipe_flags import RecipeFlags, parse


@dataclass
class ExplainFlags(RecipeFlags):
    """Flags of ``explain``."""

    time: Annotated[bool, about("run a few steps here (random images and weights), print the hours implied")] = False
    device: Annotated[str | None, TEXT, about("for --time: cpu, cuda or cuda:N; none: the best there is")] = None
    recipe_yaml: Annotated[bool, about("print the resolved recipe as YAML instead")] = False


def main(words: Sequence[str]) -> int:
    """Print the plan and its cost; nothing is trained and nothing is written."""
    about_it = "What a run will compute and cost, before it runs. No weights are read and nothing is written."
    flags, recipe = parse("explain", ExplainFlags, words, wrap(about_it))
    if flags.recipe_yaml and flags.time:
        raise UserError("--recipe-yaml prints the recipe and --time measures a step: give one of them")
    if flags.device is not None and not flags.time:
        raise UserError("--device cannot take effect: only --time runs anything on a device")
    if flags.recipe_yaml:
        print(dump_recipe(recipe), end="")
        return 0
    num_images, num_classes, counted = IMAGENET_TRAIN_IMAGES, 1000, "ImageNet-1k's 1,281,167 training images and 1,000 classes"
    if recipe.data.dir:
        source = open_source(recipe.data.dir, "train")
        num_images = len(source) // recipe.train.batch_size * recipe.train.batch_size
        num_classes = len(source.classes) or 1000
        if num_images == 0:
            few = f"{source.name} has {len(source)} images, fewer than one batch of {recipe.train.batch_size}"
            raise ConfigError(f"{few}: lower --batch-size")
        counted = ""
    with torch.device("meta"):
        student, teachers = _networks(recipe, num_classes)
    plan = plan_of(recipe, student.network, {name: built.network for name, built in teachers.items()})
    cost = cost_of(plan, student.model, {name: built.model for name, built in teachers.items()})
    if counted:
        print(f"no --data-dir is given: counting {counted}\n")
    print(explain(plan, cost, num_images, recipe.train.epochs))
    if flags.time:
        from ..train.probe import measure_step

        print()
        print(measure_step(recipe, num_classes, num_images, flags.device or "auto"))
    return 0


def _networks(recipe: Recipe, num_classes: int) -> tuple[Built, dict[str, Built]]:
    """Architectures without weights; a teacher's answer is taken as matched to the data set's classes."""
    student = build_student(recipe.student, num_classes, with_weights=False)
    if not trains_classifier(recipe.objectives, student.network):
        student = build_student(recipe.student, 0, with_weights=False)
    teachers = {}
    for name, config in recipe.teachers.items():
        built = build_teacher_model(config, name, with_weights=False)
        if reads_logits(recipe.objectives, built.network):
            built = replace(built, network=replace(built.network, num_classes=num_classes if built.network.num_classes else 0))
        teachers[name] = built
    return student, teachers
