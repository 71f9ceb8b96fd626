"""What a run computes, end to end."""

import io
import json
from dataclasses import replace
from itertools import count

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from small_runs import (
    VIT,
    ends_alike,
    flat,
    losses,
    records,
    result,
    run,
    said,
    spare_vit,
    write_images,
)
from timm.models import create_model

from vitdistill.data.loader import EvalLoader
from vitdistill.data.model_input import input_spec_of
from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, Drop, Set
from vitdistill.evaluate.accuracy import evaluate
from vitdistill.evaluate.knn import knn_evaluation
from vitdistill.methods.base import WeightSchedule
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.settings import TeacherConfig
from vitdistill.runs.display import Display
from vitdistill.runs.train import train
from vitdistill.storage import checkpoint
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit
from vitdistill.weights import export
from vitdistill.world import ALONE

pytestmark = pytest.mark.whole


def saved(folder, step):
    """The tensors of a checkpoint."""
    return checkpoint.load(checkpoint.folder_of(folder, step))[0]


def exported(folder):
    return create_model(f"local-dir:{folder / 'last'}", pretrained=True).eval()


def test_a_run_repeats_itself(tmp_path, whole, taught):
    run(taught(), tmp_path / "run")
    assert result(tmp_path / "run") == result(whole)
    lines = records(whole)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 2), ("train", 3), ("eval", 3), ("train", 4), ("train", 6), ("eval", 6), ("train", 8), ("train", 9), ("eval", 9),
    ]  # fmt: skip
    terms = {"ce", "kd", "ce_unweighted", "kd_unweighted", "loss"}
    assert lines[0].keys() == {"kind", "step", "epoch", "lr", "grad_norm", *terms}
    assert lines[-1]["num_samples"] == 21


def test_an_export_is_proved_once_a_run(tmp_path, plain, monkeypatch):
    proofs, prove = [], export._check_reload
    monkeypatch.setattr(export, "_check_reload", lambda *args: (proofs.append(1), prove(*args))[1])
    run(plain(**{"train.eval_every": 1}), tmp_path / "run")
    assert len(proofs) == 1


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_no_loss(tmp_path, plain, accumulate):
    changes = {"data.augment.mixup": 0.5, "train.log_every": 1}
    run(plain(**changes), tmp_path / "whole")
    run(plain(**changes, **{"train.accumulate": accumulate}), tmp_path / "parts")
    one, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [line["step"] for line in one] == list(range(1, 10))
    for a, b in zip(one, parts, strict=True):
        assert a == pytest.approx(b, rel=2e-5)


def test_the_average_of_the_weights_is_evaluated_and_exported(whole, images):
    tensors, weights = saved(whole, 9), load_file(whole / "last" / "model.safetensors")
    assert {key.removeprefix("ema.") for key in tensors if key.startswith("ema.")} == {*weights}
    assert all(torch.equal(weights[key], tensors[f"ema.{key}"]) for key in weights)
    assert not torch.equal(weights["head.bias"], tensors["distillation.student.head.bias"])
    model = exported(whole)
    loader = EvalLoader(open_source(str(images), "val"), input_spec_of(model), batch_size=21)
    summary = json.loads((whole / "summary.json").read_text())
    assert evaluate(model, loader, ALONE) == pytest.approx(summary["scores"], rel=1e-6)
    assert model.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    batch = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(batch), run_vit(model, batch, Needs(logits=True)).logits)


def test_the_average_follows_the_weights(tmp_path, plain):
    """ema_1 = w_1 and ema_s = d ema_(s-1) + (1 - d) w_s, over every step."""
    run(plain(**{"train.ema_decay": 0.75, "train.epochs": 2}), tmp_path / "run")
    average = None
    for step in range(1, 7):
        tensors = saved(tmp_path / "run", step)
        weights = tensors["distillation.student.head.weight"]
        average = weights if average is None else 0.75 * average + 0.25 * weights
        torch.testing.assert_close(tensors["ema.head.weight"], average, rtol=1e-5, atol=1e-7)


