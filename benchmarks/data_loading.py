"""Training views a second: made in batches, or one by one from decoded images or from files.

``python benchmarks/data_loading.py photos --size 32`` prints a Markdown table for the small-image
recipe and DeiT's. It times the loader alone, in one process with one thread: images a second of CPU
time (for shared machines) and of wall time. ``--workers`` adds rows with loader processes.
"""

import argparse
import sys
import time
from dataclasses import replace
from unittest import mock

import torch

from vitdistill.data import decoded
from vitdistill.data.augment import AUGMENTS, InputSpec
from vitdistill.data.loader import Loading, TrainLoader
from vitdistill.data.sources.base import ImageSource
from vitdistill.data.sources.open import open_source
from vitdistill.errors import UserError

WARM_UP = 3
WAYS = ("batched", "decoded", "files")


def measure(loader: TrainLoader, num_steps: int) -> tuple[float, float]:
    """Return images a second of CPU time (of this process) and of wall time, after a warm-up."""
    batches = loader.batches(0, num_steps + WARM_UP)
    for _ in range(WARM_UP):
        next(batches)
    cpu, wall, images = time.process_time(), time.perf_counter(), 0
    for micro_batches in batches:
        images += sum(len(batch.ids) for batch in micro_batches)
    return images / (time.process_time() - cpu), images / (time.perf_counter() - wall)


def row(
    source: ImageSource, recipe: str, size: int, way: str, loading: Loading, images: int
) -> str:
    """Measure a loader; ``way``: "batched", or one by one, "decoded" in memory or from "files"."""
    spec = InputSpec((size, size), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    begun = time.process_time()
    with mock.patch.object(decoded, "can_batch", lambda *_: way == "batched"):
        chosen = replace(loading, in_memory=False if way == "files" else None)
        loader = TrainLoader(source, AUGMENTS[recipe], spec, chosen)
    opening = time.process_time() - begun
    cpu, wall = measure(loader, max(images // loading.batch_size, 2))
    cpu_text = f"{cpu:,.0f}" if loading.workers == 0 else ""
    batch = f"{loading.batch_size} | {loading.workers}"
    return f"| {way} | {recipe} | {batch} | {cpu_text} | {wall:,.0f} | {opening:.1f} s |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data_dir",
        help="an image folder with train/ (a val/ alone is read too), or whatever --data-dir takes",
    )
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--size", type=int, default=32, help="side of the views, pixels")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="also measure one-by-one loading with this many processes",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=6400,
        help="images a measurement, at most; one by one a fifth of it",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        source = open_source(arguments.data_dir, arguments.split)
        loading = Loading(arguments.batch_size, seed=0)
        print(
            "| views | recipe | batch | workers | images/s, CPU time | images/s, wall | opening |"
        )
        print("|---|---|---:|---:|---:|---:|---:|")
        runs = [(way, recipe, 0) for way in WAYS for recipe in ("small", "deit")]
        if arguments.workers:
            runs += [(way, "deit", arguments.workers) for way in WAYS[1:]]
        for way, recipe, workers in runs:
            images = arguments.images if way == "batched" else arguments.images // 5
            chosen = replace(loading, workers=workers)
            print(row(source, recipe, arguments.size, way, chosen, images), flush=True)
    except UserError as error:
        print(f"data_loading: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
