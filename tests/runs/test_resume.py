"""Whatever stops a run, the same command finishes it exactly as if nothing had happened."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from small_runs import (
    Child,
    ends_alike,
    in_training,
    records,
    result,
    run,
    said,
    send,
    steps_saved,
    tree,
    unfinished,
    until,
    write_images,
)

from vitdistill.cli import main
from vitdistill.errors import ConfigError, DataError, DiskError, Preempted
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.yaml import dump_recipe
from vitdistill.runs.stop import StopRequest
from vitdistill.storage import checkpoint
from vitdistill.storage.atomic import sha256_file

pytestmark = pytest.mark.whole

HALF = {"prepared": lambda job: object.__setattr__(job, "amp_dtype", torch.float16)}
BFLOAT16 = {"train.amp_dtype": "bfloat16"}
# Images that are made one by one, in worker processes if there are any.
ONE_BY_ONE = {"data.in_memory": False, "data.augment.aa": "rand-m9-mstd0.5-inc1"}


@pytest.mark.parametrize("step", [1, 3, 5, 9])
def test_resumes_from_any_step(tmp_path, whole, taught, step):
    """Step 3 ends an epoch; 1 and 5 are inside a window of the log; 9 is the last."""
    ends_alike(taught(), whole, tmp_path / "run", step)


@pytest.mark.parametrize(
    ("before", "now", "options"),
    [(ONE_BY_ONE, {"data.workers": 2}, {}), (BFLOAT16, {}, {}), ({}, {}, HALF)],
    ids=["workers", "bfloat16", "float16"],
)
def test_resumes_with_other_workers_and_in_any_precision(tmp_path, taught, before, now, options):
    run(taught(**before), tmp_path / "whole", **options)
    ends_alike(taught(**before, **now), tmp_path / "whole", tmp_path / "run", 4, **options)
    tensors, state = checkpoint.load(checkpoint.folder_of(tmp_path / "run", 9))
    assert tensors["distillation.student.head.weight"].dtype == torch.float32
    assert (state["scaler"] is not None) == (options is HALF)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_convolutional_student_resumes(tmp_path, plain, optimizer):
    """Its weights and their moments are channels last, which a reduction's order depends on."""
    network = {"student.model": "mobilenetv3_small_050", "student.model_args": {}}
    recipe = plain(**network, **{"optim.opt": optimizer, "train.epochs": 2})

    def watch(job):
        kernels = [p for p in job.student.parameters() if p.ndim == 4 and p.shape[2] > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)

    run(recipe, tmp_path / "whole", prepared=watch)
    ends_alike(recipe, tmp_path / "whole", tmp_path / "run", 4)


# -- every part of the state ----------------------------------------------------------------------


def zero(prefix, suffix=""):
    def change(tensors, state):
        for key in tensors:
            if key.startswith(prefix) and key.endswith(suffix):
                tensors[key] = torch.zeros_like(tensors[key])

    return change


def lose(key, value):
    return lambda tensors, state: state.__setitem__(key, value)


EMPTY = {"dict": [["state", {"dict": []}], ["param_groups", {"list": []}]]}
# Each part of the state: the checkpoint at which it tells, and what is there if it were not saved.
PARTS = {
    "distillation.": (4, zero("distillation.")),
    "ema.": (4, zero("ema.")),
    "optimizer.": (4, zero("optimizer.state.", "exp_avg")),
    "optimizer.2": (4, zero("optimizer.state.", "exp_avg_sq")),
    "optimizer.3": (4, zero("optimizer.state.", "step")),
    "step": (4, lose("step", 5)),
    "evaluated_at": (3, lose("evaluated_at", -1)),
    "best": (8, lose("best", [2.0, 0.0])),
    "scores": (9, lose("scores", {})),
    "seconds": (4, lose("seconds", 1e6)),
    "sums": (5, lose("sums", [[0.0] * 5])),
    "optimizer": (4, lose("optimizer", EMPTY)),
    "offsets": (4, lose("offsets", {})),
    "scaler": (4, lambda tensors, state: state["scaler"].update(scale=1024.0)),
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_state_matters(tmp_path, whole, taught, part):
    step, change = PARTS[part]
    options = {}
    if part == "scaler":
        whole, options = tmp_path / "whole", HALF
        run(taught(), whole, **options)
    folder = unfinished(whole, tmp_path / "run", step)
    tensors, state = checkpoint.load(checkpoint.folder_of(folder, step))
    change(tensors, state)
    checkpoint.save(folder, step, tensors, state, keep=99)
    try:
        run(taught(), folder, **options)
    except DataError:
        return
    if part == "seconds":
        assert json.loads((folder / "summary.json").read_text())["seconds"] > 1e6
    else:
        assert result(folder) != result(whole)


def test_no_part_of_the_state_is_forgotten_here(whole):
    tensors, state = checkpoint.load(checkpoint.folder_of(whole, 4))
    known = {part for part in PARTS if not part[-1].isdigit()}
    known.add("best_step")  # every evaluation of this run is its best: a test of equal ones has it
    assert {*state} | {key.split(".")[0] + "." for key in tensors} == known


# -- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "calls", "saved"),
    [
        (signal.SIGTERM, 1, 1),
        (signal.SIGHUP, 8, 4),
        (signal.SIGUSR1, 11, 6),
        (signal.SIGINT, 18, 9),
    ],
)
def test_a_signal_in_a_step_finishes_it_and_saves(tmp_path, whole, taught, number, calls, saved):
    """Two forward passes a step: the 11th is in step 6. Nothing but the state of that step was
    saved before.
    """
    folder, sparse = tmp_path / "run", taught(**{"train.save_every": 100})
    name = signal.Signals(number).name
    with pytest.raises(Preempted, match=rf"stopped by {name} at step {saved} of 9") as stopped:
        run(sparse, folder, prepared=in_training(send(number), calls))
    assert "\n" not in str(stopped.value) and stopped.value.exit_code == 75
    assert steps_saved(folder) == [saved]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(sparse, folder)
    assert result(folder) == result(whole)


