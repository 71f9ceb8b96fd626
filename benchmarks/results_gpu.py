"""README's table of what methods teach, on all images of a folder, within a budget of seconds.

    python benchmarks/results_gpu.py cifar100 --budget 400 --write
    python benchmarks/results_gpu.py cifar100 --budget 400 --write --output results_runs  # goes on

A study (`vitdistill.study`): the teacher first, then one seed of every row in order of worth, then
the next seed. What is known is printed and written after every run. A run that would not end in
time is not begun; one that takes longer than it was thought is stopped, saved, and goes on with the
same command.
"""

import os
import re
import signal
import statistics
import threading
import time
from pathlib import Path

from gpu import Device
from rich.console import Console
from step_cost import RESULTS, describe_machine, start

from vitdistill.errors import ConfigError, Preempted
from vitdistill.runs.folder import SUMMED_UP
from vitdistill.runs.identity import SUMMARY, read_record
from vitdistill.runs.train import train
from vitdistill.storage.atomic import write_atomic
from vitdistill.study.plan import Job, Row, Study, in_row
from vitdistill.study.run import Work
from vitdistill.world import choose_device

ROWS = {  # in order of worth, by the ends of recipes' names
    "kd": "plain distillation",
    "maskedkd": "MaskedKD, half of the patches",
    "vitkd_nkd": "ViTKD + NKD",
    "nkd": "NKD",
    "standardized_kd": "plain distillation, standardized logits",
    "masked_vitkd_nkd": "MaskedKD, half, + ViTKD + NKD",
    "vitkd": "ViTKD",
}


def study_of(
    images: str, epochs: int, teacher_epochs: int, seeds: tuple[int, ...], sizes: dict[str, object]
) -> Study:
    """The teacher of the small-image recipes, its students, and the student alone."""
    return Study(
        name="results",
        shared={
            "teacher": Row(recipe="small_images_teacher", set={"train.epochs": teacher_epochs})
        },
        rows={name: Row(recipe=f"small_images_{name}") for name in ROWS},
        set={"data.dir": images, "train.epochs": epochs, "train.log_to": [], **sizes},
        seeds=seeds,
    )


def table(work: Work) -> str:
    """Markdown rows of what is finished."""
    lines = ["| student | top-1 | seeds | teacher's FLOPs an image | images/s of a run |"]
    lines.append("|---|---:|---:|---:|---:|")
    found: dict[str, list[Job]] = {}
    for job in work.jobs:
        if work.seconds(job) is not None:
            found.setdefault(job.row, []).append(job)
    for row, jobs in found.items():
        summaries = [
            read_record(work.output / job.folder / SUMMARY, SUMMED_UP) or {} for job in jobs
        ]
        scores = [100 * summary["scores"]["top1"] for summary in summaries]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        seconds = statistics.median(summary["seconds"] for summary in summaries)
        ((ahead, _),) = work.ahead[row]
        images = ahead.num_images * ahead.recipe.train.epochs / seconds
        plain = sum(ahead.cost.teachers_plain.values())
        share = f"{sum(ahead.cost.teachers.values()) / plain:.0%}" if plain else ""
        name = ROWS.get(row, row)
        top1 = f"{statistics.mean(scores):.1f}{spread} %"
        lines.append(f"| {name} | {top1} | {len(scores)} | {share} | {images:,.0f} |")
    return "\n".join(lines)


def main(
    images: str,
    /,
    budget: float = 400,
    output: str = "results_runs",
    device: str = "auto",
    epochs: int = 30,
    teacher_epochs: int = 30,
    batch_size: int = 512,
    lr: float = 2e-3,
    seeds: tuple[int, ...] = (0, 1, 2),
    write: bool = False,
    tiny: bool = False,
) -> None:
    """Train a teacher and its students on a folder of small images, for so many seconds.

    Args:
        images: a folder, or whatever data.dir takes.
        budget: seconds, for what is not done yet.
        output: the folder of the runs; the same one goes on.
        device: auto, cpu, cuda or cuda:N.
        epochs: of each student.
        teacher_epochs: of the teacher.
        batch_size: images a step.
        lr: the peak learning rate.
        seeds: of each row.
        write: keep the table in benchmarks/results/results_<device>_<date>.md, after every run.
        tiny: networks of two narrow blocks: whether all of it runs, anywhere.
    """
    if budget <= 0:
        raise ConfigError(f"--budget is {budget}: it has to be above 0")
    until, where = time.monotonic() + budget, Device(choose_device(device))
    sizes: dict[str, object] = {"train.batch_size": batch_size, "optim.lr": lr}
    sizes |= {"train.eval_batch_size": 1024, "optim.warmup_epochs": min(2.0, epochs / 4)}
    if tiny:
        sizes |= {"student.model_args.embed_dim": 24, "student.model_args.depth": 2}
    work = Work(study_of(images, epochs, teacher_epochs, seeds, sizes), Path(output))
    head = ["# What methods teach", f"{describe_machine('results_gpu.py')}\n- device: {where.name}"]
    slug = re.sub(r"[^a-z0-9]+", "-", where.name.lower())
    path = RESULTS / f"results_{slug}_{time.strftime('%Y-%m-%d')}.md"

    def known(last: str) -> None:
        parts = [*head, table(work), last]
        print("\n\n".join(parts[2:]), flush=True)
        if write:
            write_atomic(path, ("\n\n".join(parts) + "\n").encode())

    watch = threading.Timer(budget, os.kill, (os.getpid(), signal.SIGTERM))
    watch.daemon = True
    watch.start()

    def over(*_: object) -> None:  # between two runs, which know what to do themselves
        raise Preempted("the time is over")

    def left() -> str:
        count = sum(work.seconds(job) is None for job in work.jobs)
        return f"{count} of {len(work.jobs)} runs left."

    signal.signal(signal.SIGTERM, over)
    try:
        for job in work.jobs:
            if work.seconds(job) is not None:
                continue
            needed, rest = work.seconds_left([job]) or 0.0, until - time.monotonic()
            if needed > rest:
                known(f"{job.title} would take {needed:.0f} s, and {rest:.0f} are left.")
                break
            with in_row(job.row):
                quiet = Console(quiet=True)
                train(work.recipe(job), work.output / job.folder, device=device, console=quiet)
            known(f"{job.title}: {work.seconds(job):.0f} s; {left()}")
    except Preempted as error:
        known(f"{error}; {left()}")
    finally:
        watch.cancel()


if __name__ == "__main__":
    start(main)
