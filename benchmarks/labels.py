"""What stored labels cost: random reads, their share of a training step, and a step from labels
against one with a live teacher.

    python benchmarks/labels.py            # about three minutes
    python benchmarks/labels.py --write    # keep the tables in benchmarks/results/

The stores hold random answers in a temporary folder, and are in the system's page cache when they
are read. Everything takes turns in one process, in another order every round, and is compared
within a round. Reads are timed inside a step from labels, one batch a step, so that the caches hold
the data of the step before. The clock is the CPU time of this process. Random weights and images,
float32, one thread; no step loads or augments images.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import step_cost
import torch

from vitdistill.data.augment import AUGMENTS, Augment
from vitdistill.data.batch import Batch
from vitdistill.data.model_input import input_spec_of
from vitdistill.data.order import Samples
from vitdistill.data.views.checksums import view_checksums
from vitdistill.distill.plan import make_plan
from vitdistill.distill.step import Distillation
from vitdistill.distill.teacher import Teacher
from vitdistill.errors import ConfigError
from vitdistill.explain.cost import cost_of
from vitdistill.keyed import I64
from vitdistill.labels.encoding import LogitEncoding
from vitdistill.labels.layout import Layout
from vitdistill.labels.manifest import Manifest
from vitdistill.labels.reader import LabelReader
from vitdistill.labels.store import LabelStore
from vitdistill.methods.base import Objective
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.vit.families import describe_network

IMAGENET, PART_SIZE = 1_281_167, 16_384
BATCH_SIZE, BATCHES = 1024, 40  # a batch of random reads, and how many batches are timed together
RECORDS_A_SECOND, RECORD_BYTES, SHARE = 500_000, 44 + 4, 0.01  # targets
ANSWERS = 4096  # different ones in a store


@dataclass(frozen=True)
class Setting:
    """A student and a teacher, and how its answers are stored; ``share``: what reading may be of
    the step at most.
    """

    pair: step_cost.Pair
    samples: int
    layout: Layout
    augment: Augment
    objectives: dict[str, Objective]
    share: float | None = None


_SMALL = {"img_size": 32, "patch_size": 4, "depth": 6, "num_heads": 3}
SETTINGS = {
    "small": Setting(
        pair=step_cost.Pair(
            title=(
                "the small_images student (ViT of width 96, depth 6) from width 192, depth 6, patch"
                " 4 on 32 x 32"
            ),
            student=("vit_tiny_patch16_224", {**_SMALL, "embed_dim": 96}),
            teacher=("vit_tiny_patch16_224", {**_SMALL, "embed_dim": 192}),
            image_size=32,
            num_classes=20,
            batch_size=128,
        ),
        samples=50_000,
        layout=Layout(logits=LogitEncoding(kind="float16", num_classes=20)),
        augment=AUGMENTS["small"],
        objectives={
            "ce": CrossEntropy(weight=0.5, smoothing=0.1),
            "kd": SoftKD(weight=0.5, temperature=2.0),
        },
        share=SHARE,
    ),
    "deit": Setting(
        pair=step_cost.PAIRS["deit"],
        samples=IMAGENET,
        layout=Layout(
            logits=LogitEncoding(kind="topk", num_classes=1000, k=10, temperatures=(1.0,))
        ),
        augment=AUGMENTS["deit"],
        objectives={"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)},
    ),
}


def pixels_of(ids: I64) -> npt.NDArray[np.uint32]:
    """The checksums that the records of these samples hold."""
    return (ids * 2654435761 % 2**32).astype(np.uint32)


def make_store(folder: Path, setting: Setting) -> LabelStore:
    """A whole store of one view: in every record one of a few thousand random answers, and the
    sample's own checksum.
    """
    layout, random = setting.layout, np.random.default_rng(0)
    torch.manual_seed(0)
    logits = 3 * torch.randn(ANSWERS, setting.pair.num_classes)
    answers = layout.encode(logits, {}, None, np.zeros(ANSWERS, np.uint32))
    manifest = Manifest(
        identity={}, layout=layout, num_samples=setting.samples, num_views=1, part_size=PART_SIZE
    )
    store = LabelStore.create(folder, manifest)
    for part in range(store.num_parts):
        ids = np.arange(*store.manifest.part_range(part))
        records = answers[random.integers(ANSWERS, size=len(ids))]
        records["pixels"] = pixels_of(ids)
        store.seal(0, part, records)
    return store


def random_batches(samples: int, size: int) -> Iterator[I64]:
    """Sample ids in shuffled order, again and again."""
    order = np.random.default_rng(1).permutation(samples)
    for start in itertools.cycle(range(0, samples - size + 1, size)):
        yield order[start : start + size]


def spread(values: list[float], shown: Callable[[float], str]) -> tuple[str, str]:
    """Two cells: the median and the quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"**{shown(statistics.median(values))}**", f"{shown(low)} .. {shown(high)}"