@pytest.mark.parametrize(("features", "batch"), [(False, 2), (True, 3), (True, 15)])
def test_a_signal_in_an_evaluation_abandons_it(tmp_path, taught, features, batch):
    """k-NN reads 48 training images in 12 batches and 21 validation images in 6: the signal comes
    in the one or in the other.
    """
    recipe = taught(**{"train.ema_decay": None})
    if features:
        recipe = replace(recipe, objectives={"vitkd": ViTKD(reduction="mean")})
    folder = tmp_path / "run"
    stop = in_training(send(signal.SIGTERM), batch, training=False)
    with pytest.raises(Preempted, match=r"stopped by SIGTERM at step 3 of 9"):
        run(recipe, folder, prepared=stop)
    assert records(folder, "eval") == []
    run(recipe, folder)
    run(recipe, tmp_path / "whole")
    assert result(folder) == result(tmp_path / "whole")


def test_only_a_later_signal_is_a_second_one():
    def work(patience):
        with StopRequest(patience) as stop:
            send(signal.SIGTERM)()
            assert stop.name == "SIGTERM"
            time.sleep(0.05)
            send(signal.SIGTERM)()
        return "alive"

    assert Child(lambda: work(60.0)).wait() == "alive"
    impatient = Child(lambda: work(0.01))
    assert impatient.wait() is None and impatient.code == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_nohup_or_a_shell_ignores_stays_ignored(number):
    def work():
        signal.signal(number, signal.SIG_IGN)
        with StopRequest() as stop:
            send(number)()
        return bool(stop), signal.getsignal(number) == signal.SIG_IGN

    assert Child(work).wait() == (False, True)


def test_the_command_line_leaves_with_75_and_one_sentence(tmp_path, plain):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(plain(**{"train.epochs": 5000})))
    folder, text = tmp_path / "run", io.StringIO()

    def work():
        words = ["train", str(tmp_path / "recipe.yaml"), "--output", str(folder)]
        with contextlib.redirect_stderr(text):
            return main([*words, "--device", "cpu"]), text.getvalue()

    child = Child(work)
    until(lambda: steps_saved(folder))
    child.kill(signal.SIGTERM)
    code, sentence = child.wait()
    assert code == 75 and sentence.count("\n") == 1
    assert sentence.startswith("vitdistill train: stopped by SIGTERM at step ")
    assert checkpoint.load_latest(folder) is not None


def test_killed_between_and_while_saving(tmp_path, taught):
    """kill -9, by turns after a checkpoint and over one of its files; the run that is left ends as
    if it had not happened.
    """
    recipe = taught(**{"train.epochs": 5, "train.eval_every": 2})
    run(recipe, tmp_path / "whole")
    folder = tmp_path / "run"

    def work(file, before):
        fsync = os.fsync

        def sync(fd):
            path = os.readlink(f"/proc/self/fd/{fd}")
            if file is not None and path.endswith(file) and ".tmp-" in path:
                send(signal.SIGKILL)()
            fsync(fd)

        def look(*_):
            if file is None and len(steps_saved(folder)) > before:
                send(signal.SIGKILL)()

        os.fsync = sync
        run(recipe, folder, prepared=lambda job: job.distillation.register_forward_hook(look))

    for file in (None, "state.safetensors", None, "state.json", None, "manifest.json"):
        before = len(steps_saved(folder))
        child = Child(lambda file=file, before=before: work(file, before))
        assert child.wait() is None and child.code == -signal.SIGKILL, "it ended before"
        assert len(steps_saved(folder)) == before + (file is None)
        assert file is None or any((folder / "checkpoints").glob(f".tmp-*/{file}"))
    run(recipe, folder)
    assert result(folder) == result(tmp_path / "whole")
    assert not list(folder.rglob(".tmp-*")) and not (folder / ".lock").exists()


