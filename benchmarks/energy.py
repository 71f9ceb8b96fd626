"""Whether the energy of a CNN student's features chooses a ViT teacher's patches well.

    python benchmarks/energy.py photos --classes 10 --seeds 2

A small ViT is trained on some classes of small images; then a small ConvNeXt learns from it while
the teacher sees only some patches: those of the highest energy (`saliency="energy"`), random ones,
those the teacher itself attends to, or all of them. For each seed, initial weights, batches and
shifts are equal. The table gives top-1 on validation images, its mean over seeds, and the
teacher's own top-1 on the patches chosen for it. One thread.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdistill import Distiller
from vitdistill.data.augment import InputSpec
from vitdistill.data.batch import Batch
from vitdistill.data.sources.base import Split
from vitdistill.data.sources.open import open_source
from vitdistill.methods.base import TokenSelector
from vitdistill.methods.maskedkd import MaskedKD, RandomPatches, TeacherGuided
from vitdistill.vit import Needs, run_vit

SIDE, BATCH = 32, 64
TEACHER = {"img_size": SIDE, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
STUDENT = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}
STAGE = 1
"""The student's, of 4 x 4 places on 32 pixels; the stages after it have 2 x 2 and 1."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", help="images that vitdistill opens, of 32 pixels")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of the student")
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=2000, help="of training")
    parser.add_argument("--keep-rates", type=float, nargs="+", default=[0.5, 0.25])
    args = parser.parse_args()
    torch.set_num_threads(1)
    train = load(args.photos, "train", args.classes, args.images)
    val = load(args.photos, "val", args.classes, None)
    teacher = train_teacher(train, args.teacher_epochs, args.classes)
    print(f"teacher: top-1 {accuracy(teacher, val):.1%}", flush=True)
    print("| patches | student, top-1 by seed | mean | ahead of random | teacher on them |")
    print("|---|---|---:|---:|---:|", flush=True)
    report("all patches", [distil(teacher, None, train, val, args, s) for s in range(args.seeds)])
    for rate in args.keep_rates:
        choices: dict[str, TokenSelector] = {
            "random": RandomPatches(keep_rate=rate),
            "energy": MaskedKD(saliency="energy", block=STAGE, keep_rate=rate),
            "teacher-guided": TeacherGuided(keep_rate=rate),
        }
        of_random: list[Found] = []
        for name, selector in choices.items():
            found = [distil(teacher, selector, train, val, args, s) for s in range(args.seeds)]
            of_random = of_random or found
            report(f"{name}, {rate:.0%}", found, of_random)
    print(f"\n`{' '.join(['python', 'benchmarks/energy.py', *sys.argv[1:]])}`")


Found = tuple[float, float]
"""Top-1 of a student, and of the teacher on the patches that it saw."""


def report(name: str, found: list[Found], of_random: list[Found] | None = None) -> None:
    """Print a row; a difference is the mean over seeds of pairs, and its standard error."""
    students, teachers = zip(*found, strict=True)
    each = ", ".join(f"{top1:.1%}" for top1 in students)
    ahead = ""
    if of_random is not None and of_random is not found:
        pairs = [
            100 * (ours - theirs) for (ours, _), (theirs, _) in zip(found, of_random, strict=True)
        ]
        error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
        ahead = f"{statistics.mean(pairs):+.1f} ± {error:.1f}"
    means = (statistics.mean(students), statistics.mean(teachers))
    print(f"| {name} | {each} | {means[0]:.1%} | {ahead} | {means[1]:.1%} |", flush=True)


def load(photos: str, split: Split, num_classes: int, count: int | None) -> tuple[Tensor, Tensor]:
    """Return ``count`` images of the first classes (None: all), normalised, and their labels."""
    source = open_source(photos, split)
    numbers = np.flatnonzero(np.asarray(source.labels) < num_classes)
    numbers = np.random.default_rng(0).permutation(numbers)[:count]
    pixels = np.stack([np.asarray(source.load(int(i)).convert("RGB")) for i in numbers])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.from_numpy(np.asarray(source.labels)[numbers]).long()


def batches(data: tuple[Tensor, Tensor], epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield whole batches, shifted by up to 4 pixels and mirrored at random."""
    images, labels = data
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=draw).split(BATCH)[
            : len(labels) // BATCH
        ]:
            y, x, mirrored = torch.randint(0, 18, (3,), generator=draw).tolist()
            batch = F.pad(images[rows], (4, 4, 4, 4))[..., y % 9 :, x % 9 :][..., :SIDE, :SIDE]
            yield batch.flip(3) if mirrored % 2 else batch, labels[rows]


def fit(
    module: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    epochs: int,
    seed: int,
) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3, weight_decay=0.05)
    total = epochs * (len(data[1]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
    module.train()
    for images, labels in batches(data, epochs, seed):
        optimizer.zero_grad()
        loss_of(images, labels).backward()
        optimizer.step()
        schedule.step()


def train_teacher(data: tuple[Tensor, Tensor], epochs: int, num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **TEACHER)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    fit(model, lambda images, labels: loss(model(images), labels), data, epochs, 0)
    return model.eval()


def distil(
    teacher: nn.Module,
    selector: TokenSelector | None,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    seed: int,
) -> Found:
    """Return the top-1 of the student, and of the teacher on the patches it saw at the end."""
    torch.manual_seed(seed)
    student = timm.create_model("convnext_atto", num_classes=args.classes, **STUDENT)
    spec = InputSpec((SIDE, SIDE), (0.5,) * 3, (0.5,) * 3)
    distiller = Distiller(student, teacher, ["ce", "kd"], selector, images_spec=spec)
    step = lambda images, labels: distiller(images, labels)["loss"]  # noqa: E731
    fit(distiller, step, train, args.epochs, seed)
    return accuracy(student, val), on_chosen(distiller.eval(), teacher, val)


@torch.no_grad()
def on_chosen(distiller: Distiller, teacher: nn.Module, val: tuple[Tensor, Tensor]) -> float:
    """Return the teacher's top-1 on the patches that are chosen for it."""
    plan, right = distiller.plan, 0
    frozen = distiller._teachers["teacher"]
    for images, labels in zip(*(part.split(250) for part in val), strict=True):
        batch = Batch(images, labels, *(torch.arange(len(labels)),) * 2, view=0)
        output = run_vit(distiller.student, images, plan.student_needs)
        keep = distiller.distillation.choose("teacher", frozen, batch, output)
        answer = run_vit(teacher, images, Needs(logits=True), keep).logits
        right += int((answer.argmax(1) == labels).sum())  # type: ignore[union-attr]
    return right / len(val[1])


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    images, labels = data
    answers = [model.eval()(part).argmax(1) for part in images.split(250)]
    return float((torch.cat(answers) == labels).float().mean())


if __name__ == "__main__":
    main()
