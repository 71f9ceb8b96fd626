"""DMAE as its users run it: pre-training without a classifier from an MAE teacher, stopped,
resumed, and then fine-tuned.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from vitdistill.data.augment import Augment
from vitdistill.errors import Preempted
from vitdistill.methods.dmae import DMAE
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.masking import RandomMasking
from vitdistill.models.mae import sincos_positions
from vitdistill.recipes.config import (
    DataConfig,
    OptimConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from vitdistill.recipes.stages import Stages
from vitdistill.runs.stages import train_stages
from vitdistill.runs.train import train

pytestmark = pytest.mark.whole


def vit(dim: int) -> StudentConfig:
    """Two blocks on 4 x 4 patches, initialised as a masked autoencoder."""
    args = {"img_size": 16, "patch_size": 4, "embed_dim": dim, "depth": 2, "num_heads": 2}
    return StudentConfig(model="vit_tiny_patch16_224", init="mae", model_args=args)


@pytest.fixture
def staged(tmp_path: Path) -> Stages:
    """Two stages of 6 steps each on 48 images, and a wider teacher that was itself pre-trained for
    3.
    """
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 150, (16, 16, 3))
                pixels[..., label] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(
                    tmp_path / "images" / split / name / f"{i:02d}.png"
                )
    mae = Recipe(
        student=vit(32),
        objectives={
            "mae": PixelReconstruction(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)
        },
        masking=RandomMasking(mask_rate=0.75),
        data=DataConfig(dir=str(tmp_path / "images"), workers=0, augment=Augment(scale=(0.2, 1.0))),
        optim=OptimConfig(lr=2e-3, warmup_epochs=0.0),
        train=TrainConfig(epochs=1, batch_size=16, log_every=1, save_every=2, eval_batch_size=4),
    )
    train(mae, tmp_path / "teacher", device="cpu")
    teachers = {"teacher": TeacherConfig(model=str(tmp_path / "teacher"))}
    dmae = replace(
        mae, student=vit(24), teachers=teachers, objectives={**mae.objectives, "dmae": DMAE()}
    )
    dmae = replace(dmae, train=replace(mae.train, epochs=2))
    student = StudentConfig(
        model="stage:pretrain", drop_path=0.1, model_args={"global_pool": "avg"}
    )
    optim = replace(mae.optim, layer_decay=0.75)
    fine = Recipe(student=student, data=mae.data, optim=optim, train=dmae.train)
    return Stages(name="small", stages={"pretrain": dmae, "finetune": fine})


def test_a_stopped_pre_training_goes_on_and_is_fine_tuned(
    staged: Stages, tmp_path: Path, interrupt: Callable[..., Any]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_stages(staged, whole, device="cpu")
    with pytest.raises(
        Preempted, match=r"in the stage 'pretrain', stopped by SIGINT at step 3 of 6"
    ):
        train_stages(staged, stopped, device="cpu", prepared=interrupt("pretrain", 3))
    shutil.rmtree(
        stopped / "pretrain" / "checkpoints" / "step-00000003"
    )  # as if it had been killed
    train_stages(staged, stopped, device="cpu")
    for name, kinds in (("pretrain", ["last"]), ("finetune", ["best", "last"])):
        one, two = whole / name, stopped / name
        assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
        for folder in (one, two):
            assert (
                sorted(path.name for path in folder.iterdir() if path.name in ("best", "last"))
                == kinds
            )
        for kind in kinds:
            assert (one / kind / "model.safetensors").read_bytes() == (
                two / kind / "model.safetensors"
            ).read_bytes()
        first, second = (
            json.loads((folder / "summary.json").read_bytes()) for folder in (one, two)
        )
        assert {**first, "seconds": 0} == {**second, "seconds": 0} and first["steps"] == 6
    losses = [
        json.loads(line)
        for line in (stopped / "pretrain" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all({"mae", "dmae"} <= line.keys() for line in losses if line["kind"] == "train")
    table = sincos_positions(24, (4, 4))
    learned, tuned = (
        safetensors.torch.load_file(stopped / name / "last" / "model.safetensors")
        for name in staged.stages
    )
    assert (
        learned["pos_embed"].numpy().tobytes() == table.numpy().tobytes()
        and "head.weight" not in learned
    )
    assert not torch.equal(tuned["pos_embed"], table) and tuned["head.weight"].shape == (
        3,
        24,
    )  # fine-tuning trains it too
