"""Run a study in a budget of seconds on one card, by several processes; report after every run.

    python benchmarks/results_gpu.py benchmarks/studies/few_labels_gpu.yaml --budget 400 --write
    python benchmarks/results_gpu.py benchmarks/studies/few_labels_gpu.yaml --device cpu --tiny

Each process is `vitdistill study` on the same folder: small networks leave most of a card idle. The
study's paths are relative to the folder it is started in. When the time is up, unfinished runs are
saved; the same command goes on with them, and with those that have not begun.
"""

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gpu import Device
from PIL import Image
from step_cost import RESULTS, describe_machine, start

from vitdistill.errors import ConfigError
from vitdistill.recipes.convert import to_dict
from vitdistill.recipes.yaml import dump_yaml
from vitdistill.report.page import make_report
from vitdistill.report.write import write_markdown
from vitdistill.storage.atomic import write_atomic
from vitdistill.study.plan import STUDY, Row, Study, load_study
from vitdistill.study.run import Work
from vitdistill.world import choose_device

TINY: dict[str, Any] = {
    "train.batch_size": 16,
    "train.eval_every": 2,
    "optim.warmup_epochs": 0.5,
    "data.workers": 0,
}
TEACHER: dict[str, Any] = {
    "student.model": "resnet18",
    "student.model_args": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]},
    "student.image_size": 96,
    "data.unlabelled": None,
    "data.views": None,
    "optim.lr": 0.01,
}


def made_tiny(study: Study, folder: Path) -> Study:
    """The same study on a few images in as many colours as classes, for two epochs.

    What is shared takes eight, to learn to be a teacher; one more replaces `teacher/best`.
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
        values = {k: v for k, v in values.items() if not re.search(r"\.(train|optim)\.\w+$", k)}
        if "data.dir" in values:
            values["data.dir"] = str(folder / "labelled")
        for key, value in values.items():
            if isinstance(value, dict) and value.get("model") == "teacher/best":
                values[key] = {**value, "model": "stage:cnn"}
            if "embed_dim" in key:
                values[key] = 48
        return replace(row, set=values)

    images: dict[str, Any] = {"data.dir": str(folder / "labelled")}
    images["data.unlabelled"] = str(folder / "rest")
    shared = {"cnn": Row(recipe="small_images_alone", set=TEACHER), **study.shared}
    return replace(
        study,
        set={**study.set, **images},
        shared={name: few(row, 16 if name == "cnn" else 8) for name, row in shared.items()},
        rows={name: few(row, 2) for name, row in study.rows.items()},
        seeds=(0,),
    )


def shortened(study: Study, share: float) -> Study:
    """The same study with this share of every run's epochs, of which warm-up and pauses are."""

    def few(values: dict[str, Any]) -> dict[str, Any]:
        found = dict(values)
        for key, value in values.items():
            if re.search(r"(^|\.)train\.(epochs|eval_every)$", key):
                found[key] = max(1, round(share * value))
            if key.endswith("optim.warmup_epochs"):
                found[key] = share * value
        return found

    rows, shared = (
        {name: replace(row, set=few(row.set)) for name, row in part.items()}
        for part in (study.rows, study.shared)
    )
    return replace(study, set=few(study.set), rows=rows, shared=shared)


def main(
    study: str,
    /,
    budget: float = 400,
    output: str = "results_runs",
    device: str = "auto",
    processes: int = 4,
    epochs: float = 1.0,
    write: bool = False,
    tiny: bool = False,
) -> None:
    """Do a study for so many seconds.

    Args:
        study: its file.
        budget: seconds, for what is not done yet.
        output: the folder of the runs; the same one goes on.
        device: auto, cpu, cuda or cuda:N.
        processes: that share the card, each with a run.
        epochs: the share of every run's epochs that it takes.
        write: keep the report in benchmarks/results/<study>_<device>_<date>.md, after every run.
        tiny: a smaller teacher, and two epochs of a few images that are made here: whether all of
            it runs, anywhere.
    """
    if budget <= 0 or processes < 1 or epochs <= 0:
        raise ConfigError("--budget, --processes and --epochs have to be above 0")
    begun, where, folder = time.monotonic(), Device(choose_device(device)), Path(output)
    found = shortened(load_study(study), epochs)
    if tiny:
        found = made_tiny(found, folder.with_name(f"{folder.name}_images"))
    work, file = Work(found, folder), folder.with_name(f"{folder.name}.yaml")
    write_atomic(file, dump_yaml(to_dict(found)).encode())
    slug = re.sub(r"[^a-z0-9]+", "-", where.name.lower())
    path = RESULTS / f"{found.name}_{slug}_{time.strftime('%Y-%m-%d')}.md"
    head = f"{describe_machine('results_gpu.py')}\n- device: {where.name}"
    command = [sys.executable, "-m", "vitdistill", "study", str(file)]
    command += ["--output", str(folder), "--device", device]

    def begin() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command)

    def number_done() -> int:
        return sum("/" in job.folder and work.done(job) for job in work.jobs)

    running, done = [begin()], number_done()
    while not (folder / STUDY).is_file() and running[0].poll() is None:
        time.sleep(0.1)
    running += [begin() for _ in range(processes - 1)]
    while any(process.poll() is None for process in running):
        time.sleep(1)
        if time.monotonic() - begun > budget:
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                process.wait()
        if write and number_done() > done:
            done = number_done()
            report = write_markdown(make_report([folder]))
            write_atomic(path, f"# {found.name}\n\n{head}\n\n{report}".encode())
    left = work.pending()
    took = f"{time.monotonic() - begun:.0f} s"
    print(f"{took}; {len(left)} of {len(work.jobs)} left", flush=True)
    if wrong := {process.returncode for process in running} - {0, 75}:
        raise SystemExit(max(wrong))


if __name__ == "__main__":
    start(main)
