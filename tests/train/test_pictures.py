"""Pictures of what a masked autoencoder sees and predicts."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vitdistill.data.views import InputSpec
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.masking import RandomMasking
from vitdistill.train.pictures import draw_sheet

SMALL = PixelReconstruction(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)


def masked(taught, **changes):
    base = taught()
    student = replace(base.student, init="mae")
    return replace(base, teachers={}, selector=None, student=student, masking=RandomMasking(mask_rate=0.5), **changes)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_visible_patches_are_the_inputs_and_hidden_ones_predicted(tmp_path, taught, tools, norm_pix):
    recipe = masked(taught, objectives={"mae": replace(SMALL, norm_pix=norm_pix)})
    seen = []

    def watch(job):
        seen.append(job)

    tools.run(recipe, tmp_path / "run", prepared=watch)
    (job,) = seen
    (batch,) = list(job.shown_loader)
    job.distillation.eval()
    rows = job.distillation.pictures(batch)
    assert list(rows) == ["input", "mae: visible", "mae: predicted"]
    patches = {name: images.unfold(2, 4, 4).unfold(3, 4, 4) for name, images in rows.items()}
    same = (patches["input"] == patches["mae: predicted"]).all(dim=(-1, -2)).all(1)
    assert torch.equal(same.flatten(1).sum(1), torch.full((len(same),), 8))
    visible = patches["mae: visible"].movedim(1, -1)
    assert torch.equal(visible[same], patches["input"].movedim(1, -1)[same]) and bool((visible[~same] == 0).all())
    with Image.open(tmp_path / "run" / "pictures.png") as sheet:
        assert sheet.mode == "RGB" and sheet.height == 3 * (96 + 6) + 6


def test_pixels_come_back_from_the_normalisation():
    spec = InputSpec((2, 3), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    pixels = torch.randint(0, 256, (4, 3, 2, 3), generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    sheet = draw_sheet({"row": (pixels / 255 - mean) / std}, spec)
    scale = 48
    for i in range(4):
        for y in range(2):
            for x in range(3):
                place = (130 + i * (3 * scale + 6) + x * scale + 5, 6 + y * scale + 5)
                assert sheet.getpixel(place) == tuple(pixels[i, :, y, x].tolist())


def test_a_masked_autoencoder_learns_resumes_and_is_fine_tuned(tmp_path, taught, tools):
    """Pre-training without labels, k-NN beside it, positions that stay, and a classifier on top afterwards."""
    recipe = masked(taught, objectives={"mae": SMALL})
    tools.run(recipe, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["mae"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0]
    scores = [record["knn_top1"] for record in records if record["kind"] == "eval"]
    assert scores and all(0 <= score <= 1 for score in scores)
    assert not (tmp_path / "run" / "best").exists()
    again = replace(taught(), teachers={}, selector=None, objectives={"ce": taught().objectives["ce"]})
    again = replace(again, student=replace(again.student, model=str(tmp_path / "run"), model_args={"global_pool": "avg"}))
    summary = tools.run(again, tmp_path / "fine")
    assert summary["scores"]["top1"] > 0


def test_a_run_without_pictures_has_none(tmp_path, plain, tools):
    tools.run(plain(), tmp_path / "run")
    assert not (tmp_path / "run" / "pictures.png").exists()


def test_images_without_validation_or_of_one_class_are_enough(tmp_path, taught, tools):
    """What needs no labels runs on ``train/photos`` and on class folders without ``val``."""
    recipe = masked(taught, objectives={"mae": SMALL})
    several = tools.write_images(tmp_path / "several")
    shutil.rmtree(several / "val")
    single = tmp_path / "single" / "train" / "photos"
    single.mkdir(parents=True)
    for i, path in enumerate(sorted((several / "train").rglob("*.png"))):
        shutil.copy(path, single / f"{i}.png")
    for folder in (several, tmp_path / "single"):
        said = []
        summary = tools.run(replace(recipe, data=replace(recipe.data, dir=str(folder))), tmp_path / f"run {folder.name}", said)
        assert summary["scores"] == {} and any("nothing is evaluated" in line for line in said)
        assert (tmp_path / f"run {folder.name}" / "pictures.png").exists()
