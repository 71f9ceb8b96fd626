"""What saving a checkpoint (digests, syncs, reading back) and loading it (verified) cost, against
torch.save and torch.load.

    python benchmarks/checkpoint.py    # the training state of a DeiT-S, in the working folder
    python benchmarks/checkpoint.py vit_base_patch16_224 --folder /mnt/shared --write

The state is what a run saves: weights, their moving average and AdamW's two moments, float32. The
ways to save and load take turns, in another order every round, in a folder that is removed
afterwards. The clock is wall time, since disks are waited for. The synced torch.save writes to the
disk what the row above it leaves in the system's cache.
"""

import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import step_cost
import timm
import torch

from vitdistill.errors import ConfigError
from vitdistill.storage import checkpoint


@dataclass
class Work:
    """Something to time, and the wall seconds of every round."""

    name: str
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)


def works(folder: Path, model: str) -> tuple[list[Work], int]:
    """Saving and loading a training state of ``model``, and its bytes."""
    torch.manual_seed(0)
    weights = timm.create_model(model).state_dict()
    tensors = {
        f"{part}.{key}": torch.randn_like(value)
        for part in ("model", "ema", "exp_avg", "exp_avg_sq")
        for key, value in weights.items()
    }
    plain = folder / "plain.pt"

    def synced() -> None:
        temp = plain.with_suffix(".new")
        with temp.open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(plain)

    made = [
        Work("torch.save", lambda: torch.save(tensors, plain)),
        Work("torch.save, synced and renamed", synced),
        Work(
            "our save: digests, synced, read back, renamed",
            lambda: checkpoint.save(folder, 1, tensors, {"step": 1}, keep=1),
        ),
        Work("torch.load", lambda: torch.load(plain, weights_only=True)),
        Work("our load, verified", lambda: checkpoint.load(checkpoint.folder_of(folder, 1))),
    ]
    return made, sum(tensor.nbytes for tensor in tensors.values())


def measure(made: list[Work], rounds: int) -> None:
    """Run each once a round after a round of warm-up in the given order, so that what is loaded is
    there.
    """
    shuffle = random.Random(0).shuffle
    for r in range(-1, rounds):
        order = list(made)
        if r >= 0:
            shuffle(order)
        for work in order:
            begun = time.perf_counter()
            work.run()
            if r >= 0:
                work.seconds.append(time.perf_counter() - begun)


def rows(made: list[Work], num_bytes: int) -> Iterator[str]:
    """Markdown rows: seconds, megabytes a second, and the ratio to PyTorch's of the same round."""
    yield "| what | s | MB / s | to PyTorch's | quartiles |"
    yield "|---|---:|---:|---:|---:|"
    for work in made:
        floor = made[3] if "load" in work.name else made[0]
        low, middle, high = statistics.quantiles(
            [a / b for a, b in zip(work.seconds, floor.seconds, strict=True)],
            n=4,
            method="inclusive",
        )
        seconds = statistics.median(work.seconds)
        yield (
            f"| {work.name} | {seconds:.2f} | {num_bytes / seconds / 1e6:,.0f} | **{middle:.2f}** |"
            f" {low:.2f} .. {high:.2f} |"
        )


def main(
    model: str = "deit_small_patch16_224",
    /,
    rounds: int = 9,
    folder: Path = Path("."),
    write: bool = False,
) -> None:
    """Measure saving and loading of a training state.

    Args:
        model: a timm name; its weights are random.
        rounds: at least 5.
        folder: on the disk to measure; a temporary folder is made in it.
        write: also write the table to benchmarks/results/checkpoint_<cpu>_<instructions>_<date>.md.
    """
    if rounds < 5:
        raise ConfigError(f"--rounds is {rounds}: medians need at least 5")
    if not timm.is_model(model):
        raise ConfigError(f"timm has no model {model!r}")
    if not folder.is_dir():
        raise ConfigError(f"--folder is {folder}, which is no folder")
    inside = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=folder))
    try:
        made, num_bytes = works(inside, model)
        measure(made, rounds)
    finally:
        shutil.rmtree(inside)
    parts = [
        f"# Checkpoints: the training state of {model}, {num_bytes / 1e6:,.0f} MB",
        step_cost.describe_machine("checkpoint.py"),
        (
            f"{rounds} rounds, wall time; ratios are medians over rounds, to torch.save and"
            " torch.load of the same round."
        ),
        "\n".join(rows(made, num_bytes)),
    ]
    print("\n\n".join(parts))
    if write:
        step_cost.keep("checkpoint", parts)


if __name__ == "__main__":
    step_cost.start(main)
