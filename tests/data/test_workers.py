"""Work in processes: in order, with its errors, and without leaving anybody behind."""

import multiprocessing
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vitdistill.data.workers import map_in_workers
from vitdistill.errors import ConfigError, DataError, Set


def square(number: int) -> int:
    if number == 13:
        raise ConfigError("unlucky", Set("train.epochs", 14), field="train.epochs")
    return number * number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_errors_as_they_were_raised(workers: int) -> None:
    seen = []
    with (
        pytest.raises(ConfigError, match=r"^unlucky: set train.epochs=14$") as caught,
        map_in_workers(square, range(20), workers) as results,
    ):
        for result in results:
            seen.append(result)
    assert seen == [i * i for i in range(13)] and caught.value.field == "train.epochs"


def test_an_endless_iteration_can_be_left() -> None:
    with map_in_workers(square, iter(lambda: 3, None), 2) as results:
        assert [next(results) for _ in range(5)] == [9] * 5
        processes = multiprocessing.active_children()
    assert len(processes) == 2 and not any(process.is_alive() for process in processes)


@pytest.mark.whole  # torch looks every five seconds
def test_a_killed_worker_is_an_error_and_not_a_hang() -> None:
    with map_in_workers(square, iter(lambda: 3, None), 1) as results:
        next(results)
        (process,) = multiprocessing.active_children()
        process.kill()
        with pytest.raises(DataError) as caught:
            for _ in range(100):
                next(results)
    assert caught.value.field == "data.workers"


def image(number: int) -> torch.Tensor:
    return torch.full((200_000,), number)


LIMITS = [
    # Shared memory is a file: one that may not be as large stands for one that does not fit.
    *((resource.RLIMIT_FSIZE, 100_000, workers) for workers in (1, 3)),
    *((resource.RLIMIT_NOFILE, room, workers) for room in (0, 5, 14, 30) for workers in (1, 3)),
]


@pytest.mark.whole
@pytest.mark.parametrize(("limit", "room", "workers"), LIMITS)
def test_what_cannot_be_sent_or_received_is_an_error_and_not_a_hang(
    limit: int, room: int, workers: int, fork: Any, join: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        used = len(os.listdir("/proc/self/fd")) if limit == resource.RLIMIT_NOFILE else 0
        resource.setrlimit(limit, (used + room, resource.getrlimit(limit)[1]))
        with (
            pytest.raises(DataError) as caught,
            map_in_workers(image, range(60), workers) as results,
        ):
            list(results)  # each holds a file open
        assert caught.value.field == "data.workers"

    assert join(fork(work)) == 0
    assert capfd.readouterr().err == ""


SCRIPT = """
import os, sys, signal
from vitdistill.data.workers import map_in_workers
def opened():
    with map_in_workers(abs, iter(lambda: -3, None), 2) as results:
        yield from results
results = opened()
next(results)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
for number in (signal.SIGTERM, signal.SIGINT):
    os.killpg(0, number)
    for _ in range(8):
        next(results)
print("alive", flush=True)
sys.exit(75)  # with the iteration open
"""


@pytest.mark.whole
def test_workers_outlive_signals_and_end_with_the_process() -> None:
    """A signal to the group leaves the workers running; leaving the program does not hang."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert (done.stdout, done.returncode) == ("alive\n", 75), done.stderr
