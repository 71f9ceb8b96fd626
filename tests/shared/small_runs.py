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
import shutil
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
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.settings import (
    DataConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from vitdistill.recipes.stages import Stages
from vitdistill.runs.train import train
from vitdistill.storage import checkpoint

DEVICE = os.environ.get("VITDISTILL_TEST_DEVICE", "cpu")
"""Where tests of devices run: `make test-gpu` sets it."""
CLASSES = ("ant", "bee", "cat")
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def write_images(root: Path, train: int = 16, val: int = 7) -> Path:
    """``root/{train,val}/CLASS/NN.png``, each class of another colour: a few steps learn it."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (16, 16, 3))
                pixels[..., label] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return root


def flat(root: Path, folder: Path) -> Path:
    """The training images of ``root`` in one folder, without labels."""
    folder.mkdir()
    for path in (root / "train").rglob("*.png"):
        shutil.copy(path, folder / f"{path.parent.name}{path.name}")
    return folder


# -- recipes --------------------------------------------------------------------------------------


def plain_recipe(images: Path, **changes: Any) -> Recipe:
    """The student alone: 3 epochs of 3 steps; ``changes`` are paths of fields."""
    recipe = Recipe(
        student=StudentConfig(model="vit_tiny_patch16_224", model_args=VIT),
        data=DataConfig(dir=str(images), workers=0, augment=Augment(crop="pad", crop_padding=2)),
        optim=OptimConfig(lr=2e-3, warmup_epochs=1.0),
        train=TrainConfig(
            epochs=3,
            batch_size=16,
            log_every=2,
            save_every=1,
            keep_checkpoints=99,
            eval_batch_size=4,
        ),
    )
    return replace_fields(recipe, changes)


def taught_recipe(images: Path, teacher: Path, **changes: Any) -> Recipe:
    """MaskedKD with everything that has a state or draws random numbers switched on."""
    plain = plain_recipe(images)
    recipe = replace(
        plain,
        student=replace(plain.student, drop_path=0.3),
        teachers={"teacher": TeacherConfig(model=str(teacher / "last"))},
        objectives={
            "ce": CrossEntropy(weight=0.5, smoothing=0.1),
            "kd": SoftKD(weight=0.5, temperature=2.0),
        },
        selector=MaskedKD(keep_rate=0.5),
        optim=replace(plain.optim, clip_grad=1.0, layer_decay=0.8),
        train=replace(plain.train, ema_decay=0.6, accumulate=2),
    )
    mixed = {"data.augment.mixup": 0.8, "data.augment.cutmix": 1.0, "data.augment.reprob": 0.25}
    return replace_fields(recipe, {**mixed, **changes})


def three_stages() -> Stages:
    """Two epochs of three steps each on ``images`` of the current folder: from nothing, from its
    weights at another size, and a fresh student taught by that.
    """
    plain = plain_recipe(Path("images"), **{"train.epochs": 2, "train.log_every": 1})
    objectives = {"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)}
    taught = {"teacher": TeacherConfig(model="stage:finetune")}
    larger = StudentConfig(model="stage:pretrain", image_size=24, drop_path=0.2)
    stages = {
        "pretrain": plain,
        "finetune": replace(plain, student=larger),
        "distill": replace(plain, teachers=taught, objectives=objectives),
    }
    return Stages(name="three", stages=stages)


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


# -- running --------------------------------------------------------------------------------------


def run(
    recipe: Recipe, folder: Path, said: list[str] | None = None, **options: Any
) -> dict[str, Any]:
    """`train` on `DEVICE`, or another; what it prints goes to ``said``, line by line."""
    text = io.StringIO()
    given = {"device": DEVICE, "console": Console(file=text, width=400), **options}
    try:
        return train(recipe, folder, **given)
    finally:
        if said is not None:
            said += text.getvalue().splitlines()


def said(recipe: Recipe, folder: Path) -> list[str]:
    """The lines a run prints."""
    lines: list[str] = []
    run(recipe, folder, lines)
    return lines


def in_training(
    work: Callable[[], Any], calls: int, training: bool = True
) -> Callable[[Any], None]:
    """For ``prepared``: do something in the ``calls``-th forward pass of training, or of
    evaluation.
    """

    def watch(job: Any) -> None:
        count = 0

        # On a layer of the student: the moving average is a copy of it, and runs the hook too.
        def hook(module: torch.nn.Module, *_: Any) -> None:
            nonlocal count
            count += module.training == training
            if module.training == training and count == calls:
                work()

        job.student.norm.register_forward_hook(hook)

    return watch


def send(number: int) -> Callable[[], None]:
    """Send this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def interrupted(stage: str, step: int) -> Callable[[Any], None]:
    """For ``prepared`` of stages: Ctrl-C in the middle of a step of one of them."""
    stop = in_training(send(signal.SIGINT), step)
    return lambda job: stop(job) if job.recipe.name == stage else None


def unfinished(whole: Path, folder: Path, step: int) -> Path:
    """A copy of a run as it would be had it been killed after the checkpoint of ``step``: logs and
    exports are ahead of that.
    """
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    for saved in steps_saved(folder):
        if saved > step:
            shutil.rmtree(checkpoint.folder_of(folder, saved))
    return folder


def ends_alike(recipe: Recipe, whole: Path, folder: Path, step: int, **options: Any) -> None:
    """A copy of ``whole`` that is killed after ``step`` and resumed computes the very same."""
    lines: list[str] = []
    run(recipe, unfinished(whole, folder, step), lines, **options)
    assert any(line.startswith(f"resuming {folder} at step {step} of ") for line in lines)
    assert result(folder) == result(whole)


# -- what a run left ------------------------------------------------------------------------------


def records(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run's log."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def losses(folder: Path) -> list[dict[str, float]]:
    """The training records of a run's log, as far as they depend on what was computed."""
    keys = ("step", "ce", "loss", "grad_norm")
    return [{key: line[key] for key in keys} for line in records(folder, "train")]


def steps_saved(folder: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    saved = (folder / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in saved)


def result(folder: Path) -> dict[str, Any]:
    """All that a finished run computed: logs and exports as bytes, the final state, the summary but
    for its seconds.
    """
    newest = checkpoint.load_latest(folder)
    assert newest is not None
    tensors, state = newest[1]
    summary = json.loads((folder / "summary.json").read_bytes())
    files = ["metrics.jsonl", "pictures.png"]
    files += [f"{kind}/model.safetensors" for kind in ("last", "best")]
    left_out = ("seconds", "offsets", "recipe")
    return {
        **{name: (folder / name).read_bytes() for name in files if (folder / name).exists()},
        "tensors": {
            key: (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
            for key, value in tensors.items()
        },
        "state": {key: value for key, value in state.items() if key not in left_out},
        "summary": {key: value for key, value in summary.items() if key != "seconds"},
    }


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of its content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# -- processes ------------------------------------------------------------------------------------


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
                left = max(deadline - time.monotonic(), 0)
                if not select.select([self._reader], [], [], left)[0]:
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
    size = str(count)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def start(rank: int) -> Child:
        return Child(lambda: work(rank), RANK=str(rank), LOCAL_RANK=str(rank), **shared)

    return [start(rank) for rank in range(count)]


def ranks(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returned, or raised, on each of ``count`` processes."""
    return [child.wait() for child in start_ranks(count, work)]
