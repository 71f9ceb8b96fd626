"""Several processes are one run: the same samples, views and losses as one process, and they stop
together, whatever one of them meets.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from vitdistill.data.loader import EvalLoader
from vitdistill.data.model_input import input_spec_of
from vitdistill.data.sources.open import open_source
from vitdistill.errors import (
    ConfigError,
    DataError,
    DiskError,
    Give,
    NonFiniteError,
    Preempted,
    UserError,
)
from vitdistill.evaluate.accuracy import evaluate
from vitdistill.recipes.yaml import dump_recipe
from vitdistill.runs.prepare import prepare
from vitdistill.storage import checkpoint
from vitdistill.weights.create import create_model
from vitdistill.world import ProcessLost, World, choose_device, join_world

pytestmark = pytest.mark.whole

# Nothing random in the student, whose draws depend on the number of processes.
CALM = {"student.drop_path": 0.0, "train.log_every": 1, "train.ema_decay": None}


@pytest.fixture(scope="module")
def folder_of_one(tmp_path_factory):
    return tmp_path_factory.mktemp("one") / "run"


@pytest.fixture
def one(folder_of_one, taught, tools):
    """The folder of one process's run."""
    if not (folder_of_one / "summary.json").exists():
        tools.run(taught(**CALM), folder_of_one)
    return folder_of_one


def same_numbers(ours, theirs, rel):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=rel)


# -- the same run ---------------------------------------------------------------------------------


def test_two_processes_see_the_samples_and_views_of_one(taught, tools):
    """Every pixel, label and mixing weight, micro-batches included, in the order of the
    processes.
    """
    recipe = taught()

    def batches(count):
        with join_world("cpu") as here:
            job = prepare(recipe, here, lambda text: None)
            parts = [batch for step in job.loaders.train.batches(1, 4) for batch in step]
        return [(b.ids.tolist(), b.views.tolist(), b.lam.tolist(), b.images.numpy()) for b in parts]

    one, two = batches(1), tools.ranks(2, batches)
    assert len(one) == len(two[0]) == len(two[1]) == 8
    for step in range(4):
        whole = [one[2 * step + i] for i in range(2)]
        parts = [two[rank][2 * step + i] for rank in range(2) for i in range(2)]
        for column in range(3):
            assert [x for batch in whole for x in batch[column]] == [
                x for batch in parts for x in batch[column]
            ]
        images = [torch.from_numpy(batch[3]) for batch in parts]
        assert torch.equal(
            torch.cat([torch.from_numpy(batch[3]) for batch in whole]), torch.cat(images)
        )


