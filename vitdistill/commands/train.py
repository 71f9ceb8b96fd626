"""``vitdistill train``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.console import Console

from ..data.loader import TrainLoader
from ..recipe import Recipe
from .flags import TEXT, about, wrap
from .recipe_flags import RecipeFlags, parse


@dataclass
class TrainFlags(RecipeFlags):
    """Flags of ``train``."""

    output: Annotated[str | None, TEXT, about("the run folder; none: runs/RECIPE. A run there is resumed, never overwritten")] = None
    device: Annotated[str, TEXT, about("auto, cpu, cuda or cuda:N")] = "auto"


def main(words: Sequence[str]) -> int:
    """Train, or resume."""
    about_it = "Train a student, alone or from a teacher. The same command resumes a run that was stopped."
    flags, recipe = parse("train", TrainFlags, words, wrap(about_it))
    output = Path(flags.output) if flags.output is not None else Path("runs") / recipe.name
    console = Console()
    from ..train.job import Job
    from ..train.loop import train

    def show(job: Job) -> None:
        console.print(_plan_text(job, recipe), highlight=False, markup=False, soft_wrap=True)

    named = replace(recipe, name=output.absolute().name or recipe.name)
    summary = train(named, output, device=flags.device, console=console, prepared=show)
    best, text = summary["best_top1"], f"done: weights in {output / 'last'}"
    if best is not None:
        scores = f"top-1 {summary['scores']['top1']:.2%} (best {best:.2%} at epoch {summary['best_epoch']:g})"
        text = f"done: {scores}; weights in {output / 'last'} and {output / 'best'}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def _plan_text(job: "object", recipe: Recipe) -> str:
    from ..cost import cost_of, explain
    from ..train.job import Job

    assert isinstance(job, Job)
    cost = cost_of(job.plan, job.student, {name: teacher.model for name, teacher in job.teachers.items()})
    loader: TrainLoader = job.train_loader
    images = loader.steps_per_epoch * recipe.train.batch_size
    return explain(job.plan, cost, images, recipe.train.epochs) + "\n"
