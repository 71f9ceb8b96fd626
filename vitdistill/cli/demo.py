"""``vitdistill demo``: the whole job on scikit-learn's handwritten digits, in about two minutes on
two cores.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from ..data.augment import Augment
from ..data.loader import EvalLoader
from ..data.model_input import input_spec_of
from ..data.sources.open import open_source
from ..errors import ConfigError
from ..explain.cost import cost_of
from ..messages import format_count
from ..methods.cross_entropy import CrossEntropy
from ..methods.kd import SoftKD
from ..methods.maskedkd import MaskedKD, select_patches
from ..recipes.config import (
    DataConfig,
    OptimConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from ..runs.networks import build_student, build_teacher_model, plan_of
from ..runs.train import train
from ..storage.atomic import staged_dir, write_atomic, write_new
from ..vit.needs import Needs
from ..vit.patches import num_kept_patches
from ..vit.walk import run_vit
from ..weights import create as weights
from .arguments import DemoArguments

NUM_VALIDATION = 360
KEEP_RATES = (0.75, 0.5)


def run(args: DemoArguments) -> int:
    """Teacher, student alone, plain distillation, MaskedKD at several keep rates; a table and a
    picture.
    """
    output, console = Path(args.output), Console()
    torch.set_num_threads(
        1
    )  # matrices this small lose more to waiting for each other than they gain
    images = output / "images"
    write_digits(images)
    teacher = output / "teacher"
    recipes = demo_recipes(str(images), str(teacher / "last"))
    rows = []
    for i, (name, recipe) in enumerate(recipes.items()):
        console.print(
            f"[{i + 1}/{len(recipes)}] {recipe.description}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        rows.append((recipe.description, _run(recipe, output / name, console), _cost(recipe)))
    console.print()
    console.print(_table(rows))
    picture = output / "what_the_teacher_saw.png"
    write_atomic(picture, _png(draw_choices(output / "maskedkd_50" / "last", images)))
    console.print(
        f"The patches the teacher saw: {picture}\nTop-1 is on {NUM_VALIDATION} images: differences"
        " under about 2 points are noise. Times include start-up and evaluation.\nA student for"
        f" timm: timm.create_model('local-dir:{output}/maskedkd_50/last', pretrained=True)\nYour"
        " own: vitdistill train maskedkd --data-dir PHOTOS --model deit_tiny_patch16_224"
        " --teacher-model TEACHER --teacher-path WEIGHTS",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


def write_digits(folder: Path) -> None:
    """scikit-learn's digits (UCI, 8 x 8 pixels, 16 grey levels) as an image folder; what is there
    already is kept.
    """
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
            write_new(target / f"{i:04d}.png", _png(Image.fromarray(pixels[i])))


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Empty a folder again when what is to fill it is interrupted: `storage` removes no trees."""
    try:
        yield
    except BaseException:
        for entry in folder.iterdir():
            shutil.rmtree(entry, ignore_errors=True)
        raise


def demo_recipes(images: str, teacher: str) -> dict[str, Recipe]:
    """The demo's runs by folder name: 8 x 8 images in 16 patches of 2 x 2 pixels."""

    def vit(dim: int, depth: int, heads: int) -> StudentConfig:
        args = {
            "img_size": 8,
            "patch_size": 2,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": heads,
        }
        return StudentConfig(model="vit_tiny_patch16_224", model_args=args)

    base = Recipe(
        student=vit(64, 4, 4),
        objectives={"ce": CrossEntropy(smoothing=0.1)},
        data=DataConfig(
            dir=images, workers=0, augment=Augment(crop="pad", crop_padding=0, hflip=0.0)
        ),
        optim=OptimConfig(lr=2e-3, warmup_epochs=2.0, clip_grad=1.0),
        train=TrainConfig(
            epochs=30, batch_size=64, log_every=1000, eval_every=10, amp_dtype="float32"
        ),
    )
    alone = replace(
        base,
        student=vit(16, 2, 2),
        optim=replace(base.optim, lr=4e-3),
        train=replace(base.train, epochs=40),
    )
    taught = replace(
        alone,
        teachers={"teacher": TeacherConfig(model=teacher)},
        objectives={
            "ce": CrossEntropy(weight=0.5, smoothing=0.1),
            "kd": SoftKD(weight=0.5, temperature=2.0),
        },
    )
    recipes = {
        "teacher": replace(base, description="teacher, 64 wide, 4 deep"),
        "alone": replace(alone, description="student, 16 wide, 2 deep"),
        "kd": replace(taught, description="+ plain distillation"),
    }
    for rate in KEEP_RATES:
        count = num_kept_patches(16, rate)
        recipes[f"maskedkd_{rate * 100:.0f}"] = replace(
            taught,
            selector=MaskedKD(keep_rate=rate),
            description=f"+ MaskedKD, {count} of 16 patches",
        )
    return {name: replace(recipe, name=name) for name, recipe in recipes.items()}


