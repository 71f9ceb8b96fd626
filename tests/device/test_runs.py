"""Runs on the device: what is drawn and stored is as on the CPU, and files go from one to the other."""

import copy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from method_cases import Case
from small_runs import (
    DEVICE,
    ends_alike,
    environment,
    in_training,
    losses,
    records,
    result,
    run,
    steps_saved,
    unfinished,
)
from torch.nn.parallel import DistributedDataParallel

from vitdistill.data.augment import Augment
from vitdistill.data.loader import EvalLoader
from vitdistill.data.model_input import input_spec_of
from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, OutOfMemory, Set
from vitdistill.evaluate.accuracy import Metrics, evaluate
from vitdistill.labels.store import LabelStore
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.settings import DataConfig, LabelOptions
from vitdistill.recipes.yaml import dump_recipe
from vitdistill.runs.label import label
from vitdistill.runs.prepare import prepare
from vitdistill.storage import checkpoint
from vitdistill.weights.create import create_model
from vitdistill.world import ALONE, World, choose_device

pytestmark = pytest.mark.whole

CPU = torch.device("cpu")
CPU_HAS_ITS_OWN = pytest.mark.skipif(DEVICE == "cpu", reason="tests/runs shows it on a CPU")
HARD = Augment(crop="rrc", mixup=0.8, cutmix=1.0, reprob=0.5, aa="rand-m9-mstd0.5-inc1")
CALM = {"student.drop_path": 0.0, "train.log_every": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, taught):
    """A run on the device, never stopped, and its recipe; nothing random in the student."""
    folder, recipe = tmp_path_factory.mktemp("whole") / "run", taught(**CALM)
    run(recipe, folder)
    return folder, recipe


def near(ours, theirs, rel):
    for a, b in zip(losses(ours), losses(theirs), strict=True):
        assert a == pytest.approx(b, rel=rel)


# -- images and labels ----------------------------------------------------------------------------


def test_views_and_choices_are_those_of_the_cpu(device, images, taught):
    """Whole numbers exactly, but for pixels that interpolation rounds otherwise: by one, and few."""
    data = DataConfig(dir=str(images), workers=0, augment=HARD, views=2)
    recipe = replace(taught(), data=data)
    here, there = (prepare(recipe, World(0, 1, d), lambda text: None) for d in (CPU, device))
    for mine, theirs in zip(
        here.loaders.train.batches(0, 4), there.loaders.train.batches(0, 4), strict=True
    ):
        for a, b in zip(mine, theirs, strict=True):
            assert b.images.device.type == device.type
            for name in ("labels", "ids", "views", "mixed_labels"):
                assert torch.equal(getattr(a, name), getattr(b, name).cpu()), name
            torch.testing.assert_close(b.lam.cpu(), a.lam)
            off = (a.images - b.images.cpu()).abs()
            assert (off > 1e-4).float().mean() <= 0.02 and off.max() <= 0.05
            assert torch.equal(a.uniforms(7), b.uniforms(7).cpu())


def test_labels_are_those_of_the_cpu(device, tmp_path, taught):
    """In a last batch, smaller than the others, too; and they are read on the other device."""
    changes = {"train.eval_batch_size": 20, "train.accumulate": 1, "data.views": 2}
    recipe = replace(taught(**changes), selector=None)
    options = LabelOptions(encoding="float32", part_size=32)
    found = {}
    for name in ("cpu", DEVICE):
        label(recipe, tmp_path / name, options, device=name)
        store = LabelStore.open(tmp_path / name / "teacher")
        read, present = store.read(np.arange(96) // 48, np.tile(np.arange(48), 2))
        assert present.all()
        found[name] = read["pixels"].tolist(), store.layout.targets(read).logits()
    (pixels, logits), (their_pixels, theirs) = found["cpu"], found[DEVICE]
    assert pixels == their_pixels
    torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-4)
    for name, other in (("cpu", DEVICE), (DEVICE, "cpu")):
        stored = {"teachers.teacher.labels": str(tmp_path / name / "teacher")}
        run(replace_fields(recipe, stored), tmp_path / f"by_{name}", device=other)
        assert records(tmp_path / f"by_{name}", "eval")


