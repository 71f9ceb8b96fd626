"""DMAE as its users run it: pre-training without a classifier from an MAE teacher, stopped,
resumed, and then fine-tuned.
"""

import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from small_runs import VIT, interrupted, plain_recipe, records, result, run

from vitdistill.data.augment import Augment
from vitdistill.errors import Preempted
from vitdistill.methods.dmae import DMAE
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.masking import RandomMasking
from vitdistill.models.mae import sincos_positions
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.settings import StudentConfig, TeacherConfig
from vitdistill.recipes.stages import Stages
from vitdistill.runs.stages import train_stages

pytestmark = pytest.mark.whole


def vit(dim):
    """Two blocks on 4 x 4 patches, initialised as a masked autoencoder."""
    args = {**VIT, "embed_dim": dim}
    return StudentConfig(model="vit_tiny_patch16_224", init="mae", model_args=args)


@pytest.fixture
def staged(tmp_path, images):
    """Two stages of 6 steps each, and a wider teacher that was itself pre-trained for 3."""
    plain = plain_recipe(images, **{"train.epochs": 2, "optim.warmup_epochs": 0.0})
    plain = replace(plain, data=replace(plain.data, augment=Augment(scale=(0.2, 1.0))))
    loss = PixelReconstruction(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)
    masking = RandomMasking(mask_rate=0.75)
    mae = replace(plain, student=vit(32), objectives={"mae": loss}, masking=masking)
    run(replace_fields(mae, {"train.epochs": 1}), tmp_path / "teacher")
    dmae = replace(
        mae,
        student=vit(24),
        teachers={"teacher": TeacherConfig(model=str(tmp_path / "teacher"))},
        objectives={"mae": loss, "dmae": DMAE()},
    )
    pooled = {"global_pool": "avg"}
    student = StudentConfig(model="stage:pretrain", drop_path=0.1, model_args=pooled)
    fine = replace(plain, student=student, optim=replace(plain.optim, layer_decay=0.75))
    return Stages(name="small", stages={"pretrain": dmae, "finetune": fine})


def test_a_stopped_pre_training_goes_on_and_is_fine_tuned(staged, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_stages(staged, whole, device="cpu")
    with pytest.raises(Preempted, match=r"the stage 'pretrain', stopped by SIGINT at step 3 of 6"):
        train_stages(staged, stopped, device="cpu", prepared=interrupted("pretrain", 3))
    shutil.rmtree(stopped / "pretrain" / "checkpoints" / "step-00000003")  # as if killed
    train_stages(staged, stopped, device="cpu")
    for name in staged.stages:
        assert result(whole / name) == result(stopped / name)
        assert (whole / name / "best").exists() == (name == "finetune")
    assert all({"mae", "dmae"} <= line.keys() for line in records(stopped / "pretrain", "train"))
    table = sincos_positions(24, (4, 4))
    learned, tuned = (
        safetensors.torch.load_file(stopped / name / "last" / "model.safetensors")
        for name in staged.stages
    )
    assert torch.equal(learned["pos_embed"], table) and "head.weight" not in learned
    # Fine-tuning trains the positions too.
    assert not torch.equal(tuned["pos_embed"], table) and tuned["head.weight"].shape == (3, 24)