def _run(recipe: Recipe, folder: Path, console: Console) -> dict[str, Any]:
    quiet = Console(file=console.file, quiet=not console.is_terminal)
    return train(recipe, folder, device="cpu", console=quiet)


def _cost(recipe: Recipe) -> tuple[int, int]:
    """FLOPs an image: the teacher's, and the whole step's."""
    student = build_student(recipe.student, 10)
    teachers = {name: build_teacher_model(config, name) for name, config in recipe.teachers.items()}
    plan = plan_of(
        recipe, student.network, {name: built.network for name, built in teachers.items()}
    )
    cost = cost_of(
        plan,
        student.model,
        {name: built.model for name, built in teachers.items()},
        recipe.train.batch_size,
    )
    return sum(cost.teachers.values()), cost.step


def _table(rows: list[tuple[str, dict[str, Any], tuple[int, int]]]) -> Table:
    table = Table(
        title="Handwritten digits: accuracy, and what one training image costs",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for column in ("top-1", "teacher", "whole step", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, summary, (teacher, step) in rows:
        shown = format_count(teacher) if teacher else "-"
        table.add_row(
            name,
            f"{summary['scores']['top1']:.1%}",
            shown,
            format_count(step),
            f"{summary['seconds']:.0f} s",
        )
    return table


def _png(image: Image.Image) -> bytes:
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


@torch.no_grad()
def draw_choices(
    student_folder: Path, images: Path, count: int = 10, scale: int = 12
) -> Image.Image:
    """One row of validation images, and under it, for every keep rate, the patches the student
    gives the teacher.
    """
    model = weights.create_model(str(student_folder)).eval()
    spec = input_spec_of(model)
    source = open_source(str(images), "val")
    by_class = {int(label): i for i, label in reversed(list(enumerate(source.labels)))}
    batch = torch.cat([b.images for b in EvalLoader(source, spec, batch_size=256)])[
        [by_class[c] for c in sorted(by_class)][:count]
    ]
    output = run_vit(model, batch, Needs(attention=frozenset({-1})))
    rows, columns = output.grid
    patch = spec.image_size[0] // rows
    (attention,) = output.attention.values()
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    pixels = ((batch * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    size, gap, margin = spec.image_size[0] * scale, 8, 190
    rates = (1.0, *KEEP_RATES)
    sheet = Image.new(
        "RGB", (margin + len(pixels) * (size + gap), len(rates) * (size + gap) + gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for r, rate in enumerate(rates):
        top = gap + r * (size + gap)
        kept = rows * columns if rate == 1.0 else num_kept_patches(rows * columns, rate)
        label = "the student sees" if rate == 1.0 else f"teacher at {rate * 100:g} %"
        draw.text(
            (8, top + size / 2 - 18),
            f"{label}\n{kept} of {rows * columns} patches",
            fill="black",
            font_size=16,
        )
        chosen = select_patches(attention, kept, output.num_prefix_tokens).tolist()
        for i, image in enumerate(pixels):
            left = margin + i * (size + gap)
            sheet.paste(
                Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST), (left, top)
            )
            for index in set(range(rows * columns)) - set(chosen[i]):
                y, x = divmod(index, columns)
                box = (left + x * patch * scale, top + y * patch * scale)
                draw.rectangle(
                    (*box, box[0] + patch * scale - 1, box[1] + patch * scale - 1),
                    fill="#d8dde6",
                    outline="#c4cbd8",
                )
    return sheet