def test_batches_that_arrive_are_those_that_were_sent(device, images):
    """By worker processes that begin after the device did, and through pinned memory."""
    source = open_source(str(images), "train")
    spec = input_spec_of(Case("kd").student)
    made = [
        torch.cat([batch.images.sum((1, 2, 3)).cpu() for batch in loader])
        for loader in (
            EvalLoader(source, spec, batch_size=5, world=World(0, 1, CPU)),
            EvalLoader(source, spec, batch_size=5, workers=2, world=World(0, 1, device)),
        )
    ]
    torch.testing.assert_close(made[0], made[1], rtol=1e-3, atol=1e-2)


def test_sums_of_an_evaluation_repeat_themselves(device):
    logits, labels = torch.randn(64, 5, device=device), torch.arange(64, device=device) % 5
    found = []
    for _ in range(2):
        metrics = Metrics(device)
        metrics.update(logits, labels, logits.flip(0))
        found.append(metrics.compute())
    assert found[0] == pytest.approx(found[1], rel=1e-9)


# -- stopped, moved -------------------------------------------------------------------------------


def test_a_killed_run_ends_alike(tmp_path, whole, on_gpu):
    """Bit for bit on a CPU; on a GPU sums in any order change the last bits."""
    folder, recipe = whole
    if not on_gpu:
        ends_alike(recipe, folder, tmp_path / "run", 5)
        return
    before = torch.cuda.memory_allocated()
    run(recipe, unfinished(folder, tmp_path / "run", 5))
    near(folder, tmp_path / "run", rel=1e-3)
    assert torch.cuda.memory_allocated() <= before * 1.05 + 2**20