def milliseconds(seconds: list[float]) -> str:
    """A cell: the median."""
    median = 1e3 * statistics.median(seconds)
    return f"{median:,.0f}" if median >= 100 else f"{median:.3f}"


def verdict(target: str, met: bool) -> str:
    """A cell: the target, and whether it is met."""
    return f"{target} {'met' if met else 'MISSED'}"


# -- random reads ---------------------------------------------------------------------------------


def reads(store: LabelStore, rounds: int) -> str:
    """Records a second of random batches, as a Markdown table and two sentences."""
    view = np.zeros(BATCH_SIZE, dtype=np.int64)
    batches = random_batches(store.manifest.num_samples, BATCH_SIZE)

    def read() -> None:
        for ids in itertools.islice(batches, BATCHES):
            store.read(view, ids)

    def read_logits() -> None:
        for ids in itertools.islice(batches, BATCHES):
            records, _ = store.read(view, ids)
            store.layout.targets(records).logits(1.0)

    def read_anew() -> None:
        LabelStore.open(store.path).read(view, next(batches))

    forms = [
        step_cost.Step("`store.read`", read, 0),
        step_cost.Step("`store.read`, then `layout.targets(...).logits(1.0)`", read_logits, 0),
        step_cost.Step("a batch of a newly opened store", read_anew, 0),
    ]
    step_cost.measure(forms, rounds)
    lines = [
        "| batch by batch | records / s | quartiles | ms / batch | target |",
        "|---|---:|---:|---:|---:|",
    ]
    for form in forms[:2]:
        rates = [BATCHES * BATCH_SIZE / seconds for seconds in form.seconds]
        target = verdict(f"> {RECORDS_A_SECOND:,}", statistics.median(rates) > RECORDS_A_SECOND)
        cells = (
            form.name,
            *spread(rates, lambda x: f"{x:,.0f}"),
            f"{1e3 * BATCH_SIZE / statistics.median(rates):.2f}",
            target,
        )
        lines.append(f"| {' | '.join(cells)} |")
    first, quartiles = spread([1e3 * seconds for seconds in forms[2].seconds], lambda x: f"{x:.0f}")
    lines += [
        "",
        (
            f"The first batch of a newly opened store maps its {store.num_parts} parts and compares"
            f" almost every block's checksum: {first} ms ({quartiles}), once a view."
        ),
    ]
    item, status = store.layout.record_bytes, store.status()
    size = verdict(f"at most {RECORD_BYTES}, of which 4 are the checksum:", item <= RECORD_BYTES)
    lines += [
        "",
        (
            f"A record has **{item} bytes** ({size}); files, footers included,"
            f" {status.bytes / status.records:.3f} a record."
        ),
    ]
    return "\n".join(lines)


# -- training steps -------------------------------------------------------------------------------


@dataclass
class FromLabels:
    """A training step from labels: its records, checksums of its views if ``checked``, the
    student's step.

    ``reading``, ``checksums`` and ``step`` are the CPU seconds of each, one entry a run.
    """

    setting: Setting
    reader: LabelReader
    batch: Batch
    student_step: Callable[[], None]
    checked: bool
    reading: list[float] = field(default_factory=list)
    checksums: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        pair = self.setting.pair
        self._ids = random_batches(self.setting.samples, pair.batch_size)
        self._pixels = torch.randint(
            256, (pair.batch_size, 3, pair.image_size, pair.image_size), dtype=torch.uint8
        )

    def __call__(self) -> None:
        ids = next(self._ids)
        views, stored = np.zeros_like(ids), pixels_of(ids)
        times = [time.process_time()]
        # Before the checksums, which the loader makes first: they would warm the caches for one of
        # the two readings and not the other.
        self.batch.targets["teacher"] = self.reader(views, ids, stored if self.checked else None)
        times.append(time.process_time())
        if self.checked:
            # Of random images, so they are not those of the records: what was compared are the
            # right ones.
            view_checksums(self._pixels, self.setting.augment, Samples(ids, views))
        times.append(time.process_time())
        self.student_step()
        times.append(time.process_time())
        for seconds, (begun, ended) in zip(
            (self.reading, self.checksums, self.step), itertools.pairwise(times), strict=True
        ):
            seconds.append(ended - begun)


def blank_batch(pair: step_cost.Pair) -> Batch:
    """A batch of random images, the same at every call."""
    torch.manual_seed(0)
    return Batch(
        images=torch.randn(pair.batch_size, 3, pair.image_size, pair.image_size),
        labels=torch.randint(pair.num_classes, (pair.batch_size,)),
        ids=torch.arange(pair.batch_size),
        views=torch.zeros(pair.batch_size, dtype=torch.int64),
        view=0,
    )


