"""Work in processes: in order, with its errors, and without leaving anybody behind."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
