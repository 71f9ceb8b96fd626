"""``vitdistill eval`` on features: what is judged, what is shown, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitdistill.cli import main
from vitdistill.data.augment import InputSpec
from vitdistill.data.loader import EvalLoader
from vitdistill.data.sources.open import open_source
from vitdistill.evaluate.features import extract
from vitdistill.evaluate.knn import knn_accuracy
from vitdistill.evaluate.linear import linear_probe
from vitdistill.weights.create import create_model
from vitdistill.weights.export import export_timm
from vitdistill.world import World

COLOURS = ("ant", "bee", "cat")
NAME = "vit_tiny_patch16_224"
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
SPEC = InputSpec(image_size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
DATA, CONFIG = 65, 78


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 training and 20 validation images of three colours, and two networks at random."""
    root, random = tmp_path_factory.mktemp("eval"), np.random.default_rng(0)
    for split, counts in (("train", (20, 10, 6)), ("val", (8, 7, 5))):
        for channel, (name, count) in enumerate(zip(COLOURS, counts, strict=True)):
            (root / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 150, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(root / "photos" / split / name / f"{i:02d}.png")
    for name, classes in (("encoder", None), ("classifier", COLOURS)):
        model = create_model(NAME, num_classes=len(classes or ()), **VIT)
        options = {"architecture": NAME, "model_args": VIT, "input_spec": SPEC}
        export_timm(model, root / name, classes=classes, **options)
    return root


@pytest.fixture
def evaluate(home, monkeypatch):
    """Run ``eval`` in the folder of `home`, and return its exit code."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("vitdistill.runs.evaluate.measure_speed", lambda *args: 1.0)
    words = ["--workers", "0", "--device", "cpu"]
    return lambda model, *more, data="photos": main(
        ["eval", model, "--data-dir", str(data), *words, *more]
    )


@pytest.fixture
def scores(evaluate, capsys):
    def run(model: str, *words: str, **options) -> dict[str, object]:
        capsys.readouterr()
        assert evaluate(model, "--json", *words, **options) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_an_encoder_is_judged_by_its_features(home, scores, evaluate, capsys):
    found = scores("encoder", "--knn", "5", "--linear-probe")
    assert not {"top1", "ece", "knn_top5"} & found.keys() and "encoder" in found["no_top1"]
    told = {key: found[key] for key in ("num_samples", "num_train_samples", "pool", "knn_k")}
    assert told == {"num_samples": 20, "num_train_samples": 36, "pool": "mean", "knn_k": 5}
    by_class = scores("encoder", "--knn=5", "--pool", "class")
    assert by_class["pool"] == "class" and "linear_top1" not in by_class
    model, alone = create_model("encoder"), World(0, 1, torch.device("cpu"))
    loaders = [
        EvalLoader(open_source("photos", split), SPEC, batch_size=50) for split in ("train", "val")
    ]
    for pool, said in (("mean", found), ("class", by_class)):
        train, val = (extract(model, loader, alone, pool=pool) for loader in loaders)
        assert said["knn_top1"] == pytest.approx(knn_accuracy(*train, *val, k=5)["knn_top1"])
        if pool == "mean":
            probe = linear_probe(*train, *val)["linear_top1"]
            assert said["linear_top1"] == pytest.approx(probe, abs=1.5 / 20)
    assert evaluate("encoder", "--knn", "--linear-probe") == 0
    printed = capsys.readouterr().out
    assert "k-NN top-1 (k 20, T 0.07)" in printed and "linear probe top-1 (L2 " in printed
    assert "calibration" not in printed


def test_a_classifier_is_judged_by_both(scores):
    plain, both = scores("classifier"), scores("classifier", "--knn")
    assert not {"knn_top1", "linear_top1", "pool", "no_top1"} & plain.keys()
    assert both["knn_k"] == 20 and both.items() >= plain.items() and "knn_top1" in both


def test_a_classifier_of_other_classes_still_has_features(tmp_path, home, evaluate, scores):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in COLOURS:
            (tmp_path / split / f"other {name}").symlink_to(home / "photos" / split / name)
    assert evaluate("classifier", data=tmp_path) == CONFIG
    found = scores("classifier", "--knn", "7", data=tmp_path)
    assert "top1" not in found and found["no_top1"]
    assert found["knn_top1"] == scores("classifier", "--knn", "7")["knn_top1"]


REFUSED = [
    ([], "--knn"),
    (["--pool", "class"], "--pool"),
    (["--knn", "0"], "--knn"),
    (["--knn", "37"], "36 training images"),
    (["--knn", "--split", "train"], "--knn"),
    (["--linear-probe", "--split", "train"], "--linear-probe"),
    (["--knn", "--teacher-model", "classifier"], "teacher"),
]


@pytest.mark.parametrize(("words", "named"), REFUSED)
def test_what_cannot_take_effect_is_refused(words, named, evaluate, capsys):
    assert evaluate("encoder", *words) == CONFIG
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1


def test_a_bank_of_other_classes_is_refused(tmp_path, home, evaluate):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").symlink_to(home / "photos" / "val")
    for name in COLOURS[:2]:
        (tmp_path / "train" / name).symlink_to(home / "photos" / "train" / name)
    assert evaluate("encoder", "--knn", data=tmp_path) == DATA


def test_damaged_and_other_files_of_a_part_are_said(tmp_path, home, evaluate, capsys):
    root = shutil.copytree(home / "photos" / "train", tmp_path / "mine")
    for name in (*(f"ant/0{i}.png" for i in range(6)), "bee/x.heic"):
        (root / name).write_bytes(b"not one")
    half = ("classifier", "--val-split", "0.5")
    assert evaluate("classifier", data=root) == DATA
    assert "--val-split 0.1" in capsys.readouterr().err
    assert evaluate(*half, data=root) == DATA
    assert "--skip-damaged" in capsys.readouterr().err
    assert evaluate(*half, "--skip-damaged", "--json", data=root) == 0
    found = json.loads(capsys.readouterr().out)
    text = " ".join(found["notes"])
    assert 12 <= found["num_samples"] < 18 and "1 .heic" in text and "damaged" in text
