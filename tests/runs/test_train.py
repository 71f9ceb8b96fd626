"""The loop end to end: whatever stops a run, the same command finishes it exactly as if nothing had
happened.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models import create_model

from vitdistill.data.loader import EvalLoader
from vitdistill.data.model_input import input_spec_of
from vitdistill.data.sources.open import open_source
from vitdistill.errors import (
    ConfigError,
    DataError,
    DiskError,
    Drop,
    NonFiniteError,
    Preempted,
)
from vitdistill.evaluate.accuracy import evaluate
from vitdistill.evaluate.knn import knn_evaluation
from vitdistill.methods.base import Objective, WeightSchedule
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.config import TeacherConfig
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.yaml import dump_recipe
from vitdistill.runs.stop import StopRequest
from vitdistill.storage import checkpoint
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit
from vitdistill.weights import export
from vitdistill.world import World

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Folder of the uninterrupted run of ``taught()``, filled by the first test that asks."""
    return tmp_path_factory.mktemp("reference") / "run"


@pytest.fixture
def whole(reference, taught, tools) -> Path:
    if not (reference / "summary.json").exists():
        tools.run(taught(), reference)
    return reference


def unfinished(whole: Path, folder: Path, step: int) -> Path:
    """A copy of the run as it would be had it been killed after the checkpoint of ``step``: logs
    and exports are ahead of that.
    """
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return folder


# -- resuming -------------------------------------------------------------------------------------


def test_a_run_repeats_itself(tmp_path, whole, taught, tools):
    tools.run(taught(), tmp_path / "run")
    assert tools.result(tmp_path / "run") == tools.result(whole)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in records] == [
        ("train", 2), ("train", 3), ("eval", 3), ("train", 4), ("train", 6), ("eval", 6), ("train", 8), ("train", 9), ("eval", 9),
    ]  # fmt: skip
    assert records[0].keys() == {"kind", "step", "epoch", "lr", "ce", "kd", "loss", "grad_norm"}
    assert records[-1]["num_samples"] == 21


def test_an_export_is_proved_once_a_run(tmp_path, plain, tools, monkeypatch):
    proofs, prove = [], export._check_reload
    monkeypatch.setattr(export, "_check_reload", lambda *args: (proofs.append(1), prove(*args))[1])
    tools.run(plain(**{"train.eval_every": 1}), tmp_path / "run")
    assert len(proofs) == 1


@pytest.mark.parametrize("step", range(1, 10))
def test_resumes_from_any_step(tmp_path, whole, taught, tools, step):
    """Steps 3 and 6 end an epoch; 1, 5 and 7 are inside a window of the log; 9 is the last."""
    folder, said = unfinished(whole, tmp_path / "run", step), []
    tools.run(taught(), folder, said)
    assert f"resuming {folder} at step {step} of 9" in said
    assert tools.result(folder) == tools.result(whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, taught, tools, workers):
    """Images that are made one by one in worker processes, also when the number changes in the
    middle of the run.
    """
    slow = {"data.in_memory": False, "data.augment.aa": "rand-m9-mstd0.5-inc1"}
    tools.run(taught(**slow), tmp_path / "whole")
    folder = unfinished(tmp_path / "whole", tmp_path / "run", 4)
    tools.run(taught(**slow, **{"data.workers": workers}), folder)
    assert tools.result(folder) == tools.result(tmp_path / "whole")


def lose_tensors(prefix):
    def lose(tensors, state):
        for key in [key for key in tensors if key.startswith(prefix)]:
            tensors[key] = torch.zeros_like(tensors[key])

    return lose


def lose(key, value):
    return lambda tensors, state: state.__setitem__(key, value)


def lose_moment(name):
    def change(tensors, state):
        for key in [
            key for key in tensors if key.startswith("optimizer.state.") and key.endswith(name)
        ]:
            tensors[key] = torch.zeros_like(tensors[key])

    return change


# Each part of the state: the checkpoint at which it tells, and what is there if it were not saved.
PARTS = {
    "distillation.": (4, lose_tensors("distillation.")),
    "ema.": (4, lose_tensors("ema.")),
    "optimizer.": (4, lose_moment("exp_avg")),
    "optimizer.2": (4, lose_moment("exp_avg_sq")),
    "optimizer.3": (4, lose_moment("step")),
    "step": (4, lose("step", 5)),
    "evaluated_at": (3, lose("evaluated_at", -1)),
    "best": (8, lose("best", None)),
    "best_step": (8, lose("best_step", -1)),
    "scores": (9, lose("scores", {})),
    "seconds": (4, lose("seconds", 1e6)),
    "sums": (5, lose("sums", [[0.0] * 5])),
    "optimizer": (
        4,
        lose("optimizer", {"dict": [["state", {"dict": []}], ["param_groups", {"list": []}]]}),
    ),
    "offsets": (4, lose("offsets", {})),
    "scaler": None,  # see test_float16_resumes_exactly
}


