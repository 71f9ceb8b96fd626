"""How often the proof of a teacher is wrong: false passes and false alarms over many teachers.

    python benchmarks/teacher_proof.py PHOTOS WEIGHTS            # about ten minutes
    python benchmarks/teacher_proof.py PHOTOS WEIGHTS --write

PHOTOS is an image folder of at least 100 classes (train/ and val/), such as CIFAR-100; WEIGHTS are
those of a timm network trained on something else. Teachers are linear classifiers on its features,
trained on one to thirty images a class, the weak ones with noise on the features. Each is proved as
it is, with its classes in other orders, and with a wrong input. Untrained networks are proved on
the same images.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import step_cost
import torch
import torch.nn.functional as F
from timm.models import create_model
from torch import Tensor, nn

from vitdistill.data.augment import InputSpec
from vitdistill.data.batch import Batch
from vitdistill.data.loader import EvalLoader
from vitdistill.data.sources.open import open_source
from vitdistill.distill.teacher import Teacher
from vitdistill.errors import ConfigError
from vitdistill.runs.orders import natural_order
from vitdistill.runs.preflight import NUM_IMAGES, prove_teacher
from vitdistill.vit.needs import Needs
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput
from vitdistill.weights import create as weights
from vitdistill.world import ALONE

CLASSES = (10, 12, 100)
HALF = ((0.5,) * 3, (0.5,) * 3)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIDE, SHOWN = 64, 32  # pixels that the trained network sees, and those of the student
STRENGTHS = (  # images a class, steps, noise: from barely above chance to as good as it gets
    (1, 20, 2.0),
    (2, 20, 0.0),
    (30, 10, 8.0),
    (30, 10, 4.0),
    (5, 100, 2.0),
    (30, 100, 4.0),
    (30, 20, 0.0),
    (10, 200, 0.0),
    (30, 300, 0.0),
    (0, 500, 0.0),  # trained on the images it is proved on: perfect
)
VIT = {"img_size": SHOWN, "patch_size": 4, "depth": 4}
UNTRAINED = {
    "vit_tiny_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": {"img_size": SHOWN, "window_size": 4, "patch_size": 2}
    | {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 48},
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "regnetx_002": {},
    "edgenext_xx_small": {},
}


@dataclass(frozen=True)
class Seen:
    """Images as the student sees them, features of the trained network, and labels."""

    images: Tensor
    features: Tensor
    labels: Tensor

    def of(self, classes: Sequence[int], most: int, seed: int) -> "Seen":
        """At most so many images of some classes, numbered in their order."""
        number = torch.full((int(self.labels.max()) + 1,), -1)
        number[list(classes)] = torch.arange(len(classes))
        labels = number[self.labels]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        chosen = order[labels[order] >= 0][:most]
        return Seen(self.images[chosen], self.features[chosen], labels[chosen])


def look(folder: str, split: str, count: int, teacher: Teacher) -> Seen:
    """Show images to the student and the trained network."""
    spec, rows = InputSpec((SHOWN, SHOWN), *HALF, crop_pct=1.0), []
    source = open_source(folder, split)
    for batch in EvalLoader(source, spec, batch_size=250, limit=count):
        features = features_of(teacher.model, teacher.prepare(batch.images))
        rows.append((batch.images, features, batch.labels))
    return Seen(*map(torch.cat, zip(*rows, strict=True)))


@torch.no_grad()
def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """What the classifier of a timm model reads."""
    found: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    return found


class Head(nn.Module):
    """A linear classifier on standardised features, with noise on them."""

    def __init__(self, seen: Seen, num_classes: int, steps: int, noise: float, seed: int) -> None:
        super().__init__()
        self.mean, self.std, self.noise = seen.features.mean(0), seen.features.std(0) + 1e-3, noise
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.linear = nn.Linear(seen.features.shape[1], num_classes)
        optimizer = torch.optim.AdamW(self.linear.parameters(), 1e-2, weight_decay=0.05)
        for _ in range(steps):
            chosen = torch.randint(len(seen.labels), (64,), generator=self.generator)
            loss = F.cross_entropy(self(seen.features[chosen]), seen.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def forward(self, features: Tensor) -> Tensor:
        noise = self.noise * torch.randn(features.shape, generator=self.generator)
        found: Tensor = self.linear((features - self.mean) / self.std + noise)
        return found


def prove(logits: Tensor, labels: Tensor, classes: Sequence[str], model: nn.Module) -> str:
    """The verdict on a teacher that gives these answers: how it is refused or doubted."""
    spec = InputSpec((1, logits.shape[1]), *HALF)
    teacher = Teacher(model, Network("teacher", "big", num_classes=logits.shape[1]), spec, spec)
    teacher.run = replay
    return verdict(teacher, logits[:, None, None].expand(-1, 3, 1, -1), labels, classes)


def replay(model: nn.Module, images: Tensor, needs: Needs, keep: Tensor | None) -> ViTOutput:
    """Answer with the numbers that stand for images; there are none of another size."""
    assert images.shape[2] == 1
    return ViTOutput(logits=images[:, 0, 0])


def verdict(teacher: Teacher, images: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
    """Refused, doubted or passed."""
    parts = torch.arange(len(labels)).split(128)
    batches = (Batch(images[i], labels[i], i, torch.zeros_like(i), 0) for i in parts)
    try:
        return "doubted" if prove_teacher(teacher, batches, classes, ALONE).doubts else "passed"
    except ConfigError:
        return "refused"


def orders(num_classes: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Other orders of the classes, by name; each moves what it names in a cycle."""
    some = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    counts = {"two exchanged": 2, "three": 3, "half": num_classes // 2, "all": num_classes}
    for name, count in counts.items():
        order = torch.arange(num_classes)
        order[some[:count]] = some[:count].roll(1)
        yield name, order
    by_number = torch.tensor(natural_order(names(num_classes))).argsort()
    if num_classes > 10:
        yield "by number", by_number


def names(num_classes: int) -> list[str]:
    """Folders called by numbers, as they are sorted."""
    return sorted(map(str, range(num_classes)))


def trained(train: Seen, val: Seen, seeds: int) -> Iterator[tuple[str, str]]:
    """Yield kind and verdict of honest teachers, and of the same ones in other orders."""
    for num_classes in CLASSES:
        for strength, seed in ((s, i) for s in STRENGTHS for i in range(seeds)):
            count, steps, noise = strength
            chosen = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
            classes = chosen[:num_classes].tolist()
            proof = val.of(classes, NUM_IMAGES, seed)
            seen = train.of(classes, 30 * num_classes, seed)
            if count:
                few = [torch.where(seen.labels == c)[0][:count] for c in range(num_classes)]
                rows = torch.cat(few)
                seen = Seen(seen.images[rows], seen.features[rows], seen.labels[rows])
            head = Head(seen if count else proof, num_classes, steps, noise, seed)
            logits = head(proof.features).detach()
            accuracy = float((logits.argmax(1) == proof.labels).double().mean())
            if accuracy < 1 / num_classes + 0.1:
                continue
            few_shot = " (1 or 2 images a class)" if 0 < count < 3 else ""
            found = prove(logits, proof.labels, names(num_classes), nn.Module())
            yield f"honest{few_shot}, {num_classes} classes", found
            for name, order in orders(num_classes, seed):
                found = prove(logits[:, order], proof.labels, names(num_classes), nn.Module())
                yield f"{name}{few_shot}, {num_classes} classes", found


def untrained(val: Seen, seeds: int) -> Iterator[tuple[str, str]]:
    """Yield kind and verdict of untrained networks, with their weights and by answers alone."""
    for architecture, args in UNTRAINED.items():
        for num_classes, seed in ((c, i) for c in CLASSES for i in range(seeds)):
            torch.manual_seed(seed)
            model = create_model(architecture, num_classes=num_classes, **args).eval()
            chosen = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
            proof = val.of(chosen[:num_classes].tolist(), NUM_IMAGES, seed)
            with torch.no_grad():
                logits = torch.cat([model(images) for images in proof.images.split(128)])
            named = names(num_classes)
            yield f"untrained, {num_classes} classes", prove(logits, proof.labels, named, model)
            found = prove(logits, proof.labels, named, nn.Module())
            yield f"untrained, {num_classes} classes, judged by its answers alone", found


def wrong_inputs(
    train: Seen, val: Seen, network: nn.Module, seeds: int
) -> Iterator[tuple[str, str]]:
    """Yield kind and verdict of a teacher whose input is as it was trained, or is not."""
    told = {
        "its own input": (SIDE, HALF),
        "mean and std of ImageNet": (SIDE, IMAGENET),
        "no mean and std": (SIDE, ((0.0,) * 3, (1.0,) * 3)),
        "half its size": (SIDE // 2, HALF),
        "twice its size": (2 * SIDE, HALF),
    }
    given = InputSpec((SHOWN, SHOWN), *HALF)
    for seed in range(seeds):
        classes = torch.randperm(100, generator=torch.Generator().manual_seed(seed))[:10].tolist()
        head = Head(train.of(classes, 300, seed), 10, 200, 0.0, seed)
        proof = val.of(classes, NUM_IMAGES, seed)
        own = 0.0
        for name, (side, norm) in told.items():
            about = Network("teacher", "network", num_classes=10)
            teacher = Teacher(network, about, InputSpec((side, side), *norm), given)
            teacher.run = lambda model, images, needs, keep, head=head: ViTOutput(
                logits=head(features_of(model, images))
            )
            answers = [teacher(x, Needs(logits=True)).logits for x in proof.images.split(128)]
            right = float((torch.cat(answers).argmax(1) == proof.labels).double().mean())
            own = own or right  # the first input is its own
            cost = (
                ", no worse by 3 points" if name != next(iter(told)) and right > own - 0.03 else ""
            )
            yield (
                f"{name}{cost}, 10 classes",
                verdict(teacher, proof.images, proof.labels, names(10)),
            )


def table(verdicts: dict[str, Counter[str]]) -> str:
    """A Markdown table of verdicts by kind of teacher."""
    lines = [
        "| teacher | how many | refused | doubted | passed in silence |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, counts in verdicts.items():
        each = " | ".join(str(counts[found]) for found in ("refused", "doubted", "passed"))
        lines.append(f"| {kind} | {counts.total()} | {each} |")
    return "\n".join(lines)


def main() -> None:
    """Prove all these teachers, and print what was said of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", help="image folder of 100 classes or more")
    parser.add_argument("weights", help="weights of the network whose features are used")
    parser.add_argument("--architecture", default="tf_efficientnet_lite0")
    parser.add_argument("--seeds", type=int, default=4, help="of each kind of teacher")
    every = ("trained", "untrained", "inputs")
    parser.add_argument("--parts", nargs="+", choices=every, default=every, help="only some")
    parser.add_argument("--write", action="store_true", help="keep the table in results/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    network = weights.create_model(args.architecture, checkpoint=args.weights).eval()
    student, spec = InputSpec((SHOWN, SHOWN), *HALF), InputSpec((SIDE, SIDE), *HALF)
    teacher = Teacher(network, Network("teacher", args.architecture), spec, student)
    train = look(args.photos, "train", 3000, teacher)
    val = look(args.photos, "val", 5200, teacher)
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    kinds = {
        "trained": trained(train, val, args.seeds),
        "untrained": untrained(val, args.seeds),
        "inputs": wrong_inputs(train, val, network, args.seeds),
    }
    for part in args.parts:
        for kind, said in kinds[part]:
            verdicts[kind][said] += 1
            print(f"{kind}: {said}", file=sys.stderr, flush=True)
    parts = ["# Verdicts of the teacher's proof", step_cost.describe_machine("teacher_proof.py")]
    parts.append(table(verdicts))
    print("\n\n".join(parts))
    if args.write:
        step_cost.keep("teacher_proof", parts)


if __name__ == "__main__":
    main()
