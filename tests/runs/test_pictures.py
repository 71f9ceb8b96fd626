"""Pictures of what a masked autoencoder sees and predicts."""

import json
import shutil
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vitdistill.data.augment import InputSpec
from vitdistill.errors import DataError
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.masking import RandomMasking
from vitdistill.runs.pictures import draw_sheet
from vitdistill.storage import checkpoint

pytestmark = pytest.mark.whole

SMALL = PixelReconstruction(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)


def masked(taught, **changes):
    base = taught()
    student = replace(base.student, init="mae")
    return replace(
        base,
        teachers={},
        selector=None,
        student=student,
        masking=RandomMasking(mask_rate=0.5),
        **changes,
    )


@pytest.mark.parametrize("norm_pix", [False, True])
def test_visible_patches_are_the_inputs_and_hidden_ones_predicted(
    tmp_path, taught, tools, norm_pix
):
    recipe = masked(taught, objectives={"mae": replace(SMALL, norm_pix=norm_pix)})
    seen = []

    def watch(job):
        seen.append(job)

    tools.run(recipe, tmp_path / "run", prepared=watch)
    (job,) = seen
    (batch,) = list(job.loaders.shown)
    job.distillation.eval()
    rows = job.distillation.pictures(batch)
    assert list(rows) == ["input", "mae: visible", "mae: predicted"]
    patches = {name: images.unfold(2, 4, 4).unfold(3, 4, 4) for name, images in rows.items()}
    same = (patches["input"] == patches["mae: predicted"]).all(dim=(-1, -2)).all(1)
    assert torch.equal(same.flatten(1).sum(1), torch.full((len(same),), 8))
    visible = patches["mae: visible"].movedim(1, -1)
    assert torch.equal(visible[same], patches["input"].movedim(1, -1)[same]) and bool(
        (visible[~same] == 0).all()
    )
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
    """Pre-training without labels, k-NN beside it, positions that stay, and a classifier on top
    afterwards.
    """
    recipe, folder = masked(taught, objectives={"mae": SMALL}), tmp_path / "run"
    tools.run(recipe, folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["mae"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0]
    scores = [record["knn_top1"] for record in records if record["kind"] == "eval"]
    assert len(scores) == 3 and scores[-1] > 0.6
    assert not (folder / "best").exists()
    first, last = (checkpoint.load(checkpoint.folder_of(folder, step))[0] for step in (1, 9))
    student = "distillation.student."
    assert torch.equal(first[f"{student}pos_embed"], last[f"{student}pos_embed"]) and bool(
        first[f"{student}pos_embed"].any()
    )
    assert not torch.equal(
        first[f"{student}patch_embed.proj.weight"], last[f"{student}patch_embed.proj.weight"]
    )

    before = {
        name: (folder / name).read_bytes()
        for name in ("metrics.jsonl", "pictures.png", "last/model.safetensors")
    }
    (folder / "summary.json").unlink()
    for step in range(5, 10):
        shutil.rmtree(checkpoint.folder_of(folder, step))
    said = []
    tools.run(recipe, folder, said)
    assert f"resuming {folder} at step 4 of 9" in said
    assert {name: (folder / name).read_bytes() for name in before} == before
    again, _ = checkpoint.load(checkpoint.folder_of(folder, 9))
    assert again.keys() == last.keys() and all(torch.equal(again[key], last[key]) for key in last)

    base = taught()
    begun = {}
    tuned = replace(base, teachers={}, selector=None, objectives={"ce": base.objectives["ce"]})
    tuned = replace(
        tuned, student=replace(tuned.student, model=str(folder), model_args={"global_pool": "avg"})
    )
    summary = tools.run(
        tuned,
        tmp_path / "fine",
        prepared=lambda job: begun.update(
            {name: value.clone() for name, value in job.student.state_dict().items()}
        ),
    )
    given = load_file(folder / "last" / "model.safetensors")
    assert torch.equal(begun["pos_embed"], given["pos_embed"])
    assert torch.equal(begun["blocks.1.mlp.fc1.weight"], given["blocks.1.mlp.fc1.weight"])
    assert summary["scores"]["top1"] > 0.6


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
        summary = tools.run(
            replace(recipe, data=replace(recipe.data, dir=str(folder))),
            tmp_path / f"run {folder.name}",
            said,
        )
        assert summary["scores"] == {} and any("nothing is evaluated" in line for line in said)
        assert (tmp_path / f"run {folder.name}" / "pictures.png").exists()


def test_a_tar_without_validation_is_enough(tmp_path, taught, tools):
    recipe = masked(taught, objectives={"mae": SMALL})
    several = tools.write_images(tmp_path / "several")
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(several / "train", "train")
    said = []
    summary = tools.run(
        replace(recipe, data=replace(recipe.data, dir=str(tmp_path / "photos.tar"))),
        tmp_path / "run",
        said,
    )
    assert summary["scores"] == {} and any(
        line.startswith("there are no validation images") for line in said
    )


def test_validation_images_that_are_there_and_damaged_are_not_passed_over(tmp_path, taught, tools):
    """Only where there are none at all, nothing is evaluated."""
    recipe = masked(taught, objectives={"mae": SMALL})
    root = tools.write_images(tmp_path / "images")
    recipe = replace(recipe, data=replace(recipe.data, dir=str(root)))
    (root / "val" / "dog").mkdir()
    with pytest.raises(DataError, match="dog has no images"):
        tools.run(recipe, tmp_path / "run")
    (root / "val" / "dog").rmdir()
    (root / "val" / "cat" / "06.png").unlink()
    (root / "val" / "cat" / "06.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"06\.png"):
        tools.run(recipe, tmp_path / "run")
    shutil.rmtree(root / "val" / "cat")
    with pytest.raises(DataError, match="it lacks 1 "):
        tools.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