def test_unlabelled_images_are_learnt_from_the_teacher_alone(tmp_path, images, taught):
    recipe = taught(**{"data.dir": str(flat(images, tmp_path / "flat"))})
    with pytest.raises(ConfigError) as caught:
        run(recipe, tmp_path / "run")
    assert caught.value.field == "data.dir" and Drop("ce") in caught.value.fixes
    recipe = replace(recipe, objectives={"kd": SoftKD()}, selector=None)
    summary = run(recipe, tmp_path / "run")
    assert summary["best_top1"] is None and summary["scores"] == {}
    model = exported(tmp_path / "run")
    assert model.num_classes == 3 and model.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    first, *_, last = records(tmp_path / "run", "train")
    assert last["loss"] < first["loss"]


CNN = {"student.model": "resnet10t", "student.model_args": {"channels": [8, 8, 16, 16]}}
LARGE = {"student.model": "deit_tiny_patch16_224"}


@pytest.mark.parametrize(
    "network",
    [
        {**CNN, "student.image_size": 32, "optim.lr": 2e-2},
        {**LARGE, "student.model_args": {**VIT, "img_size": 32, "patch_size": 8}},
    ],
    ids=["convolutional", "vit"],
)
def test_a_teacher_of_another_kind_size_and_normalisation(tmp_path, plain, network):
    """32 x 32 with ImageNet's mean; the student sees 16 x 16 with Inception's."""
    run(plain(**{"optim.lr": 5e-3, "train.epochs": 8, **network}), tmp_path / "teacher")
    taught = {"teacher": TeacherConfig(model=str(tmp_path / "teacher"))}
    recipe = replace(plain(), teachers=taught, objectives={"kd": SoftKD()})

    def look(job):
        specs = job.teachers["teacher"].spec, job.networks.spec
        assert [spec.image_size for spec in specs] == [(32, 32), (16, 16)]
        assert specs[0].mean != specs[1].mean

    lines = []
    run(recipe, tmp_path / "run", lines, prepared=look)
    assert any(line.startswith("teacher: right on ") and " of 21 " in line for line in lines)


def test_a_student_with_a_distillation_token(tmp_path, taught):
    recipe = taught(**{"student.model": "deit_tiny_distilled_patch16_224"})
    objectives = {"ce": recipe.objectives["ce"], "hard_kd": HardKD()}
    recipe = replace(recipe, objectives=objectives, selector=None)
    run(recipe, tmp_path / "run")
    assert type(exported(tmp_path / "run")).__name__ == "VisionTransformerDistilled"
    ends_alike(recipe, tmp_path / "run", tmp_path / "again", 4)


def test_what_no_gradient_reaches_is_named_and_kept(tmp_path, plain):
    lines = said(plain(**{"student.model": spare_vit()}), tmp_path / "run")
    assert any("1 parameter ('spare')" in line for line in lines)
    first, last = saved(tmp_path / "run", 1), saved(tmp_path / "run", 9)
    same = {key for key in first if torch.equal(first[key], last[key])}
    assert "distillation.student.spare" in same and "distillation.student.head.weight" not in same


def test_dropout_draws_other_numbers_every_time_and_does_not_ask_the_caller(tmp_path, plain):
    args = {**VIT, "drop_rate": 0.5}
    drop = plain(**{"student.model_args": args, "train.accumulate": 2, "train.epochs": 2})

    def masks(seed):
        seen = []

        def look(module, inputs, output):
            if module.training:
                seen.append((output == 0).numpy().tobytes())

        torch.manual_seed(seed)
        run(
            drop,
            tmp_path / str(seed),
            prepared=lambda job: job.student.head_drop.register_forward_hook(look),
        )
        return seen

    first = masks(1)
    assert len(set(first)) == len(first) == 12
    assert masks(2) == first


