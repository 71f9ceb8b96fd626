"""Processes that meet, agree on errors, and say each once."""

import contextlib
import io
import os
import re
import signal

import pytest
import torch
import torch.distributed as dist
from small_runs import ranks

from vitdistill import cli
from vitdistill.errors import ConfigError, DataError, Give, UserError
from vitdistill.world import ALONE, choose_device, join_world

pytestmark = pytest.mark.whole


def fail(error):
    raise error


def test_meeting():
    def work(rank):
        with join_world("cpu") as here:
            seen = [
                here.any(rank == 1, False),
                here.gather(f"r{rank}"),
                here.from_main(lambda: f"main {rank}"),
            ]
            seen.append(here.mean(torch.tensor([float(rank), 1.0])).tolist())
            with pytest.raises(DataError, match="only I"), here.together():
                if rank == 2:
                    raise DataError("only I")
            with here.together():
                pass
            with pytest.raises(ConfigError, match="main"):
                here.from_main(lambda: fail(ConfigError("main")))
        assert not dist.is_initialized()
        return seen

    for found in ranks(3, work):
        assert found == [[True, False], ["r0", "r1", "r2"], "main 0", [1.0, 1.0]]
    assert ALONE.any(True, False) == [True, False]
    assert ALONE.from_main(lambda: 5) == 5
    with pytest.raises(UserError, match="mine"):
        ALONE.agree(UserError("mine"))


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("mps", "gpu", "cuda:x", "meta"):
        with pytest.raises(ConfigError) as caught:
            choose_device(name)
        assert caught.value.field == "device"
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError) as caught:
            choose_device("cuda:3")
        assert caught.value.fixes == (Give("device", "cpu"),)


def command(words):
    """A command under torchrun: what fails is its word."""
    (word,) = words
    with join_world("cpu") as here:
        if word == "together":
            with here.together():
                if here.rank == 1:
                    raise DataError("cat/05.png is damaged")
        if word == "alone" and here.rank == 1:
            raise UserError("mine alone")
        here.gather(word)
    return 0


LOST = "vitdistill recipes: another process of this run died or does not answer .*\n"


@pytest.mark.parametrize(
    ("word", "codes", "first", "second"),
    [
        ("together", [65, 65], "vitdistill recipes: cat/05.png is damaged\n", ""),
        ("alone", [70, 64], LOST, r"vitdistill recipes \(process 1\): mine alone" + "\n"),
    ],
)
def test_an_error_is_said_once_by_who_met_it(word, codes, first, second):
    def work(rank):
        cli._run = lambda *_: command([word])  # of this process, a fork
        text = io.StringIO()
        with contextlib.redirect_stderr(text):
            return cli.main(["recipes"]), text.getvalue()

    answers = ranks(2, work)
    assert [code for code, _ in answers] == codes
    assert all(re.fullmatch(a, b) for a, (_, b) in zip((first, second), answers, strict=True))


@pytest.mark.parametrize("dies", [0, 1, 2])
@pytest.mark.parametrize("when", ["before they meet", "while they meet"])
def test_whoever_lives_speaks(dies, when):
    """Also where it is the process that speaks for all."""

    def meet(rank):
        with join_world("cpu") as here:
            for step in range(3):
                if rank == dies and step == (when == "while they meet"):
                    os.kill(os.getpid(), signal.SIGKILL)
                here.gather(step)

    def work(rank):
        cli._run = lambda *_: meet(rank)  # of this process, a fork
        text = io.StringIO()
        with contextlib.redirect_stderr(text):
            return cli.main(["recipes"]), text.getvalue()

    for rank, answer in enumerate(ranks(3, work)):
        if rank == dies:
            assert answer is None
        else:
            code, text = answer
            who = f"vitdistill recipes (process {rank})" if rank else "vitdistill recipes"
            assert code == 70 and text.count("\n") == 1
            assert text.startswith(f"{who}: another process of this run died")