def build_steps(
    setting: Setting, store: LabelStore
) -> tuple[list[step_cost.Step], dict[bool, FromLabels]]:
    """The step with the live teacher and those from labels; and those from labels again, by whether
    they check.
    """
    pair, size = setting.pair, (setting.pair.image_size, setting.pair.image_size)
    model = step_cost.build_model(pair, "teacher").eval().requires_grad_(False)
    spec = input_spec_of(model)
    network = describe_network(model, "teacher", pair.teacher[0], size)
    teacher = Teacher(model, network, spec, spec)

    def ours(stored: bool) -> tuple[Callable[[], None], int, Batch]:
        student = step_cost.build_model(pair, "student")
        description = describe_network(student, "student", pair.student[0], size)
        labels = {"teacher": setting.layout} if stored else {}
        plan = make_plan(description, {"teacher": network}, setting.objectives, labels=labels)
        batch = blank_batch(pair)
        run = step_cost.our_step(
            Distillation(student, plan), {} if stored else {"teacher": teacher}, batch
        )
        return run, cost_of(plan, student, {"teacher": model}, pair.batch_size).step, batch

    live, live_flops, _ = ours(stored=False)
    steps = [step_cost.Step("with the live teacher", live, live_flops)]
    from_labels = {}
    for checked in (True, False):
        run, flops, batch = ours(stored=True)
        from_labels[checked] = FromLabels(
            setting, LabelReader("teacher", store), batch, run, checked
        )
        name = "from labels, the views checked" if checked else "from labels, without checksums"
        steps.append(step_cost.Step(name, from_labels[checked], flops))
    return steps, from_labels


def shares(setting: Setting, from_labels: dict[bool, FromLabels], rounds: int) -> Iterator[str]:
    """Markdown rows: what labels add to a step of the student, and their share of it."""
    yield "| a batch | ms | share of the student's step | quartiles | target |"
    yield "|---|---:|---:|---:|---:|"
    checked, unchecked = from_labels[True], from_labels[False]
    yield (
        f"| the student's step with these targets | {milliseconds(unchecked.step[-rounds:])} |  | "
        " |  |"
    )
    for name, seconds, step, limit in (
        ("reading, without checksums", unchecked.reading, unchecked.step, setting.share),
        ("reading, checksums compared", checked.reading, checked.step, setting.share),
        ("making the checksums of the views", checked.checksums, checked.step, None),
    ):
        # The first runs were the warm-up.
        mine, its = seconds[-rounds:], step[-rounds:]
        parts = [a / b for a, b in zip(mine, its, strict=True)]
        target = (
            "" if limit is None else verdict(f"< {limit:.0%}", statistics.median(parts) < limit)
        )
        cells = (name, milliseconds(mine), *spread(parts, lambda x: f"{x:.3%}"), target)
        yield f"| {' | '.join(cells)} |"


def main(rounds: int = 9, write: bool = False) -> None:
    """Measure what stored labels cost.

    Args:
        rounds: of everything, at least 7.
        write: also write the tables to benchmarks/results/labels_<cpu>_<instructions>_<date>.md.
    """
    if rounds < 7:
        raise ConfigError(f"--rounds is {rounds}: medians need at least 7")
    torch.set_num_threads(1)
    note = (
        f"{rounds} rounds, float32, one thread, CPU time; medians over rounds, ratios and shares"
        " within a round. The files are in the page cache."
    )
    parts = ["# What stored labels cost", step_cost.describe_machine("labels.py"), note]
    print("\n\n".join(parts) + "\n", flush=True)

    def say(*lines: str) -> None:
        parts.extend(lines)
        print("\n\n".join(lines) + "\n", flush=True)

    with tempfile.TemporaryDirectory(prefix="labels-") as folder:
        stores = {
            name: make_store(Path(folder) / name, setting) for name, setting in SETTINGS.items()
        }
        what = (
            f"Batches of {BATCH_SIZE} of a store of {IMAGENET:,} samples in one view, {PART_SIZE} a"
            " part; the 10 largest of 1000 logits."
        )
        say("## Random reads", what, reads(stores["deit"], rounds))
        for name, setting in SETTINGS.items():
            pair = setting.pair
            steps, from_labels = build_steps(setting, stores[name])
            step_cost.measure(steps, rounds)
            say(
                f"## {name}: {pair.title}",
                f"Batch {pair.batch_size}, {setting.samples:,} samples,"
                f" {setting.layout.record_bytes} bytes a record.",
                "\n".join(shares(setting, from_labels, rounds)),
                "Both readings come right after a step, with cold caches.",
                "Whole steps, reading and checksums included; the floor is the step with the live"
                " teacher.",
                "\n".join(step_cost.table(steps, pair.batch_size)),
            )
    if write:
        step_cost.keep("labels", parts)


if __name__ == "__main__":
    step_cost.start(main)