@pytest.mark.parametrize("part", [part for part, how in PARTS.items() if how is not None])
def test_every_part_of_the_state_matters(tmp_path, whole, taught, tools, part):
    step, change = PARTS[part]
    folder = unfinished(whole, tmp_path / "run", step)
    tensors, state = checkpoint.load(checkpoint.folder_of(folder, step))
    change(tensors, state)
    checkpoint.save(folder, step, tensors, state, keep=99)
    try:
        tools.run(taught(), folder)
    except DataError:
        return
    if part == "seconds":
        assert json.loads((folder / "summary.json").read_text())["seconds"] > 1e6
        return
    assert tools.result(folder) != tools.result(whole)


def test_no_part_of_the_state_is_forgotten_here(whole):
    tensors, state = checkpoint.load(checkpoint.folder_of(whole, 4))
    assert {key for key in state} | {key.split(".")[0] + "." for key in tensors} == {
        part for part in PARTS if not part[-1].isdigit()
    }


def test_float16_resumes_exactly(tmp_path, plain, tools):
    """With the scaler of float16, whose scale is lost and found again."""

    def half(job):
        object.__setattr__(job, "amp_dtype", torch.float16)

    recipe = plain()
    tools.run(recipe, tmp_path / "whole", prepared=half)
    folder = unfinished(tmp_path / "whole", tmp_path / "run", 4)
    tools.run(recipe, folder, prepared=half)
    assert tools.result(folder) == tools.result(tmp_path / "whole")
    assert '"loss_scale": 65536.0' in (folder / "metrics.jsonl").read_text()
    other = unfinished(tmp_path / "whole", tmp_path / "other", 4)
    tensors, state = checkpoint.load(checkpoint.folder_of(other, 4))
    state["scaler"]["scale"] = 1024.0
    checkpoint.save(other, 4, tensors, state, keep=99)
    tools.run(recipe, other, prepared=half)
    assert tools.result(other) != tools.result(folder)


def test_float16_that_never_becomes_finite_stops(tmp_path, plain, tools):
    """The scaler leaves out a step that overflows; it may not do so for ever without a word."""

    def broken(job):
        object.__setattr__(job, "amp_dtype", torch.float16)
        job.student.norm.weight.register_hook(lambda gradient: gradient * torch.inf)

    said = []
    with pytest.raises(
        NonFiniteError, match=r"the gradient of student\.norm\.weight is NaN or infinite"
    ):
        tools.run(
            plain(**{"train.epochs": 20, "train.eval_every": 20, "train.save_every": 60}),
            tmp_path / "run",
            said,
            prepared=broken,
        )
    assert "Infinity" not in (tmp_path / "run" / "metrics.jsonl").read_text()


# -- stopping -------------------------------------------------------------------------------------


