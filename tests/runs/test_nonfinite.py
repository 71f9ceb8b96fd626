"""A number that is none stops a run before the step is applied; without the fault the same command
ends as it should.
"""

from dataclasses import replace
from itertools import count

import pytest
import torch
from small_runs import records, result, run, steps_saved, unfinished
from timm.utils import ModelEmaV3
from torch.optim.optimizer import register_optimizer_step_post_hook

from vitdistill.errors import NonFiniteError
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.storage import checkpoint

pytestmark = pytest.mark.whole

LAST = r"is NaN or infinite; last good checkpoint: .*/checkpoints/step-00000004: "


def after(calls, change):
    """A hook that applies ``change`` from the ``calls``-th call on."""
    count = 0

    def hook(value):
        nonlocal count
        count += 1
        return change(value) if count >= calls else value

    return hook


def gradient(job):
    hook = after(5, lambda gradient: gradient * torch.nan)
    job.student.blocks[0].norm2.weight.register_hook(hook)


def loss(job):
    """In the first of two micro-batches of step 4, in one of two terms."""
    hook = after(9, lambda output: output * torch.inf)
    job.student.norm.register_forward_hook(
        lambda module, inputs, output: hook(output) if module.training else output
    )


def answer(job):
    """The preflight, which would refuse it, is over when this is set."""
    hook = after(9, lambda output: output * torch.nan)
    head = job.teachers["teacher"].model.head
    head.register_forward_hook(lambda module, inputs, output: hook(output))


@pytest.mark.parametrize(
    ("fault", "objectives", "match"),
    [
        (gradient, None, r"the gradient of student\.blocks\.0\.norm2\.weight "),
        (loss, None, r"the loss 'ce' .*"),
        (answer, {"kd": SoftKD()}, r"the answer of the teacher \(samples .*"),
        # The objective would not notice: the top class of NaN is a class.
        (answer, {"kd": HardKD()}, r"the answer of the teacher \(samples .*"),
    ],
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_run_stops_before_the_step_and_goes_on(tmp_path, taught, fault, objectives, match, clip):
    accumulate = 1 if fault is gradient else 2
    recipe = taught(**{"optim.clip_grad": clip, "train.accumulate": accumulate})
    if objectives is not None:
        recipe = replace(recipe, objectives=objectives)
    folder = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=match + LAST) as stopped:
        run(recipe, folder, prepared=fault)
    assert "\n" not in str(stopped.value) and stopped.value.exit_code == 70
    assert steps_saved(folder)[-1] == 4
    tensors, _ = checkpoint.load(checkpoint.folder_of(folder, 4))
    assert all(value.isfinite().all() for value in tensors.values())
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    run(recipe, folder)
    run(recipe, tmp_path / "whole")
    assert result(folder) == result(tmp_path / "whole")


def test_the_step_is_named_however_late_it_is_read(tmp_path, plain):
    """At the end of the epoch, where the log is written; nothing of it is saved."""
    recipe = plain(**{"train.log_every": 9, "train.save_every": 3})
    with pytest.raises(NonFiniteError, match=r"^at step 4, the gradient of .*norm2\.weight is"):
        run(recipe, tmp_path / "run", prepared=gradient)
    assert steps_saved(tmp_path / "run") == [3]


def test_float16_that_never_becomes_finite_stops(tmp_path, plain):
    """The scaler leaves out a step that overflows; it may not do so for ever without a word."""

    def broken(job):
        object.__setattr__(job, "amp_dtype", torch.float16)
        job.student.norm.weight.register_hook(lambda gradient: gradient * torch.inf)

    recipe = plain(**{"train.epochs": 20, "train.eval_every": 20, "train.save_every": 60})
    with pytest.raises(NonFiniteError, match=r"the gradient of student\.norm\.weight is NaN"):
        run(recipe, tmp_path / "run", prepared=broken)
    assert all(line["loss_scale"] < 65536 for line in records(tmp_path / "run")[1:])


def test_an_explosion_is_seen_before_it_is_saved(tmp_path, plain):
    recipe = plain(**{"optim.lr": 1e30, "optim.opt": "sgd"})
    with pytest.raises(NonFiniteError, match=r"is NaN or infinite; last good checkpoint: "):
        run(recipe, tmp_path / "run")
    for step in steps_saved(tmp_path / "run"):
        tensors, _ = checkpoint.load(checkpoint.folder_of(tmp_path / "run", step))
        assert all(value.isfinite().all() for value in tensors.values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["weight", "exp_avg", "exp_avg_sq", "ema"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, plain, monkeypatch, part, value):
    """Nor does it take the place of the checkpoint before it; the same command goes on from that."""
    recipe = plain(**{"train.ema_decay": 0.5, "train.keep_checkpoints": 1})
    folder, student, steps = tmp_path / "run", [], count(1)

    @torch.no_grad()
    def spoil(optimizer, *_):
        if next(steps) == 2:
            weight = student[0].norm.weight
            (weight if part == "weight" else optimizer.state[weight][part])[0] = value

    update = ModelEmaV3.update

    def spoil_average(average, *args, step):
        update(average, *args, step=step)
        if step == 2:
            average.module.norm.weight.data[0] = value

    handle = None
    with monkeypatch.context() as patch:
        if part == "ema":
            patch.setattr(ModelEmaV3, "update", spoil_average)
        else:
            handle = register_optimizer_step_post_hook(spoil)
        with pytest.raises(NonFiniteError, match=r"at step 2, .*checkpoint: .*step-00000001"):
            run(recipe, folder, prepared=lambda job: student.append(job.student))
    if handle is not None:
        handle.remove()
    assert steps_saved(folder) == [1]
    run(recipe, folder)
    run(recipe, tmp_path / "whole")
    assert result(folder) == result(tmp_path / "whole")


def test_a_rate_that_no_weight_survives_saves_nothing(tmp_path, plain):
    recipe = plain(**{"optim.lr": 3e38, "optim.warmup_epochs": 0.0})
    with pytest.raises(NonFiniteError, match="last good checkpoint: none"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "last").exists()


def test_a_checkpoint_of_such_a_state_is_passed_over(tmp_path, whole, taught):
    """Earlier versions saved them: the one before is used."""
    folder = unfinished(whole, tmp_path / "run", 5)
    tensors, state = checkpoint.load(checkpoint.folder_of(folder, 5))
    tensors["distillation.student.norm.weight"][0] = torch.nan
    checkpoint.save(folder, 5, tensors, state, keep=99)
    lines = []
    run(taught(), folder, lines)
    assert f"resuming {folder} at step 4 of 9" in lines
    assert result(folder) == result(whole)
