"""``vitdistill train``."""

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.sources.base import typical_side
from ..errors import UserError
from ..explain.cost import cost_of
from ..explain.text import explain
from ..messages import format_duration
from ..recipes import RECIPES
from ..recipes.config import Recipe
from ..recipes.stages import STAGES, Stages
from ..runs.folder import RECIPE
from ..runs.preflight import NUM_IMAGES
from ..runs.prepare import Prepared
from ..runs.stages import train_stages
from ..runs.train import train
from .arguments import TrainArguments
from .console import say
from .recipe import resolve_recipe
from .render import render


def run(args: TrainArguments) -> int:
    recipe, console = resolve_recipe(args), Console()
    output, spell = _output(args, recipe), partial(render, arguments=args)
    if isinstance(recipe, Stages):
        train_stages(
            recipe,
            output,
            device=args.device,
            console=console,
            spell=spell,
            prepared=_show,
            done=lambda key, folder, summary: say(f"{key} {_done_text(summary, folder)}"),
            until=args.stage,
        )
        return 0
    if args.stage is not None:
        raise UserError(f"--stage cannot take effect: the recipe {recipe.name!r} has no stages")
    named = replace(recipe, name=output.absolute().name or recipe.name)
    shown: Any = {"console": console, "spell": spell, "prepared": _show}
    summary = train(named, output, device=args.device, **shown)
    say(_done_text(summary, output))
    return 0


def _output(args: TrainArguments, recipe: Recipe | Stages) -> Path:
    """Return the given folder, or that of the run or stages named as the recipe."""
    if args.output is not None:
        return Path(args.output)
    named, file = Path(args.recipe), STAGES if isinstance(recipe, Stages) else RECIPE
    is_run = args.recipe not in RECIPES and (named / file).is_file()
    return named if is_run else Path("runs") / recipe.name


def _done_text(summary: dict[str, Any], output: Path) -> str:
    """Say what a run came to, in what time, how far from its teachers, and what to do next."""
    best, scores, teachers = summary["best_top1"], summary["scores"], summary.get("teachers", {})
    folder = output / ("last" if best is None else "best")
    text, where = "", f"weights: {output / 'last'}"
    following = ["eval", output]
    if best is not None:
        count = min(int(scores.get("num_samples", NUM_IMAGES)), NUM_IMAGES)
        gaps = "".join(
            f", {abs(best - top1) * 100:.1f} points {'below' if best < top1 else 'above'} {name}"
            f" ({top1:.2%} of {count} images)"
            for name, top1 in teachers.items()
        )
        at = f"best {best:.2%} at epoch {summary['best_epoch']:g}{gaps}"
        text, where = f"top-1 {scores['top1']:.2%}, {at}, ", f"{where} and {folder}"
    elif "knn_top1" in scores:
        text = f"top-1 of nearest neighbours {scores['knn_top1']:.2%}, "
        following.append("--knn")
    else:
        following = ["export", output, "--output", "student"]
    command = shlex.join(["vitdistill", *map(str, following)])
    return f"done: {text}{format_duration(summary['seconds'])}\n{where}\nnext: {command}"


def _show(prepared: Prepared) -> None:
    train, loader = prepared.recipe.train, prepared.loaders.train
    models = {name: teacher.model for name, teacher in prepared.teachers.items()}
    size = train.micro_batch(prepared.world.size)
    cost = cost_of(prepared.plan, prepared.student, models, size)
    images = loader.steps_per_epoch * train.batch_size
    side = typical_side(loader.source)
    kinds = loader.order.describe()
    say(explain(prepared.plan, cost, images, train.epochs, side, kinds) + "\n")
