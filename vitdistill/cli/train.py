"""``vitdistill train``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from ..errors import UserError
from ..recipes import RECIPES
from ..recipes.config import Recipe
from ..recipes.stages import STAGES, Stages
from ..runs.folder import RECIPE
from ..runs.stages import train_stages
from .flags import TEXT, about, wrap
from .recipe_flags import RecipeFlags, parse

if TYPE_CHECKING:
    from ..runs.prepare import Prepared


@dataclass
class TrainFlags(RecipeFlags):
    """Flags of ``train``."""

    output: Annotated[
        str | None,
        TEXT,
        about(
            "the run folder; none: runs/RECIPE, or RECIPE itself if it is a run's folder. A run"
            " there is resumed, never overwritten"
        ),
    ] = None
    device: Annotated[str, TEXT, about("auto, cpu, cuda or cuda:N")] = "auto"
    stage: Annotated[
        str | None, TEXT, about("of a recipe in stages, the one to stop after; none: the last")
    ] = None


def main(words: Sequence[str]) -> int:
    """Train, or resume."""
    about_it = (
        "Train a student, alone or from a teacher. The same command resumes a run that was stopped."
    )
    flags, recipe = parse("train", TrainFlags, words, wrap(about_it))
    output = _output(flags, recipe)
    console = Console()
    from ..runs.train import train

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(prepared: "Prepared") -> None:
        say(_plan_text(prepared))

    if isinstance(recipe, Stages):
        train_stages(
            recipe,
            output,
            device=flags.device,
            console=console,
            prepared=show,
            done=lambda key, folder, summary: say(f"{key} {_done_text(summary, folder)}"),
            until=flags.stage,
        )
        return 0
    if flags.stage is not None:
        raise UserError(f"--stage cannot take effect: the recipe {recipe.name!r} has no stages")
    named = replace(recipe, name=output.absolute().name or recipe.name)
    summary = train(named, output, device=flags.device, console=console, prepared=show)
    say(_done_text(summary, output))
    return 0


def _output(flags: TrainFlags, recipe: Recipe | Stages) -> Path:
    """Where to train: in the folder of the run, or of the stages, that is named as the recipe,
    unless another is given.
    """
    if flags.output is not None:
        return Path(flags.output)
    named, file = Path(flags.recipe), STAGES if isinstance(recipe, Stages) else RECIPE
    return (
        named
        if flags.recipe not in RECIPES and (named / file).is_file()
        else Path("runs") / recipe.name
    )


def _done_text(summary: dict[str, Any], output: Path) -> str:
    best, scores = summary["best_top1"], summary["scores"]
    if best is not None:
        text = f"top-1 {scores['top1']:.2%} (best {best:.2%} at epoch {summary['best_epoch']:g})"
        return f"done: {text}; weights in {output / 'last'} and {output / 'best'}"
    if "knn_top1" in scores:
        return (
            f"done: top-1 of nearest neighbours {scores['knn_top1']:.2%}; weights in"
            f" {output / 'last'}"
        )
    return f"done: weights in {output / 'last'}"


def _plan_text(prepared: "Prepared") -> str:
    from ..explain.cost import cost_of
    from ..explain.text import explain

    train, loader = prepared.recipe.train, prepared.loaders.train
    models = {name: teacher.model for name, teacher in prepared.teachers.items()}
    micro_batch = train.batch_size // (train.accumulate * prepared.world.size)
    cost = cost_of(prepared.plan, prepared.student, models, micro_batch)
    return (
        explain(prepared.plan, cost, loader.steps_per_epoch * train.batch_size, train.epochs) + "\n"
    )
