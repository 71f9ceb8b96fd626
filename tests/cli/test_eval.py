"""``vitdistill eval`` on features: what is judged, what is shown, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitdistill.cli import main
from vitdistill.cli.evaluate import tabulate
from vitdistill.data.augment import InputSpec
from vitdistill.data.loader import EvalLoader
from vitdistill.data.sources.open import open_source
from vitdistill.evaluate.features import extract
from vitdistill.evaluate.knn import knn_accuracy
from vitdistill.evaluate.linear import linear_probe
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.named import named_recipe
from vitdistill.recipes.yaml import dump_recipe
from vitdistill.runs.display import Display
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
    for name, images in (("run", "photos"), ("other", "elsewhere")):
        shutil.copytree(root / "classifier", root / name / "best")
        recipe = replace_fields(named_recipe("small_images_alone"), {"data.dir": images})
        (root / name / "recipe.yaml").write_text(dump_recipe(recipe))
    return root


@pytest.fixture
def evaluate(home, monkeypatch):
    """Run ``eval`` in the folder of `home`, and return its exit code."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("vitdistill.runs.evaluate.measure_speed", lambda *args: 1.0)
    words = ["--workers", "0", "--device", "cpu"]

    def run(*given: str, data: object = "photos") -> int:
        where = [] if data is None else ["--data-dir", str(data)]
        return main(["eval", *given, *where, *words])

    return run


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
    assert "k-NN top-1 (k 20, T 0.07)" in printed and "linear probe top-1" in printed
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


def test_weights_of_ones_own_need_the_shape_of_their_network(tmp_path, evaluate, scores, capsys):
    """What the refusal says makes the folder's network of its bare weights."""
    torch.save(create_model("classifier").state_dict(), tmp_path / "mine.pth")
    given = [NAME, "--model-path", str(tmp_path / "mine.pth")]
    given += [f"--set=model.model_args.{key}={VIT[key]}" for key in ("embed_dim", "depth")]
    given += ["--set=model.model_args.num_heads=2", "--img-size", "16"]
    assert evaluate(*given) == DATA
    remedy = "--set model.model_args.patch_size=4"
    assert f"give {remedy}" in capsys.readouterr().err
    words = *given, *remedy.split()
    words += "--set", f"model.model_args.pretrained_cfg_overlay={{crop_pct: {SPEC.crop_pct}}}"
    whole, found = scores("classifier"), scores(words[0], *words[1:])
    assert whole | {"model": NAME} == found
    compared = scores(
        "classifier",
        "--teacher-model",
        *words[:1],
        *[
            word.replace("--model-path", "--teacher-path").replace("model.model", "teacher.model")
            for word in words[1:]
            if word not in ("--img-size", "16")
        ],
        "--set",
        "teacher.image_size=16",
    )
    assert compared["agreement"] == 1
    for wrong in ("model.nothing=1", "embed_dim=3", "teacher.precision=float32", "model.model"):
        assert evaluate("classifier", "--set", wrong) in (64, CONFIG)


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


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("classes", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_fewer_classes_than_the_model_has(tmp_path, home, evaluate, scores, capsys, classes, empty):
    """Judged among all of its own, and among these: here alone, and with a teacher beside."""
    for label, name in enumerate(COLOURS):
        folder = tmp_path / "val" / name
        if label in classes:
            shutil.copytree(home / "photos" / "val" / name, folder)
        elif empty:
            folder.mkdir(parents=True)
    model = create_model("classifier").eval()
    images = open_source(str(tmp_path), "val", classes=COLOURS)
    (batch,) = EvalLoader(images, SPEC, batch_size=50)
    with torch.no_grad():
        logits = model(batch.images)
    of_these = torch.full((3,), -torch.inf).index_fill(0, torch.tensor(classes), 0.0)
    right = [(x.argmax(1) == batch.labels).double().mean() for x in (logits, logits + of_these)]
    found = scores("classifier", "--teacher-model", "classifier", data=tmp_path)
    assert [found["top1"], found["top1_among"]] == pytest.approx([float(x) for x in right])
    assert found["among"] == f"{len(classes)} of 3 classes" and found["agreement"] == 1
    assert evaluate("classifier", data=tmp_path) == 0
    assert f"top-1 among {len(classes)} of 3 classes" in capsys.readouterr().out


def test_models_side_by_side(home, evaluate, scores, capsys):
    alone = scores("classifier", "--knn")
    capsys.readouterr()
    assert evaluate("classifier", "encoder", "--knn", "--json") == 0
    both = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert both[0] == alone and [found["model"] for found in both] == ["classifier", "encoder"]
    assert evaluate("classifier", "encoder", "--knn") == 0
    images, *table = capsys.readouterr().out.splitlines()
    assert images == "photos (val):" and table[0].split() == ["classifier", "encoder"]
    assert max(len(line) for line in table if line.startswith("  ")) <= 80
    for name, count in (("top-1", 1), ("k-NN top-1 (k 20, T 0.07)", 2)):
        (row,) = [line for line in table if line.strip().startswith(name)]
        assert row.count("%") == count
    weights = "encoder/model.safetensors"
    assert evaluate("classifier", "encoder", "--knn", "--model-path", weights) == CONFIG


@pytest.mark.parametrize("models", [["run"], ["run/best"], ["run/"], ["run", "classifier"]])
def test_a_run_knows_its_images(evaluate, scores, capsys, models):
    expected = scores("classifier")
    assert evaluate(*models, "--json", data=None) == 0
    for line in capsys.readouterr().out.splitlines():
        assert json.loads(line) == {**expected, "model": json.loads(line)["model"]}
    for unknown in (["classifier"], ["run", "other"]):
        assert evaluate(*unknown, data=None) == CONFIG
        assert "--data-dir" in capsys.readouterr().err


def test_a_bar_moves_with_every_batch(evaluate, monkeypatch):
    seen = []
    advance = Display.advance
    monkeypatch.setattr(
        Display,
        "advance",
        lambda self, *a: (seen.append(self.tasks[0].description), advance(self, *a)),
    )
    assert evaluate("classifier", "--knn", "--batch-size", "10") == 0
    assert seen == ["evaluating"] * 2 + ["reading features"] * (4 + 2)


def test_models_whose_names_are_too_long_for_the_terminal_are_numbered() -> None:
    names = [f"runs/{'long' * i}/best" for i in range(2, 5)]
    scores = {"num_samples": 40, "num_parameters": 1000, "flops": 10**6, "images_per_second": 2}
    results = [
        {"model": name, "top1": i / 10, "device": "cpu", "threads": 1, **scores}
        for i, name in enumerate(names)
    ]
    whole, narrow = (tabulate(results, width) for width in (1000, 80))
    assert max(map(len, whole)) > 80 >= max(map(len, narrow))
    for lines in (whole, narrow):
        (top1,) = (line.split()[1:] for line in lines if "top-1" in line)
        assert top1 == ["0.00%", "10.00%", "20.00%"]
        assert all(any(name in line.split() for line in lines) for name in names)