def signal_from(module, number, calls, training=True):
    """Send this process a signal in the middle of the ``calls``-th forward pass."""
    count = 0

    def hook(
        layer, inputs, output
    ):  # the average of the weights copies it: ask the layer that runs
        nonlocal count
        count += layer.training == training
        if count == calls and layer.training == training:
            os.kill(os.getpid(), number)

    module.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("number", "calls", "saved"),
    [
        (signal.SIGTERM, 1, 1),
        (signal.SIGINT, 8, 4),
        (signal.SIGUSR1, 11, 6),
        (signal.SIGTERM, 18, 9),
    ],
)
def test_a_signal_in_a_step_finishes_it_and_saves(
    tmp_path, whole, taught, tools, number, calls, saved
):
    """Two forward passes a step: the 8th is in step 4. Nothing but the state of that step was saved
    before.
    """
    folder, sparse = tmp_path / "run", taught(**{"train.save_every": 100})
    with pytest.raises(
        Preempted,
        match=(
            rf"stopped by {signal.Signals(number).name} at step {saved} of 9.*: the same command"
            r" resumes"
        ),
    ) as stopped:
        tools.run(sparse, folder, prepared=lambda job: signal_from(job.student.norm, number, calls))
    assert "\n" not in str(stopped.value) and stopped.value.exit_code == 75
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{saved:08d}"]
    assert not (folder / "in_use.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    tools.run(sparse, folder)
    assert tools.result(folder) == tools.result(whole)


def test_a_signal_in_an_evaluation_abandons_it(tmp_path, whole, plain, tools):
    tools.run(plain(), tmp_path / "whole")
    folder = tmp_path / "run"
    with pytest.raises(Preempted, match=r"stopped by SIGTERM at step 3 of 9"):
        # 21 images make 6 batches an evaluation.
        tools.run(
            plain(),
            folder,
            prepared=lambda job: signal_from(job.student.norm, signal.SIGTERM, 2, training=False),
        )
    assert "eval" not in (folder / "metrics.jsonl").read_text()
    tools.run(plain(), folder)
    assert tools.result(folder) == tools.result(tmp_path / "whole")


def test_a_signal_while_saving(tmp_path, whole, taught, tools):
    folder, sent = tmp_path / "run", threading.Event()

    def watch():
        while not sent.is_set():
            if any((folder / "checkpoints").glob(".tmp-*")):
                os.kill(os.getpid(), signal.SIGTERM)
                sent.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(Preempted):
            tools.run(taught(), folder)
    finally:
        sent.set()
        watcher.join()
    tools.run(taught(), folder)
    assert tools.result(folder) == tools.result(whole)


def test_only_a_later_signal_is_a_second_one(tools):
    def work(patience):
        with StopRequest(patience) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.name == "SIGTERM"
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
        return "alive"

    assert tools.Child(lambda: work(60.0)).wait() == "alive"
    impatient = tools.Child(lambda: work(0.01))
    assert impatient.wait() is None and impatient.code == -signal.SIGTERM


def test_the_command_line_leaves_with_75_and_one_sentence(tmp_path, plain, tools):
    """A process of its own, as a user starts it."""
    (tmp_path / "recipe.yaml").write_text(dump_recipe(plain(**{"train.epochs": 5000})))
    folder = tmp_path / "run"
    words = ["train", str(tmp_path / "recipe.yaml"), "--output", str(folder), "--device", "cpu"]
    command = [sys.executable, "-m", "vitdistill.cli", *words]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=tools.environment()
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step 2/"):
            child.send_signal(signal.SIGTERM)
    _, sentence = child.communicate(timeout=60)
    assert child.returncode == 75
    assert (
        sentence.startswith("vitdistill train: stopped by SIGTERM at step ")
        and sentence.count("\n") == 1
    )
    assert checkpoint.latest(folder) is not None


def test_killed_between_and_while_saving(tmp_path, taught, tools):
    """kill -9, by turns after a checkpoint and over one of its files; the run that is left ends as
    if it had not happened.
    """
    recipe = taught(**{"train.epochs": 5, "train.eval_every": 2})
    tools.run(recipe, tmp_path / "whole")
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def work(file, before):
        fsync = os.fsync

        def sync(fd):
            path = os.readlink(f"/proc/self/fd/{fd}")
            if file is not None and path.endswith(file) and ".tmp-" in path:
                die()
            fsync(fd)

        def look(*_):
            if file is None and len(list(checkpoints.glob("step-*"))) > before:
                die()

        os.fsync = sync
        tools.run(recipe, folder, prepared=lambda job: job.distillation.register_forward_hook(look))

    for file in (None, "state.safetensors", None, "state.json", None, "manifest.json"):
        before = len(list(checkpoints.glob("step-*")))
        child = tools.Child(lambda file=file, before=before: work(file, before))
        assert child.wait() is None and child.code == -signal.SIGKILL, (
            "it ended before it was killed"
        )
        assert len(list(checkpoints.glob("step-*"))) == before + (file is None)
        assert file is None or any(checkpoints.glob(f".tmp-*/{file}"))
    said = []
    tools.run(recipe, folder, said)
    assert any(line.startswith(f"resuming {folder} at step ") for line in said)
    assert tools.result(folder) == tools.result(tmp_path / "whole")
    assert not list(folder.rglob(".tmp-*")) and not (folder / ".lock").exists()


# -- what is there already ------------------------------------------------------------------------


def test_a_finished_run_is_not_repeated(whole, taught, tools, images):
    before, said = tools.tree(whole), []
    summary = tools.run(taught(), whole, said)
    assert tools.tree(whole) == before
    assert said == [f"{whole} is finished already: nothing to do"] and summary == json.loads(
        (whole / "summary.json").read_text()
    )


@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_is_refused(tmp_path, whole, taught, tools, finished):
    folder = (
        shutil.copytree(whole, tmp_path / "run")
        if finished
        else unfinished(whole, tmp_path / "run", 4)
    )
    before = tools.tree(folder)
    with pytest.raises(ConfigError, match=r"optim\.lr.*; train\.seed is 7 here and 0 there"):
        tools.run(taught(**{"optim.lr": 0.5, "train.seed": 7}), folder)
    assert tools.tree(folder) == before


def test_other_images_or_another_teacher_are_refused(tmp_path, whole, taught, teacher, tools):
    images = tools.write_images(tmp_path / "images")
    shutil.copytree(teacher, tmp_path / "teacher")
    recipe = replace_fields(
        taught(),
        {"data.dir": str(images), "teachers.teacher.model": str(tmp_path / "teacher" / "last")},
    )
    tools.run(recipe, tmp_path / "run")
    folder = unfinished(tmp_path / "run", tmp_path / "again", 4)
    before = tools.tree(folder)
    extra = images / "train" / "bee" / "extra.png"
    shutil.copy(images / "train" / "bee" / "00.png", extra)
    with pytest.raises(DataError) as caught:
        tools.run(recipe, folder)
    assert caught.value.field == "training images"
    extra.unlink()
    (images / "val" / "bee" / "00.png").rename(images / "val" / "cat" / "zz.png")
    with pytest.raises(DataError) as caught:
        tools.run(recipe, folder)
    assert caught.value.field == "validation images"
    (images / "val" / "cat" / "zz.png").rename(images / "val" / "bee" / "00.png")
    shutil.copytree(whole / "last", tmp_path / "teacher" / "last", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=r"teachers\.teacher\.model has other weights"):
        tools.run(recipe, folder)
    assert tools.tree(folder) == before
    shutil.copytree(teacher / "last", tmp_path / "teacher" / "last", dirs_exist_ok=True)
    tools.run(recipe, folder)
    assert tools.result(folder)["tensors"] == tools.result(tmp_path / "run")["tensors"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, whole, taught, tools):
    folder, said = unfinished(whole, tmp_path / "run", 5), []
    damaged = folder / "checkpoints" / "step-00000005" / "state.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    tools.run(taught(), folder, said)
    assert any(str(damaged.parent) in line and "damaged" in line for line in said)
    assert f"resuming {folder} at step 4 of 9" in said
    assert tools.result(folder) == tools.result(whole)
    assert int(damaged.parent.name.removeprefix("step-")) == 5


def test_a_log_that_was_cut_is_refused(tmp_path, whole, taught, tools):
    folder = unfinished(whole, tmp_path / "run", 8)
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:100])
    before = tools.tree(folder)
    with pytest.raises(DataError, match=r"metrics\.jsonl is not the log"):
        tools.run(taught(), folder)
    assert tools.tree(folder) == before


