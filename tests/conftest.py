"""What every test stands on: one thread, fixed seeds, no network, no waiting for the disk.

`make test` starts pytest with ``--jaxtyping-packages=vitdistill,beartype.beartype``: annotated
functions of the package then compare what they get and give with their jaxtyping annotations.
`_jaxtyped` adjusts that where a test would see something else than a user does.
"""

import functools
import inspect
import os
import random
import signal
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch and huggingface_hub are imported, and inherited by the processes that tests start.
if os.environ.get("VITDISTILL_TEST_DEVICE", "cpu") == "cpu":
    # Tests fork, and a forked process cannot use a GPU that its parent has looked at.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = os.path.join(
    __file__, "none"
)  # nothing can be there: a user's own has weights
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import beartype
import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch
from beartype._check.code import codemain

# What a terminal or a launcher sets changes what is printed and how many processes there are.
_TERMINAL = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for _name in _TERMINAL + _LAUNCHER:
    os.environ.pop(_name, None)

torch.set_num_threads(1)

# A killed process loses nothing that it wrote, only a power cut does, and no test can have one.
# The tests of what is written through to the disk replace os.fsync by a counter of their own.
os.fsync = lambda descriptor: None

# Autograd counts the devices at the first backward of a process, and forks nothing with gradients
# afterwards if there are any. FakeTensorMode (torch.compile) pretends that there is one: tests
# fork, so the first backward comes before any of it.
torch.ones(1, requires_grad=True).sum().backward()

# Same examples in every run, so that a red test is red for everybody.
# `--hypothesis-profile=thorough` looks further.
hypothesis.settings.register_profile(
    "default", derandomize=True, database=None, deadline=None, max_examples=20
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("default")

# beartype checks one random item of a tuple: drawn from a generator of its own, a run repeats itself
# and a test of who draws random numbers sees its own alone.
codemain.getrandbits = random.Random(0).getrandbits  # type: ignore[attr-defined]

_check = jaxtyping.jaxtyped
_tower = beartype.beartype(
    conf=beartype.BeartypeConf(is_pep484_tower=True)
)  # an int is a float, as in PEP 484


def _jaxtyped(target: Any = None, *, typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped`, which the import hook puts on every class and function, with five
    differences.

    What names no array is not checked: mypy does that, and checks at every call took a third of
    the tests' time. Under torch.compile and torch.export the plain function is traced: the checks
    cannot be, and are not in the product. A dataclass that is given a wrong type answers with its
    own validation, where it has one, as it does to a user. A function inside a function is not
    checked: its check would be built anew at every call of the outer one. Protocols are made
    checkable at run time: beartype refuses annotations it cannot test.
    """
    if target is None:
        return functools.partial(_jaxtyped, typechecker=typechecker)
    if typechecker is not None:
        typechecker = _tower
    if inspect.isclass(target) and getattr(target, "_is_protocol", False):
        return typing.runtime_checkable(target)
    shaped = "jaxtyping." in repr(getattr(target, "__annotations__", {}))
    if not shaped or torch.compiler.is_compiling() or "<locals>" in target.__qualname__:
        return target
    if not inspect.isclass(target):
        return _unless_compiling(target, _check(target, typechecker=typechecker))
    plain = target.__init__
    _check(target, typechecker=typechecker)
    if target.__init__ is not plain:  # only dataclasses are checked, and each once
        target.__init__ = _unless_compiling(plain, _own_error_first(plain, target.__init__))
    return target


def _unless_compiling(plain: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if torch.compiler.is_compiling():
            return plain(*args, **kwargs)
        return checked(*args, **kwargs)

    return call


def _own_error_first(plain: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    def init(*args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        try:
            checked(*args, **kwargs)
        except jaxtyping.TypeCheckError:
            plain(*args, **kwargs)
            raise

    return init


jaxtyping.jaxtyped = _jaxtyped


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from the same generator states, whatever ran before it, and leaves the
    thread count alone.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """``tree(folder)``: every file's content."""
    return lambda folder: {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="session")
def fork() -> Callable[[Callable[[], object]], int]:
    """``fork(work)``: the pid of a child that does it and leaves with 0, or with 1 if it raised."""

    def start(work: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            signal.alarm(120)  # none is left behind by a test that fails
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return pid

    return start


@pytest.fixture(scope="session")
def join() -> Callable[[int], int]:
    """``join(pid)``: how the child left."""
    return lambda pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite", action="store_true", help="write messages.txt anew, with what is said now"
    )