def test_weights_follow_their_schedule_also_after_a_resume(tmp_path, taught):
    """Cross-entropy fades, ViTKD sets in; the masks of its generator are random too."""
    vitkd = ViTKD(weight=0, schedule=WeightSchedule(to=1.0), reduction="mean")
    recipe = replace(taught(), objectives={**taught().objectives, "vitkd": vitkd})
    fades = {"to": 0.0, "begin": 0.2, "end": 0.9, "shape": "cosine"}
    jumps = {"to": 2.0, "begin": 0.5, "end": 0.5}
    schedules = {"objectives.ce.schedule": fades, "objectives.kd.schedule": jumps}
    recipe, seen = replace_fields(recipe, schedules), []

    def watch(job):
        job.distillation.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[2]) if module.training else None
        )

    run(recipe, tmp_path / "whole", prepared=watch)
    assert seen == [step / 9 for step in range(9) for _ in range(2)]  # two micro-batches a step
    ends_alike(recipe, tmp_path / "whole", tmp_path / "run", 4)
    lines = {line["step"]: line for line in records(tmp_path / "whole", "train")}
    assert lines[9]["ce"] < 0.1 * lines[2]["ce"] and lines[9]["vitkd"] > lines[2]["vitkd"] > 0
    # Four times the weight from step 5 on, after which 4 of 9 are done.
    assert lines[6]["kd"] > 1.5 * lines[4]["kd"]
    with pytest.raises(ConfigError, match=r"schedule\.to is 1\.0 here and 2\.0 there"):
        run(replace_fields(recipe, {"objectives.kd.schedule.to": 1.0}), tmp_path / "whole")


# -- features -------------------------------------------------------------------------------------


@pytest.fixture
def features(taught):
    """``features(...)``: a student that learns features alone."""
    vitkd = {"vitkd": ViTKD(reduction="mean")}
    return lambda **changes: replace(taught(**changes), objectives=vitkd)


def test_a_teacher_of_other_classes_teaches_features(tmp_path, plain, taught, features):
    other = write_images(tmp_path / "other")
    for folder in [*other.glob("*/*")]:
        folder.rename(folder.with_name(f"other {folder.name}"))
    run(plain(**{"data.dir": str(other)}), tmp_path / "teacher")
    changes = {"teachers.teacher.model": str(tmp_path / "teacher" / "last")}
    with pytest.raises(ConfigError, match="does not know 3 of the data set's 3 classes"):
        run(taught(**changes), tmp_path / "run")
    recipe, lines = features(**changes), []
    objectives = {"ce": taught().objectives["ce"], **recipe.objectives}
    recipe = replace(recipe, objectives=objectives)
    assert run(recipe, tmp_path / "run", lines)["scores"]["top1"] > 0
    assert any(line.endswith("only its features are read") for line in lines)
    assert "teacher: its features are finite and differ from image to image" in lines


def test_a_student_of_features_alone_has_no_classifier_and_is_judged_by_knn(
    tmp_path, images, features
):
    folder, lines = tmp_path / "run", []
    summary = run(features(), folder, lines)
    assert any("no objective trains a classifier" in line for line in lines)
    assert any("the 20 nearest of 48 training images" in line for line in lines)
    assert not any("no gradient reaches" in line for line in lines)
    assert summary["best_top1"] is summary["best_epoch"] is None and not (folder / "best").exists()
    evaluations = records(folder, "eval")
    assert [line["step"] for line in evaluations] == [3, 6, 9]
    assert evaluations[0].keys() == {"kind", "step", "epoch", "num_samples", "knn_top1"}
    assert summary["scores"] == {"num_samples": 21, "knn_top1": evaluations[-1]["knn_top1"]}
    first, *_, last = records(folder, "train")
    assert last["loss"] < first["loss"] and summary["scores"]["knn_top1"] > 0.6
    model = exported(folder)
    assert model.num_classes == 0 and model(torch.zeros(1, 3, 16, 16)).shape == (1, 24)
    spec = replace(input_spec_of(model), crop_pct=1.0)
    bank, queries = (
        EvalLoader(open_source(str(images), split), spec, batch_size=5)
        for split in ("train", "val")
    )
    assert knn_evaluation(model, bank, queries, ALONE) == pytest.approx(summary["scores"])
    tensors = saved(folder, 4)
    assert "distillation.adapters.vitkd.mask_token" in tensors
    assert not any("student.head" in key for key in tensors)
    ends_alike(features(), folder, tmp_path / "again", 4)


