"""Small real runs: 16 x 16 images of three kinds, ViTs of a few thousand weights, and processes
forked from this one.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import select
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    register_model,
    vision_transformer,
)

import vitdistill
from vitdistill.data.augment import Augment
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.recipes.config import (
    DataConfig,
    OptimConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.train import train
from vitdistill.storage import checkpoint

CLASSES = ("ant", "bee", "cat")
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def write_images(root: Path, train: int = 16, val: int = 7, size: int = 16) -> Path:
    """``root/{train,val}/CLASS/NN.png``, each class of another colour: a few steps learn it."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (size, size, 3))
                pixels[..., label] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 21 validation images."""
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The run folder of a teacher that is right on every validation image."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    recipe = replace_fields(
        alone(images), {"train.epochs": 8, "optim.lr": 5e-3, "train.eval_every": 8, "train.seed": 5}
    )
    assert run(recipe, folder)["scores"]["top1"] == 1.0
    return folder


def alone(images: Path, **changes: Any) -> Recipe:
    """3 epochs of 3 steps without a teacher; ``changes`` are fields of train."""
    settings = {
        "epochs": 3,
        "batch_size": 16,
        "log_every": 2,
        "save_every": 1,
        "keep_checkpoints": 99,
        "eval_batch_size": 4,
        **changes,
    }
    return Recipe(
        student=StudentConfig(model="vit_tiny_patch16_224", model_args=VIT),
        data=DataConfig(dir=str(images), workers=0, augment=Augment(crop="pad", crop_padding=2)),
        optim=OptimConfig(lr=2e-3, warmup_epochs=1.0),
        train=TrainConfig(**settings),
    )


@pytest.fixture
def plain(images: Path) -> Callable[..., Recipe]:
    """``plain(**{"optim.lr": 1.0})``: the student alone."""
    return lambda **changes: replace_fields(alone(images), changes)


@pytest.fixture
def taught(images: Path, teacher: Path) -> Callable[..., Recipe]:
    """``taught(...)``: MaskedKD with everything that has a state or draws random numbers switched
    on.
    """

    def make(**changes: Any) -> Recipe:
        base = alone(images, ema_decay=0.6, accumulate=2)
        recipe = Recipe(
            student=StudentConfig(model="vit_tiny_patch16_224", model_args=VIT, drop_path=0.3),
            teachers={"teacher": TeacherConfig(model=str(teacher / "last"))},
            objectives={
                "ce": CrossEntropy(weight=0.5, smoothing=0.1),
                "kd": SoftKD(weight=0.5, temperature=2.0),
            },
            selector=MaskedKD(keep_rate=0.5),
            data=DataConfig(
                dir=base.data.dir,
                workers=0,
                augment=Augment(crop="pad", crop_padding=2, mixup=0.8, cutmix=1.0, reprob=0.25),
            ),
            optim=OptimConfig(lr=2e-3, warmup_epochs=1.0, clip_grad=1.0, layer_decay=0.8),
            train=base.train,
        )
        return replace_fields(recipe, changes)

    return make


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 training images: mixing leaves one over."""
    return write_images(tmp_path_factory.mktemp("odd") / "images", train=15)


@pytest.fixture
def kd(taught: Callable[..., Recipe], odd: Path) -> Callable[..., Recipe]:
    """``kd(...)``: plain KD on views that are cropped, erased and mixed, two of each image."""

    def make(**changes: Any) -> Recipe:
        recipe = taught(**{"train.accumulate": 1, "train.log_every": 1, "train.ema_decay": None})
        hard = Augment(crop="rrc", mixup=0.8, cutmix=1.0, reprob=0.5)
        data = DataConfig(dir=str(odd), workers=0, augment=hard, views=2)
        return replace_fields(replace(recipe, selector=None, data=data), changes)

    return make


def spare_vit() -> str:
    """The timm name of a ViT with a parameter that nothing reads."""
    if not is_model("vit_with_spare"):

        class SpareViT(VisionTransformer):
            def __init__(self, **args: Any) -> None:
                super().__init__(**args)
                self.spare = torch.nn.Parameter(torch.ones(3))

        def vit_with_spare(pretrained: bool = False, **args: Any) -> VisionTransformer:
            return build_model_with_cfg(SpareViT, "vit_with_spare", pretrained, **args)

        module = types.ModuleType("spare_models")
        module.default_cfgs = generate_default_cfgs(
            {"vit_with_spare.untrained": vision_transformer._cfg()}
        )
        sys.modules["spare_models"], vit_with_spare.__module__ = module, "spare_models"
        register_model(vit_with_spare)
    return "vit_with_spare"