@pytest.mark.parametrize(("count", "accumulate"), [(2, 1), (2, 4)])
def test_losses_are_those_of_one_process(tmp_path, one, taught, tools, count, accumulate):
    recipe = taught(**CALM, **{"train.accumulate": accumulate})
    answers = tools.ranks(count, lambda rank: tools.run(recipe, tmp_path / "many"))
    assert [answer["processes"] for answer in answers] == [count] * count
    assert all(answer == answers[0] for answer in answers)
    same_numbers(tools.losses(one), tools.losses(tmp_path / "many"), rel=1e-4)
    a, b = (
        json.loads((folder / "summary.json").read_text()) for folder in (one, tmp_path / "many")
    )
    assert b["scores"]["num_samples"] == 21 and a["scores"] == pytest.approx(b["scores"], rel=1e-4)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_evaluation_is_exact_on_odd_sizes(images, teacher, tools, count):
    """21 images in batches of 4: no process has as many as another, and none is counted twice."""
    model = create_model(str(teacher / "last"))
    with torch.no_grad():
        model.head.weight += 0.3 * torch.randn(
            model.head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    spec = input_spec_of(model)

    def scores(rank):
        with join_world("cpu") as here:
            loader = EvalLoader(
                open_source(str(images), "val"),
                spec,
                batch_size=4,
                world=here,
            )
            return evaluate(model, loader, here)

    alone = evaluate(
        model,
        EvalLoader(open_source(str(images), "val"), spec, batch_size=4),
        World(0, 1, torch.device("cpu")),
    )
    assert alone["num_samples"] == 21 and alone["top1"] < 1.0
    for found in tools.ranks(count, scores):
        assert found == pytest.approx(alone, rel=1e-6)


def test_two_processes_repeat_themselves_and_resume_exactly(tmp_path, taught, tools):
    """Stochastic depth, moving average and micro-batches included; the interruption is in the
    middle of an epoch and of a log window.
    """
    recipe = taught(**{"student.drop_path": 0.3})
    tools.ranks(2, lambda rank: tools.run(recipe, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for step in range(6, 10):
        shutil.rmtree(checkpoint.folder_of(tmp_path / "run", step))
    said = tools.ranks(2, lambda rank: tools.said(recipe, tmp_path / "run"))
    assert f"resuming {tmp_path / 'run'} at step 5 of 9" in said[0] and said[1] == []
    assert tools.result(tmp_path / "run") == tools.result(tmp_path / "whole")


def test_another_number_of_processes_goes_on_with_the_same_samples(tmp_path, one, taught, tools):
    recipe, folder = taught(**CALM), shutil.copytree(one, tmp_path / "run")
    (folder / "summary.json").unlink()
    for step in range(5, 10):
        shutil.rmtree(checkpoint.folder_of(folder, step))
    said = tools.ranks(2, lambda rank: tools.said(recipe, folder))[0]
    assert (
        "this run goes on with processes 1 before, 2 now: same samples and views, numbers may"
        " differ in their last bits" in said
    )
    same_numbers(tools.losses(one), tools.losses(folder), rel=1e-4)


def test_a_parameter_without_a_gradient_does_not_stop_processes(tmp_path, plain, tools):
    recipe = plain(**{"student.model": tools.spare_vit()})
    answers = tools.ranks(2, lambda rank: tools.run(recipe, tmp_path / "run"))
    assert [answer["steps"] for answer in answers] == [9, 9]
    tensors, _ = checkpoint.load(checkpoint.folder_of(tmp_path / "run", 9))
    assert torch.equal(tensors["distillation.student.spare"], torch.ones(3))


# -- stopping together ----------------------------------------------------------------------------


def together(tools, count, work, kind, sentence):
    """Every process leaves by itself, with the same sentence."""
    errors = tools.ranks(count, work)
    assert [type(error) for error in errors] == [kind] * count and len(
        {str(error) for error in errors}
    ) == 1
    assert sentence in str(errors[0]) and "\n" not in str(errors[0])


def broken_images(tmp_path, tools, place):
    root = tools.write_images(tmp_path / "images")
    path = root / place
    path.write_bytes(path.read_bytes()[:-40])
    return {"data.dir": str(root), "data.in_memory": False}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_only_one_process_meets(tmp_path, plain, tools, workers):
    recipe = plain(
        **broken_images(tmp_path, tools, "train/bee/03.png"), **{"data.workers": workers}
    )
    together(tools, 2, lambda rank: tools.run(recipe, tmp_path / "run"), DataError, "bee/03.png")
    assert not (tmp_path / "run" / "in_use.json").exists()


def test_a_validation_image_only_one_process_meets(tmp_path, plain, tools):
    recipe = plain(**broken_images(tmp_path, tools, "val/cat/05.png"))
    together(tools, 2, lambda rank: tools.run(recipe, tmp_path / "run"), DataError, "cat/05.png")


def test_a_validation_image_in_the_preflight(tmp_path, taught, tools):
    recipe = taught(**broken_images(tmp_path, tools, "val/cat/05.png"))
    together(tools, 2, lambda rank: tools.run(recipe, tmp_path / "run"), DataError, "cat/05.png")
    assert not (tmp_path / "run").exists()


def test_a_folder_only_the_first_process_looks_at(tmp_path, plain, tools):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    together(tools, 2, lambda rank: tools.run(plain(), tmp_path / "run"), ConfigError, "thesis.txt")
    shutil.rmtree(tmp_path / "run")
    tools.run(plain(), tmp_path / "run")
    before = tools.tree(tmp_path / "run")
    answers = tools.ranks(2, lambda rank: tools.run(plain(), tmp_path / "run"))
    assert answers[0] == answers[1] == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert tools.tree(tmp_path / "run") == before


def test_a_disk_that_is_full_for_the_process_that_writes(tmp_path, plain, tools):
    def work(rank):
        import resource

        def fill(job):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

        return tools.run(plain(), tmp_path / "run", prepared=fill)

    together(tools, 2, work, DiskError, "/checkpoints/")


def test_a_damaged_state_is_named_once_and_refused_together(tmp_path, plain, tools):
    tools.run(plain(**{"train.save_every": 3}), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    together(
        tools,
        2,
        lambda rank: tools.run(plain(**{"train.save_every": 3}), tmp_path / "run"),
        DataError,
        "none of the checkpoints in ",
    )


def test_a_number_that_is_none_on_one_process(tmp_path, plain, tools):
    """The other process names it too, and not its own share of the gradients."""

    def fault(job):
        job.student.norm.register_forward_hook(
            lambda module, inputs, output: output * torch.nan if module.training else output
        )

    together(
        tools,
        2,
        lambda rank: tools.run(plain(), tmp_path / "run", prepared=fault),
        NonFiniteError,
        "the loss 'ce' (samples",
    )


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path, plain, tools, told):
    endless = {
        "train.epochs": 2000,
        "train.eval_every": 2000,
        "train.save_every": 100_000,
        "train.log_every": 1,
    }
    recipe, folder = plain(**endless), tmp_path / "run"
    children = tools.start_ranks(2, lambda rank: tools.run(recipe, folder))
    tools.until(
        lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size
    )
    children[told].kill(signal.SIGTERM)
    errors = [child.wait() for child in children]
    assert [type(error) for error in errors] == [Preempted] * 2 and [
        child.code for child in children
    ] == [75, 75]
    (saved,) = (folder / "checkpoints").iterdir()
    assert all(
        f"at step {int(saved.name.removeprefix('step-'))} of 6000" in str(error) for error in errors
    )
    assert f"stopped by {('SIGTERM', 'another process')[told]} at" in str(errors[0])


def test_a_process_that_dies_does_not_leave_the_others_hanging(tmp_path, plain, tools):
    recipe, folder = plain(**{"train.epochs": 2000, "train.eval_every": 2000}), tmp_path / "run"
    children = tools.start_ranks(2, lambda rank: tools.run(recipe, folder))
    tools.until(lambda: any((folder / "checkpoints").glob("step-*")))
    children[1].kill()
    error = children[0].wait(30)
    assert children[1].wait() is None
    assert type(error) is ProcessLost and children[0].code == 70
    assert "another process of this run died" in str(error) and "\n" not in str(error)
    assert checkpoint.latest(folder) is not None and not (folder / ".lock").exists()


# -- the world itself -----------------------------------------------------------------------------


def test_meeting(tools):
    def work(rank):
        with join_world("cpu") as here:
            seen = [
                here.any(rank == 1, False),
                here.most(rank * 10),
                here.gather(f"r{rank}"),
                here.from_main(lambda: f"main {rank}"),
            ]
            seen.append(here.mean(torch.tensor([float(rank), 1.0])).tolist())
            with pytest.raises(DataError, match="only I"), here.together():
                if rank == 2:
                    raise DataError("only I")
            with here.together():
                pass
            with pytest.raises(ConfigError, match="main"):
                here.from_main(lambda: (_ for _ in ()).throw(ConfigError("main")))
        assert not dist.is_initialized()
        return seen

    for found in tools.ranks(3, work):
        assert found == [[True, False], 20, ["r0", "r1", "r2"], "main 0", [1.0, 1.0]]
    alone = World(0, 1, torch.device("cpu"))
    assert (
        alone.any(True, False) == [True, False]
        and alone.most(3) == 3
        and alone.from_main(lambda: 5) == 5
    )
    with pytest.raises(UserError, match="mine"):
        alone.agree(UserError("mine"))


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("mps", "gpu", "cuda:x", "meta"):
        with pytest.raises(ConfigError) as caught:
            choose_device(name)
        assert caught.value.field == "device"
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError) as caught:
            choose_device("cuda:3")
        assert caught.value.fixes == (Give("device", "cpu"),)


def test_torchrun(tmp_path, plain, tools):
    """The real launcher: Ctrl-C to the whole group, as a terminal sends it and the launcher once
    more; then on from there.
    """
    recipe = plain(
        **{"name": "run", "train.epochs": 8, "train.eval_every": 8, "train.save_every": 100}
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    folder = tmp_path / "run"
    words = ["train", str(tmp_path / "recipe.yaml"), "--output", str(folder), "--device", "cpu"]
    launch = [
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    ]  # not every host knows an address of its own name
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launch,
        "-m",
        "vitdistill.cli",
        *words,
    ]

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(
        command, env=tools.environment(), start_new_session=True, **pipes
    ) as launcher:
        said = ""
        for line in launcher.stdout:
            said += line
            if line.startswith("step 6/"):
                os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.returncode != 0 and "stopped by SIGINT at step " in said
    newest = checkpoint.latest(folder)
    assert newest is not None and 6 <= int(newest.name.removeprefix("step-")) < 24
    said = tools.ranks(2, lambda rank: tools.said(recipe, folder))[0]
    assert f"resuming {folder} at step {int(newest.name.removeprefix('step-'))} of 24" in said
    tools.run(recipe, tmp_path / "one")
    same_numbers(tools.losses(tmp_path / "one"), tools.losses(folder), rel=2e-3)