# -- a full disk ----------------------------------------------------------------------------------


def test_a_disk_that_fills_up_costs_nothing_but_the_work_since(tmp_path, whole, taught, tools):
    folder = unfinished(whole, tmp_path / "run", 4)
    before = tools.tree(folder / "checkpoints")

    def fill(job):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    child = tools.Child(lambda: tools.run(taught(), folder, prepared=fill))
    error = child.wait()
    assert (
        type(error) is DiskError
        and child.code == 74
        and "/checkpoints/" in str(error)
        and "\n" not in str(error)
    )
    assert tools.tree(folder / "checkpoints") == before
    tools.run(taught(), folder)
    assert tools.result(folder) == tools.result(whole)


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, plain, tools, monkeypatch):
    blocks = os.statvfs_result((4096, 4096, 1000, 20, 20, 1000, 1000, 1000, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: blocks)
    with pytest.raises(DiskError, match="the disk is full"):
        tools.run(plain(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# -- numbers that are none ------------------------------------------------------------------------


def stops_and_goes_on(tmp_path, recipe, tools, fault, match):
    """The run stops with a sentence that matches, nothing is lost, and without the fault it ends as
    it should.
    """
    tools.run(recipe, tmp_path / "whole")
    folder = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=match) as stopped:
        tools.run(recipe, folder, prepared=fault)
    assert "\n" not in str(stopped.value) and stopped.value.exit_code == 70
    newest = checkpoint.latest(folder)
    tensors, state = checkpoint.load(newest)
    assert state["step"] == 4 and all(
        bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point()
    )
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    tools.run(recipe, folder)
    assert tools.result(folder) == tools.result(tmp_path / "whole")


def after(calls, change):
    """A hook that applies ``change`` from the ``calls``-th call on."""
    count = 0

    def hook(value):
        nonlocal count
        count += 1
        return change(value) if count >= calls else value

    return hook


LAST = r"is NaN or infinite at step 4; .* last good checkpoint is .*/checkpoints/step-00000004: "


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, plain, tools, clip):
    def fault(job):
        job.student.blocks[0].norm2.weight.register_hook(
            after(5, lambda gradient: gradient * torch.nan)
        )

    match = r"the gradient of student\.blocks\.0\.norm2\.weight " + LAST
    stops_and_goes_on(tmp_path, plain(**{"optim.clip_grad": clip}), tools, fault, match)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, taught, tools):
    """In the first of two micro-batches of step 4, in one of two terms; the whole loss is looked at
    in every one.
    """

    def fault(job):
        hook = after(9, lambda output: output * torch.inf)
        job.student.norm.register_forward_hook(
            lambda module, inputs, output: hook(output) if module.training else output
        )

    stops_and_goes_on(
        tmp_path,
        taught(),
        tools,
        fault,
        r"the loss 'ce' .*" + LAST,
    )


