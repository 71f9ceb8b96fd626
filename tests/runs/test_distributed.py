"""Several processes are one run: the same samples, views and losses as one process, and they stop
together, whatever one of them meets.
"""

import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_runs import (
    environment,
    in_training,
    losses,
    ranks,
    result,
    run,
    said,
    spare_vit,
    start_ranks,
    steps_saved,
    tree,
    unfinished,
    until,
    write_images,
)

from vitdistill.data.loader import EvalLoader
from vitdistill.data.model_input import input_spec_of
from vitdistill.data.sources.decode import DamagedImage
from vitdistill.data.sources.open import open_source
from vitdistill.errors import (
    ConfigError,
    DataError,
    DiskError,
    NonFiniteError,
    OutOfMemory,
    Preempted,
)
from vitdistill.evaluate.accuracy import evaluate
from vitdistill.recipes.yaml import dump_recipe
from vitdistill.storage import checkpoint
from vitdistill.weights.create import create_model
from vitdistill.world import ALONE, ProcessLost, check_own_gpus, choose_device, join_world

pytestmark = pytest.mark.whole

# Nothing random in the student, whose draws depend on the number of processes.
CALM = {"student.drop_path": 0.0, "train.log_every": 1, "train.ema_decay": None}
ENDLESS = {"train.epochs": 2000, "train.eval_every": 2000, "train.log_every": 1}


