"""Masked autoencoders: pictures of what they see and predict, and the images they do with."""

import shutil
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import ends_alike, flat, records, run, write_images

from vitdistill.data.augment import InputSpec
from vitdistill.errors import DataError
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.masking import RandomMasking
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.pictures import draw_sheet
from vitdistill.storage import checkpoint

pytestmark = pytest.mark.whole

SMALL = PixelReconstruction(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)


@pytest.fixture
def masked(taught):
    """``masked(...)``: an autoencoder that sees half of the patches."""
    base = taught()
    recipe = replace(
        base,
        teachers={},
        selector=None,
        student=replace(base.student, init="mae"),
        objectives={"mae": SMALL},
        masking=RandomMasking(mask_rate=0.5),
    )
    return lambda **changes: replace_fields(recipe, changes)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_visible_patches_are_the_inputs_and_hidden_ones_predicted(tmp_path, masked, norm_pix):
    seen = []
    recipe = masked(**{"objectives.mae.norm_pix": norm_pix, "train.epochs": 2})
    run(recipe, tmp_path / "run", prepared=seen.append)
    (job,) = seen
    (batch,) = list(job.loaders.shown)
    job.distillation.eval()
    rows = job.distillation.pictures(batch, job.teachers)
    assert list(rows) == ["input", "mae: visible", "mae: predicted"]
    shown, visible, predicted = (
        images.unfold(2, 4, 4).unfold(3, 4, 4).movedim(1, 3).flatten(3) for images in rows.values()
    )
    same = (shown == predicted).all(3)
    assert same.flatten(1).sum(1).tolist() == [8] * len(same)
    assert torch.equal(visible[same], shown[same]) and not visible[~same].any()
    with Image.open(tmp_path / "run" / "pictures.png") as sheet:
        assert sheet.mode == "RGB" and sheet.height == 3 * (96 + 6) + 6


def test_pixels_come_back_from_the_normalisation():
    spec = InputSpec((2, 3), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    pixels = torch.randint(0, 256, (4, 3, 2, 3), generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    sheet = draw_sheet({"row": (pixels / 255 - mean) / std}, spec)
    for i, y, x in torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(3)).tolist():
        place = (130 + i * (3 * 48 + 6) + x * 48 + 5, 6 + y * 48 + 5)
        assert sheet.getpixel(place) == tuple(pixels[i, :, y, x].tolist())


def test_a_masked_autoencoder_learns_resumes_and_is_fine_tuned(tmp_path, masked, taught):
    """Pre-training without labels, k-NN beside it, positions that stay, and a classifier on top
    afterwards.
    """
    folder = tmp_path / "run"
    run(masked(), folder)
    losses = [line["mae"] for line in records(folder, "train")]
    scores = [line["knn_top1"] for line in records(folder, "eval")]
    assert losses[-1] < losses[0] and len(scores) == 3 and scores[-1] > 0.6
    assert not (folder / "best").exists()
    first, last = (checkpoint.load(checkpoint.folder_of(folder, step))[0] for step in (1, 9))
    same = {key for key in first if torch.equal(first[key], last[key])}
    positions = "distillation.student.pos_embed"
    assert positions in same and first[positions].any()
    assert "distillation.student.patch_embed.proj.weight" not in same
    ends_alike(masked(), folder, tmp_path / "again", 4)

    base, begun = taught(), {}
    student = replace(base.student, model=str(folder), model_args={"global_pool": "avg"})
    objectives = {"ce": base.objectives["ce"]}
    tuned = replace(base, teachers={}, selector=None, objectives=objectives, student=student)

    def look(job):
        begun.update({name: value.clone() for name, value in job.student.state_dict().items()})

    assert run(tuned, tmp_path / "fine", prepared=look)["scores"]["top1"] > 0.6
    given = load_file(folder / "last" / "model.safetensors")
    for name in ("pos_embed", "blocks.1.mlp.fc1.weight"):
        assert torch.equal(begun[name], given[name])


def test_what_a_selector_leaves_its_teacher_is_shown(tmp_path, taught):
    """MaskedKD at a keep rate of 0.5: half of the 16 patches are grey, the others as they are."""
    jobs = []
    run(taught(**{"train.epochs": 2}), tmp_path / "run", prepared=jobs.append)
    (batch,) = jobs[0].loaders.shown
    rows = jobs[0].distillation.eval().pictures(batch, jobs[0].teachers)
    assert list(rows) == ["input", "teacher\nsees 8 of 16"]
    given, seen = (
        images.unfold(2, 4, 4).unfold(3, 4, 4).movedim(1, 3).flatten(3) for images in rows.values()
    )
    shown = (given == seen).all(3)
    assert shown.flatten(1).sum(1).tolist() == [8] * len(shown) and not seen[~shown].any()
    with Image.open(tmp_path / "run" / "pictures.png") as sheet:
        assert sheet.height == 2 * (96 + 6) + 6


def test_a_run_without_pictures_has_none(teacher):
    assert not (teacher / "pictures.png").exists()


@pytest.mark.parametrize("kind", ["no val", "one class", "tar"])
def test_images_without_validation_or_of_one_class_are_enough(tmp_path, masked, kind):
    root = write_images(tmp_path / "images")
    if kind == "one class":
        (tmp_path / "single" / "train").mkdir(parents=True)
        flat(root, tmp_path / "single" / "train" / "photos")
        root = tmp_path / "single"
    elif kind == "tar":
        with tarfile.open(tmp_path / "photos.tar", "w") as archive:
            archive.add(root / "train", "train")
        root = tmp_path / "photos.tar"
    else:
        shutil.rmtree(root / "val")
    lines = []
    summary = run(masked(**{"data.dir": str(root), "train.epochs": 2}), tmp_path / "run", lines)
    assert summary["scores"] == {} and (tmp_path / "run" / "pictures.png").exists()
    assert any("no validation images" in line for line in lines)


def test_validation_images_that_are_there_and_damaged_are_not_passed_over(tmp_path, masked):
    """Only where there are none at all, nothing is evaluated."""
    root = write_images(tmp_path / "images")
    recipe = masked(**{"data.dir": str(root)})
    (root / "val" / "cat" / "06.png").unlink()
    (root / "val" / "cat" / "06.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"06\.png"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