@pytest.mark.parametrize("kind", [SoftKD, HardKD])
def test_a_teacher_that_answers_nonsense_stops_the_run(tmp_path, taught, tools, kind):
    """Also where the objective would not notice: the top class of NaN is a class."""
    base = taught(**{"train.ema_decay": None})
    recipe = type(base)(**{**vars(base), "objectives": {"kd": kind()}})

    def fault(job):
        hook = after(9, lambda output: output * torch.nan)
        # The preflight, which would refuse it, is over when this is set.
        job.teachers["teacher"].model.head.register_forward_hook(
            lambda module, inputs, output: hook(output)
        )

    stops_and_goes_on(
        tmp_path,
        recipe,
        tools,
        fault,
        r"the answer of the teacher \(samples .*" + LAST,
    )


def test_an_explosion_is_seen_before_it_is_saved(tmp_path, plain, tools):
    recipe = plain(**{"optim.lr": 1e30, "optim.opt": "sgd"})
    with pytest.raises(
        NonFiniteError, match=r"the (loss 'ce'|gradient of) .*the last good checkpoint is"
    ):
        tools.run(recipe, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        tensors, _ = checkpoint.load(path)
        assert all(
            bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point()
        )


# -- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_no_loss(tmp_path, plain, tools, accumulate):
    for name, count in (("whole", 1), ("parts", accumulate)):
        tools.run(
            plain(**{"train.accumulate": count, "data.augment.mixup": 0.5, "train.log_every": 1}),
            tmp_path / name,
        )
    whole, parts = tools.losses(tmp_path / "whole"), tools.losses(tmp_path / "parts")
    assert (
        [line["step"] for line in whole] == [line["step"] for line in parts] == list(range(1, 10))
    )
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=2e-5)


def test_the_average_of_the_weights_is_evaluated_and_exported(whole, images):
    tensors, state = checkpoint.load(checkpoint.folder_of(whole, 9))
    exported = load_file(whole / "last" / "model.safetensors")
    student = {
        key.removeprefix("distillation.student."): value
        for key, value in tensors.items()
        if key.startswith("distillation.")
    }
    average = {
        key.removeprefix("ema."): value for key, value in tensors.items() if key.startswith("ema.")
    }
    assert exported.keys() == average.keys() == student.keys()
    assert all(torch.equal(exported[key], average[key]) for key in exported)
    assert any(not torch.equal(exported[key], student[key]) for key in exported)
    model = create_model(f"local-dir:{whole / 'last'}", pretrained=True)
    loader = EvalLoader(open_source(str(images), "val"), input_spec_of(model), batch_size=21)
    assert evaluate(model, loader, World(0, 1, torch.device("cpu"))) == pytest.approx(
        state["scores"], rel=1e-6
    )


def test_the_average_follows_the_weights(tmp_path, plain, tools):
    """ema_1 = w_1 and ema_s = d ema_(s-1) + (1 - d) w_s, over every step."""
    tools.run(plain(**{"train.ema_decay": 0.75, "train.epochs": 2}), tmp_path / "run")
    average = None
    for step in range(1, 7):
        tensors, _ = checkpoint.load(checkpoint.folder_of(tmp_path / "run", step))
        weights = tensors["distillation.student.head.weight"]
        average = weights if average is None else 0.75 * average + 0.25 * weights
        torch.testing.assert_close(tensors["ema.head.weight"], average, rtol=1e-5, atol=1e-7)


def test_the_exported_student_answers_as_timm_builds_it(whole, teacher):
    for folder in (whole / "last", teacher / "last"):
        model = create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert model.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
        batch = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(model(batch), run_vit(model, batch, Needs(logits=True)).logits)