@pytest.fixture(scope="module")
def one(tmp_path_factory, taught):
    """The folder of one process's run, and its summary."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, run(taught(**CALM), folder)


def same_losses(ours, theirs, rel=1e-4):
    for a, b in zip(losses(ours), losses(theirs), strict=True):
        assert a == pytest.approx(b, rel=rel)


# -- the same run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
def test_losses_are_those_of_one_process(tmp_path, one, taught, accumulate):
    recipe = taught(**CALM, **{"train.accumulate": accumulate})
    first, second = ranks(2, lambda rank: run(recipe, tmp_path / "many"))
    assert first == second and first["processes"] == 2 and first["scores"]["num_samples"] == 21
    same_losses(one[0], tmp_path / "many")
    assert first["scores"] == pytest.approx(one[1]["scores"], rel=1e-4)


def test_two_processes_repeat_themselves_and_resume_exactly(tmp_path, taught):
    """Stochastic depth, moving average and micro-batches included; the interruption is in the
    middle of an epoch and of a log window.
    """
    recipe = taught()
    ranks(2, lambda rank: run(recipe, tmp_path / "whole"))
    folder = unfinished(tmp_path / "whole", tmp_path / "run", 5)
    first, second = ranks(2, lambda rank: said(recipe, folder))
    assert f"resuming {folder} at step 5 of 9" in first and second == []
    assert result(folder) == result(tmp_path / "whole")


def test_another_number_of_processes_goes_on_with_the_same_samples(tmp_path, one, taught):
    recipe, folder = taught(**CALM), unfinished(one[0], tmp_path / "run", 4)
    lines = ranks(2, lambda rank: said(recipe, folder))[0]
    assert f"resuming {folder} at step 4 of 9" in lines
    same_losses(one[0], folder)


def test_a_parameter_without_a_gradient_does_not_stop_processes(tmp_path, plain):
    recipe = plain(**{"student.model": spare_vit()})
    answers = ranks(2, lambda rank: run(recipe, tmp_path / "run"))
    assert [answer["steps"] for answer in answers] == [9, 9]
    tensors, _ = checkpoint.load(checkpoint.folder_of(tmp_path / "run", 9))
    assert torch.equal(tensors["distillation.student.spare"], torch.ones(3))


@pytest.mark.parametrize("ema", [None, 0.6])
def test_a_student_with_batch_statistics_is_scored_as_it_is_exported(tmp_path, images, plain, ema):
    """Each process has seen other images, and one of them writes the weights."""
    small = {"student.model": "resnet10t", "student.model_args": {"channels": [8, 8, 16, 16]}}
    recipe = plain(**small, **{"train.ema_decay": ema, "train.save_every": 100})
    scores = ranks(2, lambda rank: run(recipe, tmp_path / "run"))[0]["scores"]
    model = create_model(str(tmp_path / "run" / "last"))
    loader = EvalLoader(open_source(str(images), "val"), input_spec_of(model), batch_size=8)
    assert scores == pytest.approx(evaluate(model, loader, ALONE), rel=1e-5)


# -- stopping together ----------------------------------------------------------------------------


def together(recipe, folder, kind, sentence, prepared=None):
    """Both processes leave by themselves, with the same sentence."""
    errors = ranks(2, lambda rank: run(recipe, folder, prepared=prepared))
    assert [type(error) for error in errors] == [kind] * 2
    assert str(errors[0]) == str(errors[1]) and "\n" not in str(errors[0])
    assert sentence in str(errors[0])


@pytest.mark.parametrize(
    ("place", "fields"),
    [
        ("train/bee/03.png", {"data.in_memory": False}),
        ("train/bee/03.png", {"data.in_memory": False, "data.workers": 1}),
        ("val/cat/05.png", {}),
    ],
)
@pytest.mark.parametrize("preflight", [False, True])
def test_an_image_only_one_process_meets(tmp_path, plain, taught, place, fields, preflight):
    path = write_images(tmp_path / "images") / place
    path.write_bytes(path.read_bytes()[:-40])
    recipe = (taught if preflight else plain)(**fields, **{"data.dir": str(tmp_path / "images")})
    together(recipe, tmp_path / "run", DamagedImage, place[-10:])
    assert (tmp_path / "run").exists() != (preflight and place[:3] == "val")


def test_a_folder_only_the_first_process_looks_at(tmp_path, plain, taught, whole):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    together(plain(), tmp_path / "run", ConfigError, "thesis.txt")
    before = tree(whole)
    first, second = ranks(2, lambda rank: run(taught(), whole))
    assert first == second and first["steps"] == 9 and tree(whole) == before


def test_a_disk_that_is_full_for_the_process_that_writes(tmp_path, plain):
    def fill(job):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    together(plain(), tmp_path / "run", DiskError, "/checkpoints/", prepared=fill)


def test_a_damaged_state_is_refused_together(tmp_path, whole, taught):
    folder = unfinished(whole, tmp_path / "run", 3)
    for path in (folder / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    together(taught(), folder, DataError, "none of the checkpoints in ")


def test_a_number_that_is_none_on_one_process(tmp_path, plain):
    """The other process names it too, and not its own share of the gradients."""

    def fault(job):
        job.student.norm.register_forward_hook(
            lambda module, inputs, output: output * torch.nan if module.training else output
        )

    together(plain(), tmp_path / "run", NonFiniteError, "the loss 'ce' (samples", prepared=fault)


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path, plain, told):
    folder, recipe = tmp_path / "run", plain(**ENDLESS, **{"train.save_every": 100_000})
    children = start_ranks(2, lambda rank: run(recipe, folder))
    until(lambda: (folder / "metrics.jsonl").exists() and losses(folder))
    children[told].kill(signal.SIGTERM)
    errors = [child.wait() for child in children]
    assert [type(error) for error in errors] == [Preempted] * 2
    assert [child.code for child in children] == [75, 75]
    (saved,) = steps_saved(folder)
    assert all(f"at step {saved} of 6000" in str(error) for error in errors)
    assert f"stopped by {('SIGTERM', 'another process')[told]} at" in str(errors[0])


def test_a_process_that_dies_does_not_leave_the_others_hanging(tmp_path, plain):
    recipe, folder = plain(**ENDLESS), tmp_path / "run"
    children = start_ranks(2, lambda rank: run(recipe, folder))
    until(lambda: steps_saved(folder))
    children[1].kill()
    error = children[0].wait(30)
    assert children[1].wait() is None
    assert type(error) is ProcessLost and children[0].code == 70
    assert "another process of this run died" in str(error) and "\n" not in str(error)
    assert checkpoint.load_latest(folder) is not None and not (folder / ".lock").exists()


def test_memory_that_ends_on_one_process_leaves_no_other_waiting(tmp_path, plain):
    def allocate():
        torch.empty(2**50)

    stop = in_training(allocate, 3)  # the process that is told of what is prepared: the first
    errors = ranks(2, lambda rank: run(plain(**ENDLESS), tmp_path / "run", prepared=stop))
    assert [type(error) for error in errors] == [OutOfMemory, ProcessLost]


def test_processes_that_share_a_gpu_are_refused_on_each(monkeypatch):
    """Where each sees one GPU alone, only their names tell whether it is the same."""

    def meet(rank, names):
        fakes = {"is_available": lambda: True, "device_count": lambda: 1}
        fakes |= {"set_device": lambda index: None, "mem_get_info": lambda index: None}
        fakes["get_device_properties"] = lambda device: SimpleNamespace(uuid=names[rank])
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        with join_world("cpu") as cpu:
            check_own_gpus(replace(cpu, device=choose_device("cuda")))
        return "apart"

    assert ranks(2, lambda rank: meet(rank, "ab")) == ["apart"] * 2
    for error in ranks(2, lambda rank: meet(rank, "aa")):
        assert isinstance(error, ConfigError) and "2 processes share 1 GPU" in str(error)


def test_torchrun(tmp_path, plain):
    """The real launcher: Ctrl-C to the whole group, as a terminal sends it and the launcher once
    more; then on from there.
    """
    changes = {"train.epochs": 8, "train.eval_every": 8, "train.save_every": 100}
    recipe, folder = plain(name="run", **changes), tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    words = ["train", str(tmp_path / "recipe.yaml"), "--output", str(folder), "--device", "cpu"]
    # Not every host knows an address of its own name.
    launch = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "vitdistill"]
    with subprocess.Popen(
        [*command, *words],
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        printed = ""
        assert launcher.stdout is not None
        for line in launcher.stdout:
            printed += line
            if line.startswith("step 6/"):
                os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.returncode != 0 and "stopped by SIGINT at step " in printed
    (step,) = steps_saved(folder)
    assert 6 <= step < 24
    lines = ranks(2, lambda rank: said(recipe, folder))[0]
    assert f"resuming {folder} at step {step} of 24" in lines
    run(recipe, tmp_path / "one")
    same_losses(tmp_path / "one", folder, rel=2e-3)
