"""A study within seconds: its rows in order of worth, each after what it needs of what is shared.

    python benchmarks/results_gpu.py benchmarks/studies/few_labels_gpu.yaml --budget 400 --write
    python benchmarks/results_gpu.py benchmarks/studies/few_labels_gpu.yaml --device cpu --tiny

The study's paths are of the folder it is started in. The report is written after every run. The run
that the time ends in is saved, and goes on with the same command, as do those that are missing.
"""

import os
import re
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu import Device
from PIL import Image
from rich.console import Console
from step_cost import RESULTS, describe_machine, start

from vitdistill.errors import ConfigError, Preempted
from vitdistill.report.page import make_report
from vitdistill.report.write import write_markdown
from vitdistill.storage.atomic import write_atomic
from vitdistill.study.plan import Job, Row, Study, load_study
from vitdistill.study.run import Work, do
from vitdistill.world import choose_device

TINY: dict[str, Any] = {
    "train.batch_size": 16,
    "train.eval_every": 2,
    "optim.warmup_epochs": 0.5,
    "data.workers": 0,
}
SMALLER: dict[str, dict[str, Any]] = {  # what becomes of a row that has the field
    "student.checkpoint": {
        "student.checkpoint": None,
        "student.model": "resnet18",
        "student.model_args": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]},
        "train.epochs": 16,
    },
    "student.model_args.embed_dim": {"student.model_args.embed_dim": 48},
}


def in_order(work: Work) -> list[Job]:
    """Return every run, and what is shared just before the first that needs it."""
    shared = {job.row: job for job in work.jobs if "/" not in job.folder}
    found: list[Job] = []

    def add(job: Job) -> None:
        for name in (name for name in shared if name in job.needs):
            add(shared[name])
        if job not in found:
            found.append(job)

    for job in work.jobs:
        if job.row not in shared:
            add(job)
    return found


def made_tiny(study: Study, folder: Path) -> Study:
    """The same study on a few images in as many colours as classes, for two epochs.

    What is shared takes eight, to learn to be a teacher.
    """
    draw = np.random.default_rng(0)
    for split, count in (("labelled/train", 8), ("labelled/val", 4), ("rest", 8)):
        for number in range(4 * count):
            pixels = draw.integers(0, 120, (32, 32, 3))
            pixels[..., : number % 4] += 100
            label = f"c{number % 4}" if split != "rest" else "."
            path = folder / split / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)

    def few(row: Row, epochs: int) -> Row:
        values = {**row.set, **TINY, "train.epochs": epochs}
        for field in SMALLER.keys() & row.set.keys():
            values |= SMALLER[field]
        return replace(row, set=values)

    images: dict[str, Any] = {"data.dir": str(folder / "labelled")}
    images["data.unlabelled"] = str(folder / "rest")
    return replace(
        study,
        set={**study.set, **images},
        shared={name: few(row, 8) for name, row in study.shared.items()},
        rows={name: few(row, 2) for name, row in study.rows.items()},
        seeds=(0,),
    )


def main(
    study: str,
    /,
    budget: float = 400,
    output: str = "results_runs",
    device: str = "auto",
    write: bool = False,
    tiny: bool = False,
) -> None:
    """Do a study for so many seconds.

    Args:
        study: its file.
        budget: seconds, for what is not done yet.
        output: the folder of the runs; the same one goes on.
        device: auto, cpu, cuda or cuda:N.
        write: keep the report in benchmarks/results/<study>_<device>_<date>.md, after every run.
        tiny: smaller teachers, and two epochs of a few images that are made here: whether all of
            it runs, anywhere.
    """
    if budget <= 0:
        raise ConfigError(f"--budget is {budget}: it has to be above 0")
    where, folder = Device(choose_device(device)), Path(output)
    found = load_study(study)
    work = Work(
        made_tiny(found, folder.with_name(f"{folder.name}_images")) if tiny else found, folder
    )
    jobs = in_order(work)
    slug = re.sub(r"[^a-z0-9]+", "-", where.name.lower())
    path = RESULTS / f"{found.name}_{slug}_{time.strftime('%Y-%m-%d')}.md"
    head = f"{describe_machine('results_gpu.py')}\n- device: {where.name}"

    say = partial(print, flush=True)

    def over(*_: object) -> None:  # outside of a run's steps, which know what to do themselves
        raise Preempted("the time is over")

    def ask() -> None:  # again, because what is raised inside of a library may be lost there
        time.sleep(budget)
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)

    signal.signal(signal.SIGTERM, over)
    threading.Thread(target=ask, daemon=True).start()
    try:
        while pending := [job for job in jobs if not work.done(job)]:
            do(work, pending[0], pending, say, device, Console(quiet=True))
            if write:
                report = write_markdown(make_report([folder]))
                write_atomic(path, f"# {found.name}\n\n{head}\n\n{report}".encode())
    except Preempted as error:
        say(f"{error}; {len(pending)} of {len(jobs)} left")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    start(main)
