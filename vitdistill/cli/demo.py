"""``vitdistill demo``: the whole job on scikit-learn's handwritten digits, in about two minutes on
two cores.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from ..explain.ahead import plan_and_cost
from ..explain.cost import Cost
from ..messages import format_count
from ..recipes.config import Recipe
from ..recipes.demo import demo_recipes
from ..runs.networks import build_student, build_teacher_model
from ..runs.pictures import png
from ..runs.train import train
from ..storage.atomic import staged_dir, write_new
from .arguments import DemoArguments
from .say import say

NUM_VALIDATION = 360


def run(args: DemoArguments) -> int:
    """Teacher, student alone, plain distillation, MaskedKD at several keep rates; then a table."""
    output, console = Path(args.output), Console()
    # Matrices this small lose more to waiting for each other than they gain.
    torch.set_num_threads(1)
    images = output / "images"
    write_digits(images)
    recipes = demo_recipes(str(images), str(output / "teacher" / "last"))
    quiet = Console(file=console.file, quiet=not console.is_terminal)
    rows = []
    for i, (name, recipe) in enumerate(recipes.items()):
        say(f"[{i + 1}/{len(recipes)}] {recipe.description}")
        summary = train(recipe, output / name, device="cpu", console=quiet)
        rows.append((recipe.description, summary, _cost(recipe)))
    console.print()
    console.print(_table(rows))
    say(
        f"The patches the teacher saw: {output}/maskedkd_50/pictures.png\n"
        f"Top-1 is on {NUM_VALIDATION} images: differences under about 2 points are noise. Times"
        " include start-up and evaluation.\n"
        f"A student for timm: timm.create_model('local-dir:{output}/maskedkd_50/last',"
        " pretrained=True)\n"
        "Your own: vitdistill train maskedkd --data-dir PHOTOS --model deit_tiny_patch16_224"
        " --teacher-model TEACHER --teacher-path WEIGHTS"
    )
    return 0


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits (UCI, 8 x 8 pixels, 16 grey levels) as an image folder, once."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the demo reads scikit-learn's digits, which is not installed: pip install"
            ' "vitdistill[demo]"'
        ) from None
    if folder.is_dir():
        return
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).tolist()
    with staged_dir(folder) as temp, _whole(temp):
        for position, i in enumerate(order):
            split = "val" if position < NUM_VALIDATION else "train"
            target = temp / split / str(digits.target[i])
            target.mkdir(parents=True, exist_ok=True)
            write_new(target / f"{i:04d}.png", png(Image.fromarray(pixels[i])))


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Empty a folder again when what is to fill it is interrupted: `storage` removes no trees."""
    try:
        yield
    except BaseException:
        for entry in folder.iterdir():
            shutil.rmtree(entry, ignore_errors=True)
        raise


def _cost(recipe: Recipe) -> Cost:
    student = build_student(recipe.student, 10)
    teachers = {name: build_teacher_model(config, name) for name, config in recipe.teachers.items()}
    return plan_and_cost(recipe, student, teachers)[1]


def _table(rows: list[tuple[str, dict[str, Any], Cost]]) -> Table:
    title = "Handwritten digits: accuracy, and what one training image costs"
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("top-1", "teacher", "whole step", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, summary, cost in rows:
        teacher = sum(cost.teachers.values())
        table.add_row(
            name,
            f"{summary['scores']['top1']:.1%}",
            format_count(teacher) if teacher else "-",
            format_count(cost.step),
            f"{summary['seconds']:.0f} s",
        )
    return table
