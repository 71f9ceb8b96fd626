"""Training views a second from an image folder: batched on tensors against one by one, small-image
recipe against DeiT's.

``python benchmarks/data_loading.py photos --size 32`` prints a Markdown table. One process, one
thread, the loader alone: rows are images a second of CPU time (shared machines) and of wall time.
``--workers`` adds a row of loader processes.
"""

import argparse
import sys
import time

import torch

from vitdistill.data.augment import AUGMENTS, InputSpec
from vitdistill.data.loader import Loading, TrainLoader
from vitdistill.data.sources.base import ImageSource
from vitdistill.data.sources.open import open_source
from vitdistill.errors import UserError

WARM_UP = 3


def measure(loader: TrainLoader, num_steps: int) -> tuple[float, float]:
    """Images a second of CPU time (this process and its threads) and of wall time, after a
    warm-up.
    """
    batches = loader.batches(0, num_steps + WARM_UP)
    for _ in range(WARM_UP):
        next(batches)
    cpu, wall, images = time.process_time(), time.perf_counter(), 0
    for micro_batches in batches:
        images += sum(len(batch.ids) for batch in micro_batches)
    return images / (time.process_time() - cpu), images / (time.perf_counter() - wall)


def row(
    source: ImageSource,
    recipe: str,
    spec: InputSpec,
    batch_size: int,
    in_memory: bool | None,
    workers: int,
    images: int,
) -> str:
    begun = time.process_time()
    loading = Loading(batch_size, seed=0, in_memory=in_memory, workers=workers)
    loader = TrainLoader(source, AUGMENTS[recipe], spec, loading)
    opening = time.process_time() - begun
    cpu, wall = measure(loader, max(images // batch_size, 2))
    cpu_text = f"{cpu:,.0f}" if workers == 0 else ""
    return (
        f"| {loader.pipeline} | {recipe} | {batch_size} | {workers} | {cpu_text} | {wall:,.0f} |"
        f" {opening:.1f} s |"
    )


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
        help="images a measurement, at most; one by one a tenth of it",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        source = open_source(arguments.data_dir, arguments.split)
        spec = InputSpec((arguments.size, arguments.size), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        print(
            "| pipeline | recipe | batch | workers | images/s, CPU time | images/s, wall |"
            " opening |"
        )
        print("|---|---|---:|---:|---:|---:|---:|")
        for in_memory, count in ((None, arguments.images), (False, arguments.images // 10)):
            for recipe in ("small", "deit"):
                print(
                    row(source, recipe, spec, arguments.batch_size, in_memory, 0, count), flush=True
                )
        if arguments.workers:
            print(
                row(
                    source,
                    "deit",
                    spec,
                    arguments.batch_size,
                    False,
                    arguments.workers,
                    arguments.images // 5,
                ),
                flush=True,
            )
    except UserError as error:
        print(f"data_loading: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
