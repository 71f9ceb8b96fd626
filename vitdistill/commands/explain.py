"""``vitdistill explain``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from tyro.conf import arg

from ..build import Built, build_student, build_teacher_model, plan_of
from ..cost import IMAGENET_TRAIN_IMAGES, cost_of, explain
from ..data.source import open_source
from ..recipe import Recipe, dump_recipe
from .recipe_flags import RecipeFlags, parse


@dataclass
class ExplainFlags(RecipeFlags):
    """Flags of ``explain``."""

    time: Annotated[bool, arg(help="run a few steps on this machine (random images and weights) and print the hours they imply")] = False
    device: Annotated[str, arg(help="for --time: auto, cpu, cuda, cuda:N or mps")] = "auto"
    recipe_yaml: Annotated[bool, arg(help="print the resolved recipe as YAML instead")] = False


def main(words: Sequence[str]) -> int:
    """Print the plan and its cost; nothing is trained and nothing is written."""
    flags, recipe = parse("explain", ExplainFlags, words, "What a run will compute and cost, before it runs. No weights and no images are read.")
    if flags.recipe_yaml:
        print(dump_recipe(recipe), end="")
        return 0
    num_images, num_classes = IMAGENET_TRAIN_IMAGES, 1000
    if recipe.data.dir:
        source = open_source(recipe.data.dir, "train")
        num_images = len(source) // recipe.train.batch_size * recipe.train.batch_size
        num_classes = len(source.classes) or 1000
    else:
        print("no --data-dir is given: counting ImageNet-1k's 1,281,167 training images and 1,000 classes\n")
    with torch.device("meta"):
        student, teachers = _networks(recipe, num_classes)
    plan = plan_of(recipe, student.network, {name: built.network for name, built in teachers.items()})
    cost = cost_of(plan, student.model, {name: built.model for name, built in teachers.items()})
    print(explain(plan, cost, num_images, recipe.train.epochs))
    if flags.time:
        from ..train.probe import measure_step

        print()
        print(measure_step(recipe, num_classes, num_images, flags.device))
    return 0


def _networks(recipe: Recipe, num_classes: int) -> tuple[Built, dict[str, Built]]:
    """Architectures without weights; a teacher's answer is taken as matched to the data set's classes."""
    student = build_student(replace(recipe.student, pretrained=False, checkpoint=None), num_classes)
    teachers = {}
    for name, config in recipe.teachers.items():
        built = build_teacher_model(replace(config, pretrained=False, checkpoint=None), name, with_weights=False)
        teachers[name] = replace(built, network=replace(built.network, num_classes=num_classes))
    return student, teachers