def test_bfloat16_on_a_cpu(tmp_path, taught, tools):
    tools.run(taught(**{"train.amp_dtype": "bfloat16"}), tmp_path / "run")
    tensors, _ = checkpoint.load(checkpoint.folder_of(tmp_path / "run", 9))
    assert tensors["distillation.student.head.weight"].dtype == torch.float32
    assert tools.result(tmp_path / "run")["metrics"] != b""
    folder = unfinished(tmp_path / "run", tmp_path / "again", 5)
    tools.run(taught(**{"train.amp_dtype": "bfloat16"}), folder)
    assert tools.result(folder) == tools.result(tmp_path / "run")


def test_float16_is_refused_on_a_cpu(tmp_path, plain, tools):
    with pytest.raises(ConfigError, match=r"float16 needs a GPU"):
        tools.run(plain(**{"train.amp_dtype": "float16"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def objectives(recipe, **named: Objective):
    return type(recipe)(**{**vars(recipe), "objectives": named, "selector": None})


def test_unlabelled_images_are_learnt_from_the_teacher_alone(tmp_path, images, taught, tools):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (images / "train").rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}{path.name}")
    recipe = taught(**{"data.dir": str(flat)})
    with pytest.raises(ConfigError) as caught:
        tools.run(recipe, tmp_path / "run")
    assert caught.value.field == "data.dir" and Drop("ce") in caught.value.fixes
    recipe = objectives(recipe, kd=SoftKD())
    summary = tools.run(recipe, tmp_path / "run")
    assert summary["best_top1"] is None and summary["scores"] == {}
    model = create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True)
    assert model.num_classes == 3 and model.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]
    first, last = tools.result_losses(tmp_path / "run")
    assert last < first


def test_a_convolutional_teacher_gives_logits_and_no_patches(tmp_path, images, plain, tools):
    cnn = {
        "student.model": "resnet10t",
        "student.model_args": {"channels": [8, 8, 16, 16]},
        "student.image_size": 32,
    }
    summary = tools.run(
        plain(**cnn, **{"optim.lr": 2e-2, "train.epochs": 6, "train.save_every": 18}),
        tmp_path / "cnn",
    )
    assert summary["best_top1"] > 0.9
    config = TeacherConfig(model=str(tmp_path / "cnn" / "best"))
    recipe = plain()
    recipe = objectives(
        type(recipe)(**{**vars(recipe), "teachers": {"teacher": config}}),
        ce=recipe.objectives["ce"],
        kd=SoftKD(),
    )
    said = []
    tools.run(recipe, tmp_path / "kd", said)
    assert any(
        line.startswith("teacher: right on ") and "of 21 validation images (chance 3" in line
        for line in said
    )


def test_a_teacher_of_another_size_and_normalisation(tmp_path, images, plain, tools):
    """Trained at 32 x 32 in patches of 8 with ImageNet's mean; the student sees 16 x 16 in patches
    of 4 with Inception's.
    """
    args = {**tools.VIT, "img_size": 32, "patch_size": 8}
    settings = {
        "student.model": "deit_tiny_patch16_224",
        "student.model_args": args,
        "optim.lr": 5e-3,
        "train.epochs": 8,
    }
    tools.run(plain(**settings), tmp_path / "teacher")
    recipe = plain()
    recipe = type(recipe)(
        **{**vars(recipe), "teachers": {"teacher": TeacherConfig(model=str(tmp_path / "teacher"))}}
    )
    recipe = type(recipe)(**{**vars(recipe), "objectives": {"kd": SoftKD()}})

    def contracts(job):
        assert job.teachers["teacher"].spec.image_size == (
            32,
            32,
        ) and job.networks.spec.image_size == (16, 16)
        assert job.teachers["teacher"].spec.mean != job.networks.spec.mean

    said = []
    tools.run(recipe, tmp_path / "run", said, prepared=contracts)
    assert any("teacher: right on 100.0% of 21" in line for line in said)


def test_a_student_with_a_distillation_token(tmp_path, taught, tools):
    recipe = taught(**{"student.model": "deit_tiny_distilled_patch16_224"})
    recipe = objectives(recipe, ce=recipe.objectives["ce"], hard_kd=HardKD())
    tools.run(recipe, tmp_path / "run")
    model = create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True)
    assert type(model).__name__ == "VisionTransformerDistilled"
    folder = unfinished(tmp_path / "run", tmp_path / "again", 4)
    tools.run(recipe, folder)
    assert tools.result(folder) == tools.result(tmp_path / "run")


