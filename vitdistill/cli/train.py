"""``vitdistill train``."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.sources.base import typical_side
from ..errors import UserError
from ..explain.cost import cost_of
from ..explain.text import explain
from ..recipes import RECIPES
from ..recipes.config import Recipe
from ..recipes.stages import STAGES, Stages
from ..runs.folder import RECIPE
from ..runs.prepare import Prepared
from ..runs.stages import train_stages
from ..runs.train import train
from .arguments import TrainArguments
from .recipe import resolve_recipe
from .say import say


def run(args: TrainArguments) -> int:
    """Train, or resume."""
    recipe, console = resolve_recipe(args), Console()
    output = _output(args, recipe)
    if isinstance(recipe, Stages):
        train_stages(
            recipe,
            output,
            device=args.device,
            console=console,
            prepared=_show,
            done=lambda key, folder, summary: say(f"{key} {_done_text(summary, folder)}"),
            until=args.stage,
        )
        return 0
    if args.stage is not None:
        raise UserError(f"--stage cannot take effect: the recipe {recipe.name!r} has no stages")
    named = replace(recipe, name=output.absolute().name or recipe.name)
    summary = train(named, output, device=args.device, console=console, prepared=_show)
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
    best, scores, where = summary["best_top1"], summary["scores"], f"weights in {output / 'last'}"
    if best is not None:
        text = f"top-1 {scores['top1']:.2%} (best {best:.2%} at epoch {summary['best_epoch']:g})"
        return f"done: {text}; {where} and {output / 'best'}"
    knn = f"top-1 of nearest neighbours {scores['knn_top1']:.2%}; " if "knn_top1" in scores else ""
    return f"done: {knn}{where}"


def _show(prepared: Prepared) -> None:
    """Print the plan of a run and its cost."""
    train, loader = prepared.recipe.train, prepared.loaders.train
    models = {name: teacher.model for name, teacher in prepared.teachers.items()}
    micro_batch = train.batch_size // (train.accumulate * prepared.world.size)
    cost = cost_of(prepared.plan, prepared.student, models, micro_batch)
    images = loader.steps_per_epoch * train.batch_size
    side = typical_side(loader.source)
    say(explain(prepared.plan, cost, images, train.epochs, side) + "\n")