def test_features_without_labels_are_not_judged(tmp_path, images, features):
    recipe = features(**{"data.dir": str(flat(images, tmp_path / "flat"))})
    assert run(recipe, tmp_path / "run")["scores"] == {}
    assert records(tmp_path / "run", "eval") == []


# -- compiled networks ----------------------------------------------------------------------------


class _CompilerError(Exception):
    """Of a kind of its own, as compilers raise."""


@pytest.mark.parametrize("error", [_CompilerError, RuntimeError, OSError, ImportError])
@pytest.mark.parametrize("call", [1, 2])
def test_a_compiler_that_fails_does_so_before_a_file_is_written(
    tmp_path, taught, monkeypatch, error, call
):
    """Over the student (1) or its teacher (2)."""
    compiled = count(1)

    def fails(*_):
        raise error("no compiler\nand its log")

    monkeypatch.setattr(torch, "compile", lambda run: fails if next(compiled) == call else run)
    with pytest.raises(ConfigError, match="no compiler") as caught:
        run(taught(**{"train.compile": True}), tmp_path / "run")
    assert caught.value.fixes == (Set("train.compile", False),)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["vit", "cnn"])
def test_the_step_that_compiles_leaves_no_trace(tmp_path, plain, monkeypatch, model):
    """Nor in the running means of BatchNorm."""
    changes = {"student.model": "resnet10t", "student.image_size": 32} if model == "cnn" else {}
    changes |= {"student.model_args": {"channels": [8, 8, 16, 16]}} if model == "cnn" else {}
    monkeypatch.setattr(torch, "compile", lambda run: run)
    for compiled in (False, True):
        run(plain(**changes, **{"train.compile": compiled}), tmp_path / str(compiled))
    assert result(tmp_path / "True") == result(tmp_path / "False")


# -- what is said and logged ----------------------------------------------------------------------


def test_losses_are_logged_weighted_and_not(tmp_path, taught):
    schedule = {"to": 0.0, "begin": 0.0, "end": 1.0}
    recipe = taught(**{"train.log_every": 1, "objectives.ce.schedule": schedule})
    run(recipe, tmp_path / "run")
    lines = records(tmp_path / "run", "train")
    for done, line in enumerate(lines):
        weight = recipe.objectives["ce"].weight_at(done / 9)
        assert line["ce"] == pytest.approx(weight * line["ce_unweighted"], rel=1e-5)
        assert line["kd"] == pytest.approx(0.5 * line["kd_unweighted"], rel=1e-5)
        assert line["loss"] == pytest.approx(line["ce"] + line["kd"], rel=1e-5)


def test_the_summary_knows_the_teachers(whole, teacher):
    summaries = (json.loads((run / "summary.json").read_text()) for run in (whole, teacher))
    assert [summary["teachers"] for summary in summaries] == [{"teacher": 1.0}, {}]


def test_the_bar_moves_every_step_and_names_what_else_is_done(tmp_path, plain, monkeypatch):
    moved, named, update = [], [], Display.update

    def watch(display, task, **changes):
        moved.extend([changes["completed"]] if "completed" in changes else [])
        named.append(changes.get("description"))
        update(display, task, **changes)

    monkeypatch.setattr(Display, "update", watch)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    train(plain(), tmp_path / "run", device="cpu", console=console)
    assert moved == list(range(10)) and named[0].startswith("preparing")
    assert [n for n in named if n and n.startswith("evaluating")][:2] == [
        "evaluating, batch 1",
        "evaluating, batch 2",
    ]
    assert "saving" in named
