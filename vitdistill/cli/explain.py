"""``vitdistill explain``."""

from dataclasses import dataclass

from ..data.sources.base import check_enough
from ..data.sources.open import open_source
from ..errors import UserError
from ..explain.cost import IMAGENET_TRAIN_IMAGES, cost_of
from ..explain.measure import measure_step
from ..explain.text import explain
from ..messages import format_count, format_table
from ..recipes.config import Recipe
from ..recipes.stages import Stages, dump, in_stage, sources
from ..runs.networks import Built, build_blank, plan_of, without_memory
from ..runs.stages import networks_ahead
from .arguments import ExplainArguments
from .recipe import resolve_recipe


@dataclass(frozen=True)
class _Images:
    """What is known of the training images: how many an epoch has, of how many classes."""

    count: int
    num_classes: int


@dataclass(frozen=True)
class _Run:
    """One run as it will be: its recipe with networks to build, what is to say of it, and the FLOPs
    of the whole of it.
    """

    recipe: Recipe
    images: _Images
    text: str
    flops: int


def run(args: ExplainArguments) -> int:
    """Print the plan and its cost; nothing is trained and nothing is written."""
    recipe = resolve_recipe(args)
    if args.recipe_yaml and args.time:
        raise UserError(
            "--recipe-yaml prints the recipe and --time measures a step: give one of them"
        )
    if args.device is not None and not args.time:
        raise UserError("--device cannot take effect: only --time runs anything on a device")
    if args.recipe_yaml:
        print(dump(recipe), end="")
        return 0
    stages = recipe.stages if isinstance(recipe, Stages) else {"": recipe}
    if isinstance(recipe, Stages):
        runs = _explain_stages(recipe)
    else:
        images = _images(recipe)
        with without_memory():
            networks = build_blank(recipe, images.num_classes)
        runs = [_explain(recipe, *networks, images)]
    if not all(stage.data.dir for stage in stages.values()):
        print(
            "no --data-dir is given: counting ImageNet-1k's 1,281,167 training images and 1,000"
            " classes\n"
        )
    for number, ((key, stage), run) in enumerate(zip(stages.items(), runs, strict=True), 1):
        if key:
            heading = f"Stage {number} of {len(stages)}: {key}" + "".join(
                f", {of}" for of in _origins(stage)
            )
            print(f"{heading}\n{'=' * len(heading)}\n")
        print(run.text)
        if args.time:
            print()
            print(
                measure_step(
                    run.recipe, run.images.num_classes, run.images.count, args.device or "auto"
                )
            )
        if key:
            print()
    if len(runs) > 1:
        rows = [
            (key, str(run.recipe.train.epochs), format_count(run.flops))
            for key, run in zip(stages, runs, strict=True)
        ]
        print(
            "\n".join(
                format_table(
                    [
                        ("all stages", "epochs", "FLOPs"),
                        *rows,
                        ("together", "", format_count(sum(run.flops for run in runs))),
                    ]
                )
            )
        )
    return 0


def _origins(stage: Recipe) -> list[str]:
    """Which networks of a stage come from which earlier one, in words."""
    return [
        f"{'student' if path == 'student.model' else path.split('.')[1]} from {source}"
        for path, source in sources(stage).items()
    ]


def _images(recipe: Recipe) -> _Images:
    if not recipe.data.dir:
        return _Images(IMAGENET_TRAIN_IMAGES, 1000)
    source = open_source(recipe.data.dir, "train")
    check_enough(source, recipe.train.batch_size)
    count = len(source) // recipe.train.batch_size * recipe.train.batch_size
    return _Images(count, len(source.classes) or 1000)


def _explain(recipe: Recipe, student: Built, teachers: dict[str, Built], images: _Images) -> _Run:
    plan = plan_of(
        recipe, student.network, {name: built.network for name, built in teachers.items()}
    )
    micro_batch = recipe.train.batch_size // recipe.train.accumulate
    cost = cost_of(
        plan, student.model, {name: built.model for name, built in teachers.items()}, micro_batch
    )
    text = explain(plan, cost, images.count, recipe.train.epochs)
    return _Run(recipe, images, text, cost.step * images.count * recipe.train.epochs)


def _explain_stages(stages: Stages) -> list[_Run]:
    """Every stage as it will run, whether or not the ones before it have."""
    before: dict[str, int] = {}
    runs = []
    for key, stage in stages.stages.items():
        with in_stage(key):
            images = _images(stage)
        recipe, student, teachers = networks_ahead(stages, key, images.num_classes, before)
        with in_stage(key):
            runs.append(_explain(recipe, student, teachers, images))
    return runs