# -- what is there already ------------------------------------------------------------------------


def test_a_finished_run_is_not_repeated(whole, taught):
    before = tree(whole)
    assert said(taught(), whole) == [f"{whole} is finished already: nothing to do"]
    assert tree(whole) == before


def test_other_images_or_another_teacher_are_refused(tmp_path, whole, taught, teacher):
    images = write_images(tmp_path / "images")
    shutil.copytree(teacher, tmp_path / "teacher")
    moved = {"data.dir": str(images), "teachers.teacher.model": str(tmp_path / "teacher" / "last")}
    recipe = replace_fields(taught(), moved)
    run(recipe, tmp_path / "run")
    folder = unfinished(tmp_path / "run", tmp_path / "again", 4)
    before = tree(folder)
    for split in ("training", "validation"):
        extra = images / {"training": "train", "validation": "val"}[split] / "bee" / "extra.png"
        shutil.copy(images / "val" / "bee" / "00.png", extra)
        with pytest.raises(DataError) as caught:
            run(recipe, folder)
        assert caught.value.field == f"{split} images"
        extra.unlink()
    shutil.copytree(whole / "last", tmp_path / "teacher" / "last", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=r"teachers\.teacher\.model has other weights"):
        run(recipe, folder)
    assert tree(folder) == before
    shutil.copytree(teacher / "last", tmp_path / "teacher" / "last", dirs_exist_ok=True)
    run(recipe, folder)
    assert result(folder) == result(tmp_path / "run")


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, whole, taught):
    folder = unfinished(whole, tmp_path / "run", 5)
    damaged = folder / "checkpoints" / "step-00000005" / "state.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    lines = said(taught(), folder)
    assert any(str(damaged.parent) in line and "damaged" in line for line in lines)
    assert f"resuming {folder} at step 4 of 9" in lines
    assert result(folder) == result(whole)


def test_a_log_that_was_cut_is_refused(tmp_path, whole, taught):
    folder = unfinished(whole, tmp_path / "run", 8)
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:100])
    before = tree(folder)
    with pytest.raises(DataError, match=r"metrics\.jsonl is not the log"):
        run(taught(), folder)
    assert tree(folder) == before


# -- a full disk ----------------------------------------------------------------------------------


def test_a_disk_that_fills_up_costs_nothing_but_the_work_since(tmp_path, whole, taught):
    folder = unfinished(whole, tmp_path / "run", 4)
    before = tree(folder / "checkpoints")

    def fill(job):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    child = Child(lambda: run(taught(), folder, prepared=fill))
    error = child.wait()
    assert type(error) is DiskError and child.code == 74
    assert "/checkpoints/" in str(error) and "\n" not in str(error)
    assert tree(folder / "checkpoints") == before
    run(taught(), folder)
    assert result(folder) == result(whole)


@pytest.mark.parametrize(("smoothing", "best"), [(0.0, 3), (0.9, 1)])
def test_of_equal_accuracies_the_most_certain_is_best_after_a_resume_too(
    tmp_path, plain, teacher, smoothing, best
):
    changes = {"student.model": str(teacher), "student.model_args": {}, "optim.lr": 1e-3}
    recipe, folder = plain(**changes, **{"objectives.ce.smoothing": smoothing}), tmp_path / "run"
    assert run(recipe, folder)["best_epoch"] == best
    assert {line["top1"] for line in records(folder, "eval")} == {1.0}
    ends_alike(recipe, folder, tmp_path / "resumed", 5)


def test_a_finished_run_is_trained_longer_by_one_command(tmp_path, whole, capsys):
    """A new run, from its weights and with its recipe; it is left as it was."""
    before, new = tree(whole), tmp_path / "longer"
    words = f"train {whole} --model {whole} --epochs 2 --output {new} --device cpu"
    assert main(words.split()) == 0
    assert "next: vitdistill eval" in capsys.readouterr().out and tree(whole) == before
    first = json.loads((new / "identity.json").read_text())["student.model"]
    assert first == sha256_file(whole / "best" / "model.safetensors")
    assert records(new, "eval")[0]["top1"] >= 0.9 and steps_saved(new)[-1] == 6
