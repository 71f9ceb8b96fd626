"""An optimizer's state goes through a checkpoint bit for bit, and training goes on the same."""

import json
import math
from pathlib import Path

import pytest
import timm.optim
import torch

from vitdistill.errors import DataError
from vitdistill.storage import checkpoint
from vitdistill.storage.optimizer import pack_optimizer, unpack_optimizer


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.LazyLinear(5))


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


OPTIMIZERS = {
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "groups": lambda p: torch.optim.AdamW(
        [{"params": p[:2], "lr": 0.1, "lr_scale": 0.5}, {"params": p[2:], "name": "x"}]
    ),
    **{
        name: lambda p, name=name: timm.optim.create_optimizer_v2(p, opt=name, lr=0.01)
        for name in ("lamb", "lion", "nadamw", "adafactor", "rmsproptf", "madgrad", "muon")
    },
}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_identical(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert bits(a) == bits(b)
    elif isinstance(a, dict | list | tuple):
        a, b = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (a, b))
        assert list(a) == list(b)
        for key in a:
            assert_identical(a[key], b[key])
    else:
        assert repr(a) == repr(b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_survives_bit_for_bit(tmp_path, name, layout):
    def fresh():
        model = network()
        model(torch.zeros(1, 3, 8, 8))
        torch.manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model = model.to(memory_format=layout)
        return model, OPTIMIZERS[name](list(model.parameters()))

    model, optimizer = fresh()
    for seed in range(3):
        step(model, optimizer, seed)
    tensors, structure = pack_optimizer(optimizer.state_dict())
    json.dumps(structure)
    weights = {f"model.{k}": v for k, v in model.state_dict().items()}
    loaded, state = checkpoint.load(
        checkpoint.save(tmp_path, 3, {**weights, **tensors}, {"optimizer": structure})
    )
    restored = unpack_optimizer(loaded, state["optimizer"])
    assert_identical(restored, optimizer.state_dict())

    resumed, second = fresh()
    resumed.load_state_dict({k: loaded[f"model.{k}"] for k in model.state_dict()})
    second.load_state_dict(restored)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(resumed, second, seed)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert bits(a) == bits(b)


def test_odd_values_survive_packing():
    odd = {
        "state": {
            0: {"s": torch.ones(2).bfloat16(), "n": None, "t": (1, [2.5, (True,)], "x"), "e": {}}
        },
        "param_groups": [{"params": [0], "betas": (0.9, 0.999), "nan": math.nan, "big": 2**70}],
    }
    tensors, structure = pack_optimizer(odd)
    assert list(tensors) == ["optimizer.state.0.s"]
    assert_identical(unpack_optimizer(tensors, json.loads(json.dumps(structure))), odd)
    with pytest.raises(DataError, match=r"state\.0\.s"):
        unpack_optimizer({}, structure)
    with pytest.raises(TypeError, match="set"):
        pack_optimizer({"state": {0: {"x": {1}}}})


def test_a_checkpoint_of_the_first_format_resumes(tmp_path):
    """``golden/`` was saved before the library's serialiser was used: AdamW after a step at ones."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    saved = checkpoint.load_latest(Path(__file__).with_name("golden"), pytest.fail)
    assert saved is not None
    folder, (tensors, state) = saved
    assert tensors["half"].tolist() == [0, 1, 2] and tensors["count"].item() == 7
    model.load_state_dict({key: tensors[f"model.{key}"] for key in model.state_dict()})
    optimizer.load_state_dict(unpack_optimizer(tensors, state["optimizer"]))
    packed, structure = pack_optimizer(optimizer.state_dict())
    assert structure == state["optimizer"]
    again = checkpoint.save(tmp_path, 3, {**tensors, **packed}, state)
    assert {name: (again / name).read_bytes() for name in checkpoint.FILES} == {
        name: (folder / name).read_bytes() for name in checkpoint.FILES
    }