@CPU_HAS_ITS_OWN
def test_a_killed_run_ends_exactly_alike_where_torch_is_told_to(tmp_path, taught, monkeypatch):
    """Dropout and stochastic depth included."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        run(taught(), tmp_path / "whole")
        ends_alike(taught(), tmp_path / "whole", tmp_path / "run", 4)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("first", "then"), {(DEVICE, "cpu"): 1, ("cpu", DEVICE): 2})
def test_a_run_goes_on_on_another_device(tmp_path, whole, first, then):
    folder, recipe = whole
    if first != DEVICE:
        run(recipe, tmp_path / "whole", device=first)
        folder = tmp_path / "whole"
    lines = []
    run(recipe, unfinished(folder, tmp_path / "run", 4), lines, device=then)
    near(folder, tmp_path / "run", rel=1e-2)
    said = [line for line in lines if line.startswith("the run moves from ")]
    assert len(said) == (first != then)


def test_an_export_answers_alike_on_the_other_device(whole, device, images):
    folder, _ = whole
    logged = records(folder, "eval")[-1]
    source = open_source(str(images), "val")
    for place in (CPU, device):
        model, world = create_model(str(folder / "last")).to(place), World(0, 1, place)
        loader = EvalLoader(source, input_spec_of(model), batch_size=8, world=world)
        scores = evaluate(model, loader, world)
        assert scores["top1"] == pytest.approx(logged["top1"], abs=0.05)
        assert scores["nll"] == pytest.approx(logged["nll"], rel=1e-3)


def test_auto_means_what_it_meant_when_the_run_began(tmp_path, taught):
    """On another device it may mean another precision: what is learnt stays of one kind."""
    recipe, folder, lines = taught(**{"train.amp_dtype": "auto"}), tmp_path / "run", []
    run(recipe, tmp_path / "whole", prepared=lambda job: _compute_in(job, torch.float16))
    begun = unfinished(tmp_path / "whole", folder, 4)
    run(recipe, begun, lines)
    assert any(line.startswith("goes on in float16, as the run began") for line in lines)
    assert checkpoint.load(checkpoint.folder_of(folder, 9))[1]["scaler"] is not None
    if DEVICE == "cpu":
        assert result(folder) == result(tmp_path / "whole")


def _compute_in(job, dtype):
    object.__setattr__(job, "amp_dtype", dtype)


# -- float16 --------------------------------------------------------------------------------------


def test_a_gradient_that_overflows_costs_a_step_and_is_said(tmp_path, taught):
    """Nothing is applied, the scale is halved, and the next step is right."""
    recipe, lines, folder = taught(**CALM, **{"train.amp_dtype": "float16"}), [], tmp_path / "run"

    def overflow(job):
        passes = 0

        def spoil(grad):
            nonlocal passes
            passes += 1
            return grad * torch.inf if passes == 9 else grad  # two micro-batches a step: the 5th

        job.student.head.weight.register_hook(spoil)

    run(recipe, folder, lines, prepared=overflow)
    logged = records(folder, "train")
    scales = [line["loss_scale"] for line in logged]
    skipped = [line["step"] for line in logged if line.get("skipped_steps")]
    assert 5 in skipped and scales[4] == scales[3] / 2
    said = [
        line for line in lines if "1 step of 1 without an update: a gradient overflowed" in line
    ]
    assert len(said) == len(skipped)
    before, after, later = (
        checkpoint.load(checkpoint.folder_of(folder, step))[0] for step in (4, 5, 6)
    )
    learnt = [key for key in before if key.startswith(("distillation.", "optimizer."))]
    assert all(torch.equal(before[key], after[key]) for key in learnt)
    assert not all(torch.equal(after[key], later[key]) for key in learnt)
    assert steps_saved(folder)[-1] == 9


# -- devices and processes ------------------------------------------------------------------------


def test_memory_that_runs_out_is_one_sentence(tmp_path, taught, on_gpu):
    fill = in_training(lambda: torch.empty(2**50, device=DEVICE), 4)
    with pytest.raises(OutOfMemory, match="in a training step of 8 images at once") as caught:
        run(taught(), tmp_path / "run", prepared=fill)
    where = "the memory of the GPU" if on_gpu else "the memory of this machine"
    assert where in str(caught.value) and "\n" not in str(caught.value)
    assert Set("train.batch_size") in caught.value.fixes and steps_saved(tmp_path / "run") == [1]
    run(taught(), tmp_path / "run")


@pytest.mark.parametrize(
    ("gpus", "local", "name", "index"),
    [
        (1, (3, 4), "cuda", 0),  # a scheduler shows each process its own
        (4, (3, 4), "auto", 3),
        (2, (0, 1), "cuda:1", 1),
        (2, (0, 4), "cuda", None),  # too few for all, on every process
        (2, (0, 1), "cuda:2", None),
        (0, (0, 1), "cuda", None),
        (2, (0, 2), "cuda:0", None),  # one for two
    ],
)
def test_which_gpu_a_process_takes(monkeypatch, gpus, local, name, index):
    monkeypatch.setenv("LOCAL_RANK", str(local[0]))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local[1]))
    taken = []
    fakes = {"is_available": lambda: gpus > 0, "device_count": lambda: gpus}
    fakes |= {"set_device": taken.append, "mem_get_info": lambda index: (0, 0)}
    for key, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, key, fake)
    if index is None:
        with pytest.raises(ConfigError) as caught:
            choose_device(name)
        assert caught.value.field == "device" and not taken
    else:
        assert choose_device(name) == torch.device("cuda", index) and taken == [index]
        # What a convolution and a product round to is one choice.
        assert not torch.backends.cudnn.allow_tf32


def test_a_gpu_that_is_busy_is_one_sentence(monkeypatch):
    def refuse(index):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(ConfigError, match="cuda:0 cannot be used ") as caught:
        choose_device("cuda")
    assert "\n" not in str(caught.value)


def test_one_process_of_a_group_takes_the_step_of_one_alone(device, tmp_path):
    """Through DistributedDataParallel, over NCCL on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        case = Case("vitkd", seen="kept")
        for teacher in case.teachers.values():
            teacher.to(device)
        plain = copy.deepcopy(case.module).to(device).eval()
        batch = replace(
            case.batch,
            **{
                name: getattr(case.batch, name).to(device)
                for name in ("images", "labels", "ids", "views")
            },
        )
        grads = []
        for module in (plain, DistributedDataParallel(copy.deepcopy(plain), None)):
            module(batch, case.teachers)["loss"].backward()
            grads.append([p.grad for p in module.parameters()])
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
        total = torch.ones(3, device=device)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0, 1.0] and ALONE.gather("it") == ["it"]
    finally:
        dist.destroy_process_group()


@CPU_HAS_ITS_OWN
def test_torchrun(tmp_path, taught):
    """One GPU, or two, by the real launcher."""
    count = max(torch.cuda.device_count(), 1)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(taught(**CALM, name="run")))
    words = ["train", str(tmp_path / "recipe.yaml"), "--device", DEVICE]
    launch = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={min(count, 2)}"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "vitdistill"]
    command += [*words, "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert records(tmp_path / "run", "eval")[-1]["step"] == 9