def run(
    recipe: Recipe, folder: Path, said: list[str] | None = None, **options: Any
) -> dict[str, Any]:
    """`train` on the CPU; what it prints goes to ``said``, line by line."""
    text = io.StringIO()
    try:
        return train(recipe, folder, device="cpu", console=Console(file=text, width=400), **options)
    finally:
        if said is not None:
            said += text.getvalue().splitlines()


def said(recipe: Recipe, folder: Path) -> list[str]:
    """The lines a run prints."""
    lines: list[str] = []
    run(recipe, folder, lines)
    return lines


def result(folder: Path) -> dict[str, Any]:
    """All that a finished run computed: logs and exports as bytes, the final state, the summary but
    for its seconds.
    """
    newest = checkpoint.latest(folder)
    assert newest is not None
    tensors, state = checkpoint.load(newest)
    summary = json.loads((folder / "summary.json").read_bytes())
    kept = {
        key: value for key, value in state.items() if key not in ("seconds", "offsets", "recipe")
    }
    return {
        "metrics": (folder / "metrics.jsonl").read_bytes(),
        "last": (folder / "last" / "model.safetensors").read_bytes(),
        "best": (folder / "best" / "model.safetensors").read_bytes(),
        "tensors": {
            key: (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
            for key, value in tensors.items()
        },
        "state": kept,
        "summary": {key: value for key, value in summary.items() if key != "seconds"},
    }


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of its content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def losses(folder: Path) -> list[dict[str, float]]:
    """The training records of a run's log."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: line[key] for key in ("step", "ce", "loss", "grad_norm")}
        for line in lines
        if line["kind"] == "train"
    ]


def result_losses(folder: Path) -> tuple[float, float]:
    """The first and the last loss of a run's log."""
    values = [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return values[0], values[-1]


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for something another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened in {seconds} s")
        time.sleep(0.002)


def environment() -> dict[str, str]:
    """For processes that are started and not forked: they find this package as these tests do."""
    return {**os.environ, "PYTHONPATH": str(Path(vitdistill.__file__).parents[1])}


class Child:
    """``work()`` in a forked process; what it returns, or the exception it raises, comes back
    through a pipe.
    """

    def __init__(self, work: Callable[[], Any], **environment: str) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.update(environment)
            code = 70
            with contextlib.suppress(BaseException):
                os.close(reader)
                try:
                    answer: Any = work()
                except BaseException as error:
                    answer = error
                with os.fdopen(writer, "wb") as pipe:
                    pipe.write(pickle.dumps(answer))
                code = getattr(answer, "exit_code", 1 if isinstance(answer, BaseException) else 0)
            os._exit(code)
        os.close(writer)
        self._reader = reader
        self.code: int | None = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = 60) -> Any:
        """What came back (None if it was killed); a child that takes longer is killed, and that is
        an error.
        """
        data, deadline = b"", time.monotonic() + seconds
        try:
            while True:
                ready, _, _ = select.select(
                    [self._reader], [], [], max(deadline - time.monotonic(), 0)
                )
                if not ready:
                    self.kill()
                    raise TimeoutError(f"the process hangs after {seconds} s")
                chunk = os.read(self._reader, 1 << 16)
                if not chunk:
                    return pickle.loads(data) if data else None
                data += chunk
        finally:
            os.close(self._reader)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def start_ranks(count: int, work: Callable[[int], Any]) -> list[Child]:
    """``work(rank)`` on ``count`` processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }

    def start(rank: int) -> Child:
        return Child(lambda: work(rank), RANK=str(rank), LOCAL_RANK=str(rank), **shared)

    return [start(rank) for rank in range(count)]


def ranks(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returned, or raised, on each of ``count`` processes."""
    return [child.wait() for child in start_ranks(count, work)]


@pytest.fixture(scope="session")
def tools() -> Any:
    """The functions of this file: the tests are not a package that could import them."""
    offered = (
        write_images,
        run,
        said,
        result,
        tree,
        losses,
        result_losses,
        Child,
        environment,
        until,
        spare_vit,
        start_ranks,
        ranks,
    )
    return types.SimpleNamespace(VIT=VIT, **{tool.__name__: tool for tool in offered})
