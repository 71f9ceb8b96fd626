"""``vitdistill demo``: the whole job on scikit-learn's handwritten digits, in about two minutes on
two cores.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from ..errors import ConfigError
from ..explain.ahead import forecast
from ..explain.cost import Cost
from ..messages import format_count, format_table
from ..recipes.demo import demo_recipes
from ..report.answers import ask
from ..runs.train import train
from ..world import ALONE
from .arguments import DemoArguments
from .console import say
from .report import write_report

NUM_VALIDATION = 360


def run(args: DemoArguments) -> int:
    """Train a teacher, then students: alone, by plain distillation, by MaskedKD at several keep
    rates; print a table, and write a report.
    """
    output, console = Path(args.output), Console()
    # With matrices this small, threads lose more to waiting than they gain.
    torch.set_num_threads(1)
    images = output / "images"
    write_digits(images)
    recipes = demo_recipes(str(images), str(output / "teacher" / "last"))
    quiet = Console(file=console.file, quiet=not console.is_terminal)
    rows: list[tuple[str, ...]] = [
        ("Handwritten digits; FLOPs an image", "top-1", "teacher", "whole step", "time")
    ]
    for i, (name, recipe) in enumerate(recipes.items()):
        say(f"[{i + 1}/{len(recipes)}] {recipe.description}")
        summary = train(recipe, output / name, device="cpu", console=quiet)
        rows.append(_row(recipe.description, summary, forecast(recipe)[""].cost))
    say("\n".join(["", *format_table(rows)]))
    for name in recipes:
        ask(output / name, ALONE.device, lambda text: None)
    write_report([output / name for name in recipes], output / "report.html")
    say(
        f"Top-1 is on {NUM_VALIDATION} images: differences under about 2 points are noise.\n"
        "Times include start-up and evaluation.\n"
        f"A student for timm:\n  timm.create_model({f'local-dir:{output}/maskedkd_50/last'!r},"
        " pretrained=True)\n"
        "Your own:\n"
        "  vitdistill train maskedkd --data-dir PHOTOS --model deit_tiny_patch16_224 \\\n"
        "    --teacher-model TEACHER --teacher-path WEIGHTS"
    )
    return 0


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits (UCI, 8 x 8 pixels, 16 grey levels) as an image folder, once."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        what = "the demo reads scikit-learn's digits, which is not installed"
        raise ConfigError(what, 'pip install "vitdistill[demo]"') from None
    if folder.is_dir():
        return
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).tolist()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temp:
        for position, i in enumerate(order):
            split = "val" if position < NUM_VALIDATION else "train"
            target = Path(temp) / "images" / split / str(digits.target[i])
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(target / f"{i:04d}.png")
        (Path(temp) / "images").rename(folder)


def _row(name: str, summary: dict[str, Any], cost: Cost) -> tuple[str, ...]:
    """Return a line of the table: accuracy, and what one training image costs."""
    teacher = sum(cost.teachers.values())
    shown = format_count(teacher) if teacher else "-"
    seconds = f"{summary['seconds']:.0f} s"
    return name, f"{summary['scores']['top1']:.1%}", shown, format_count(cost.step), seconds
