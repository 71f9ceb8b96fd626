"""What runs on the device of `DEVICE`: the CPU in `make test`, a GPU in `make test-gpu`.

Processes are started anew here, never forked: a fork cannot use a GPU that its parent has used.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import DEVICE, plain_recipe, run, taught_recipe, write_images

from vitdistill.recipes.config import Recipe
from vitdistill.world import choose_device

FLOAT32 = {"train.amp_dtype": "float32"}


def pytest_sessionstart(session: pytest.Session) -> None:
    if DEVICE != "cpu" and not torch.cuda.is_available():
        pytest.exit("these tests need a GPU, and torch sees none: DEVICE=cpu does without", 2)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return choose_device(DEVICE)


@pytest.fixture(scope="session")
def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@pytest.fixture(autouse=True)
def _graphs_of_one_test() -> Iterator[None]:
    """What one test compiled does not count in another."""
    yield
    torch.compiler.reset()


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    """On a CPU, graphs are traced and run as they are: code of theirs takes minutes to make."""
    if not on_gpu:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    changes = {"train.epochs": 8, "optim.lr": 5e-3, "train.eval_every": 8, "train.seed": 5}
    run(plain_recipe(images, **FLOAT32, **changes), folder)
    return folder


@pytest.fixture(scope="session")
def taught(images: Path, teacher: Path) -> Callable[..., Recipe]:
    """``taught(...)``: MaskedKD with all that has a state or is random, in float32."""

    def make(**changes: Any) -> Recipe:
        return taught_recipe(images, teacher, **FLOAT32 | changes)

    return make