def test_what_no_gradient_reaches_is_named_and_kept(tmp_path, plain, tools):
    said = []
    tools.run(plain(**{"student.model": tools.spare_vit()}), tmp_path / "run", said)
    assert "no gradient reaches 1 parameter of the student ('spare'): no objective reads it" in said
    first, _ = checkpoint.load(checkpoint.folder_of(tmp_path / "run", 1))
    last, _ = checkpoint.load(checkpoint.folder_of(tmp_path / "run", 9))
    assert torch.equal(first["distillation.student.spare"], last["distillation.student.spare"])
    assert not torch.equal(
        first["distillation.student.head.weight"], last["distillation.student.head.weight"]
    )


def test_dropout_draws_other_numbers_every_time_and_does_not_ask_the_caller(tmp_path, plain, tools):
    drop = plain(
        **{
            "student.model_args": {**tools.VIT, "drop_rate": 0.5},
            "train.accumulate": 2,
            "train.epochs": 2,
        }
    )

    def masks(seed, name):
        seen = []

        def watch(job):
            hook = lambda module, inputs, output: (
                seen.append((output == 0).numpy().tobytes()) if module.training else None
            )
            job.student.head_drop.register_forward_hook(hook)

        torch.manual_seed(seed)
        tools.run(drop, tmp_path / name, prepared=watch)
        return seen

    first = masks(1, "first")
    assert len(set(first)) == len(first) == 12
    assert masks(2, "second") == first


# -- features, weights that change ----------------------------------------------------------------


