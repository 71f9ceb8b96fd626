"""Between two log lines the host never waits for the device: no step reads a tensor back."""

from dataclasses import replace

import pytest
import torch
from small_runs import records, run
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.dmae import DMAE
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.masking import RandomMasking
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.feed import Feed
from vitdistill.runs.train import Trainer

# What a GPU has to finish its work for: values, and shapes that depend on values.
OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")
OPERATIONS += ("is_nonzero", "bincount", "repeat_interleave")
# What moves values between host and device; on a CPU only Python sees that.
FUNCTIONS = ("item", "tolist", "numpy", "cpu", "tensor", "as_tensor", "from_numpy")


class Reads(TorchDispatchMode):
    """Refuse operations that read a tensor back; ``steps`` counts what was watched."""

    def __init__(self):
        super().__init__()
        self.steps, self.watching = 0, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
        masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if self.watching:
            assert name not in OPERATIONS and not masks, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class Moves(TorchFunctionMode):
    """Refuse functions that move values between host and device, while ``reads`` watches; else those
    that wait until what is sent has arrived, behind all work of the device.
    """

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        sent = name == "to" and any(isinstance(x, torch.device) for x in (*args, *kwargs.values()))
        waits = sent and not kwargs.get("non_blocking")
        if self.reads.watching:
            waits = name in FUNCTIONS
        assert not waits, f"{name} waits for the device"
        return func(*args, **kwargs)


@pytest.fixture
def watch(monkeypatch):
    """Watch every training step; what its next batches are made of may be read, it is the host's."""
    reads, step, fetch = Reads(), Trainer.step, Feed.fetch

    def watched(trainer):
        on_gpu = trainer.world.device.type == "cuda"
        with reads, Moves(reads):
            reads.watching = True
            if on_gpu:
                torch.cuda.set_sync_debug_mode("error")
            try:
                step(trainer)
            finally:
                if on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
        reads.steps += 1

    def unwatched(feed):
        reads.watching = False
        fetch(feed)
        reads.watching = True

    monkeypatch.setattr(Trainer, "step", watched)
    monkeypatch.setattr(Feed, "fetch", unwatched)
    return reads


def recipes(taught):
    """What the steps are of, by name."""
    whole = taught(**{"train.log_every": 4})
    kd = replace(whole, selector=None)
    hidden = {"mae": PixelReconstruction(decoder_dim=16, decoder_depth=1, decoder_num_heads=2)}
    hidden["dmae"] = DMAE(any_teacher=True)
    mixed = {"data.augment.mixup": 0.0, "data.augment.cutmix": 0.0}
    return {
        "alone": replace(kd, objectives={"ce": CrossEntropy()}, teachers={}),
        "kd": replace(kd, objectives={"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)}),
        "maskedkd": replace_fields(whole, {"data.augment.aa": "rand-m9-mstd0.5-inc1"}),
        "vitkd_nkd": replace(
            taught(**mixed),
            selector=None,
            objectives={"ce": CrossEntropy(), "vitkd": ViTKD(), "nkd": NKD()},
        ),
        "mae_dmae": replace(kd, objectives=hidden, masking=RandomMasking(mask_rate=0.5)),
        "float16": replace(kd, train=replace(kd.train, amp_dtype="float16")),
    }


NAMES = ("alone", "kd", "maskedkd", "vitkd_nkd", "mae_dmae", "float16")


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_device(tmp_path, taught, watch, name):
    recipe = recipes(taught)[name]
    run(recipe, tmp_path / "run")
    assert watch.steps == 9 and len(records(tmp_path / "run", "train")) < 9


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0, 2.0]) + x[:2],
    ],
)
def test_what_reads_a_tensor_back_is_seen(read):
    reads, x = Reads(), torch.arange(4.0)
    with reads, Moves(reads), pytest.raises(AssertionError, match="waits for the device"):
        read(x)
    read(x)


def test_what_is_sent_and_waited_for_is_seen():
    reads, x = Reads(), torch.arange(4.0)
    reads.watching = False
    with Moves(reads):
        x.to(torch.device("cpu"), non_blocking=True)
        with pytest.raises(AssertionError, match="waits for the device"):
            x.to(torch.device("cpu"))