def test_weights_follow_their_schedule_also_after_a_resume(tmp_path, taught, tools):
    """Cross-entropy fades, ViTKD sets in; the masks of its generator are random too."""
    base = taught()
    schedules = {
        "objectives.ce.schedule": {"to": 0.0, "begin": 0.2, "end": 0.9, "shape": "cosine"},
        "objectives.kd.schedule": {"to": 2.0, "begin": 0.5, "end": 0.5},
    }
    vitkd = ViTKD(weight=0, schedule=WeightSchedule(to=1.0), reduction="mean")
    recipe = replace_fields(
        type(base)(**{**vars(base), "objectives": {**base.objectives, "vitkd": vitkd}}), schedules
    )
    seen = []

    def watch(job):
        job.distillation.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[2]) if module.training else None
        )

    tools.run(recipe, tmp_path / "whole", prepared=watch)
    assert seen == [step / 9 for step in range(9) for _ in range(2)]  # two micro-batches a step
    for step in (1, 4, 8):
        folder = unfinished(tmp_path / "whole", tmp_path / f"from {step}", step)
        tools.run(recipe, folder)
        assert tools.result(folder) == tools.result(tmp_path / "whole")
    records = [
        json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    ce, kd, vitkd = (
        {r["step"]: r[name] for r in records if r["kind"] == "train"}
        for name in ("ce", "kd", "vitkd")
    )
    assert ce[9] < 0.1 * ce[2] and vitkd[9] > vitkd[2] > 0
    assert kd[6] > 1.5 * kd[4]  # four times the weight from step 5 on, after which 4 of 9 are done
    with pytest.raises(
        ConfigError,
        match=r"objectives\.kd\.schedule\.to is 1\.0 here and 2\.0 there",
    ):
        tools.run(replace_fields(recipe, {"objectives.kd.schedule.to": 1.0}), tmp_path / "whole")


def test_a_teacher_of_other_classes_teaches_features(tmp_path, taught, tools):
    other = tools.write_images(tmp_path / "other")
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            (other / split / name).rename(other / split / f"other {name}")
    base = taught()
    alone = type(base)(
        **{
            **vars(base),
            "teachers": {},
            "objectives": {"ce": base.objectives["ce"]},
            "selector": None,
        }
    )
    tools.run(replace_fields(alone, {"data.dir": str(other)}), tmp_path / "teacher")
    recipe = taught(**{"teachers.teacher.model": str(tmp_path / "teacher" / "last")})
    with pytest.raises(ConfigError, match="does not know 3 of the data set's 3 classes"):
        tools.run(recipe, tmp_path / "run")
    said = []
    recipe = type(recipe)(
        **{
            **vars(recipe),
            "objectives": {"ce": recipe.objectives["ce"], "vitkd": ViTKD(reduction="mean")},
        }
    )
    summary = tools.run(recipe, tmp_path / "run", said)
    assert summary["scores"]["top1"] > 0
    assert any(
        line.startswith("teacher: ") and line.endswith("only its features are read")
        for line in said
    )
    assert "teacher: its features are finite and differ from image to image" in said


def features_alone(taught, **changes):
    base = taught(**changes)
    return type(base)(**{**vars(base), "objectives": {"vitkd": ViTKD(reduction="mean")}})


def test_a_student_of_features_alone_has_no_classifier_and_is_judged_by_knn(
    tmp_path, images, taught, tools
):
    recipe, said = features_alone(taught), []
    summary = tools.run(recipe, tmp_path / "run", said)
    assert (
        "no objective trains the student's classifier: it is built without one, and its features"
        " are judged by k-NN" in said
    )
    assert any(
        line.startswith("evaluations ask the 20 nearest of 48 training images for the class of 21 ")
        for line in said
    )
    assert not any("no gradient reaches" in line for line in said)
    assert (
        summary["best_top1"] is None
        and summary["best_epoch"] is None
        and not (tmp_path / "run" / "best").exists()
    )
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    evaluations = [record for record in records if record["kind"] == "eval"]
    assert [record["step"] for record in evaluations] == [3, 6, 9]
    assert all(
        record.keys() == {"kind", "step", "epoch", "num_samples", "knn_top1"}
        for record in evaluations
    )
    assert summary["scores"] == {"num_samples": 21, "knn_top1": evaluations[-1]["knn_top1"]}
    assert (
        sum(
            "  validation  knn_top1 " in line and "%" in line and "best" not in line
            for line in said
        )
        == 3
    )
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0]
    exported = create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True)
    spec, here = (
        replace(input_spec_of(exported), crop_pct=1.0),
        World(0, 1, torch.device("cpu")),
    )
    bank, queries = (
        EvalLoader(open_source(str(images), split), spec, batch_size=5)
        for split in ("train", "val")
    )
    assert knn_evaluation(exported, bank, queries, here) == pytest.approx(summary["scores"])
    assert summary["scores"]["knn_top1"] > 0.6
    model = create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True)
    assert model.num_classes == 0 and model(torch.zeros(1, 3, 16, 16)).shape == (1, 24)
    tensors, _ = checkpoint.load(checkpoint.folder_of(tmp_path / "run", 4))
    assert "distillation.adapters.vitkd.mask_token" in tensors and not any(
        "student.head" in key for key in tensors
    )
    folder = unfinished(tmp_path / "run", tmp_path / "again", 4)
    tools.run(recipe, folder)
    again, _ = checkpoint.load(checkpoint.latest(folder))
    whole, _ = checkpoint.load(checkpoint.latest(tmp_path / "run"))
    assert again.keys() == whole.keys() and all(
        torch.equal(again[key], whole[key]) for key in whole
    )
    assert (folder / "metrics.jsonl").read_bytes() == (
        tmp_path / "run" / "metrics.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("calls", [3, 15])
def test_a_signal_in_a_knn_evaluation_abandons_it(tmp_path, taught, tools, calls):
    """48 training images make 12 batches, 21 validation images 6: the signal comes in the one or in
    the other.
    """
    recipe = features_alone(taught, **{"train.ema_decay": None})
    tools.run(recipe, tmp_path / "whole")
    folder = tmp_path / "run"
    with pytest.raises(Preempted, match=r"stopped by SIGTERM at step 3 of 9"):
        tools.run(
            recipe,
            folder,
            prepared=lambda job: signal_from(
                job.student.norm, signal.SIGTERM, calls, training=False
            ),
        )
    assert "eval" not in (folder / "metrics.jsonl").read_text()
    tools.run(recipe, folder)
    assert (folder / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()


def test_knn_over_processes_is_that_of_one(tmp_path, taught, tools):
    recipe = features_alone(taught, **{"student.drop_path": 0.0, "train.ema_decay": None})
    alone = tools.run(recipe, tmp_path / "one")
    for answer in tools.ranks(2, lambda rank: tools.run(recipe, tmp_path / "two")):
        assert answer["scores"]["num_samples"] == 21
        assert answer["scores"]["knn_top1"] == pytest.approx(
            alone["scores"]["knn_top1"], abs=1.5 / 21
        )  # rounding may turn one image


def test_features_without_labels_are_not_judged(tmp_path, images, taught, tools):
    flat, said = tmp_path / "flat", []
    flat.mkdir()
    for path in (images / "train").rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}{path.name}")
    summary = tools.run(features_alone(taught, **{"data.dir": str(flat)}), tmp_path / "run", said)
    assert any(
        line.endswith(
            "it is built without one, and the images have no labels to judge its features by"
        )
        for line in said
    )
    assert (
        summary["scores"] == {} and "eval" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    )
