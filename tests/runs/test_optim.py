"""Which weight gets which decay and learning rate, and when; and what of an optimizer comes back
from a checkpoint.
"""

import json
import math

import pytest
import torch
from small_runs import VIT
from torch import nn

from vitdistill.distill.step import Distillation
from vitdistill.errors import ConfigError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.settings import OptimConfig, StudentConfig
from vitdistill.runs.networks import build_student, plan_of
from vitdistill.runs.optim import (
    clip_gradients,
    gradient_norm,
    make_optimizer,
    make_schedule,
)
from vitdistill.storage.optimizer import pack_optimizer, unpack_optimizer


def tiny(name="vit_tiny_patch16_224", patch_size=4):
    student = StudentConfig(model=name, model_args={**VIT, "patch_size": patch_size})
    recipe = Recipe(student=student, objectives={"ce": CrossEntropy(head="all")})
    torch.manual_seed(0)
    built = build_student(recipe.student, 3)
    return Distillation(built.model, plan_of(recipe, built.network, {}))


def settings(optimizer, module, key):
    """A setting of every parameter's group, by the parameter's name."""
    found = {id(p): group[key] for group in optimizer.param_groups for p in group["params"]}
    named = module.named_parameters()
    return {name.removeprefix("student."): found[id(value)] for name, value in named}


def test_vectors_and_what_the_model_exempts_do_not_decay():
    module = tiny()
    module.adapters["kd"] = nn.Linear(3, 4)
    decay = settings(make_optimizer(module, OptimConfig(weight_decay=0.3)), module, "weight_decay")
    for name in ("blocks.0.attn.qkv.weight", "head.weight", "adapters.kd.weight"):
        assert decay[name] == 0.3
    vectors = ("blocks.0.attn.qkv.bias", "norm.weight", "adapters.kd.bias")
    for name in (*vectors, "pos_embed", "cls_token"):
        assert decay[name] == 0.0


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_clip_224",
        "deit_tiny_distilled_patch16_224",
    ],
)
@pytest.mark.parametrize("sched", ["none", "cosine"])
def test_layer_decay_shrinks_the_learning_rate_block_by_block(name, sched):
    """All of the embedding has one rate: register tokens and a norm before the blocks too. A
    checkpoint brings the decay back once.
    """
    module = tiny(name, patch_size=8)
    config = OptimConfig(lr=1.0, layer_decay=0.5, sched=sched, warmup_epochs=0.0, min_lr=0.0)
    first, second = make_optimizer(module, config), make_optimizer(module, config)
    second.load_state_dict(first.state_dict())
    for optimizer in (first, second):
        make_schedule(optimizer, config, 10, 5)(0)
        rate = settings(optimizer, module, "lr")
        assert rate["head.weight"] == 1.0
        assert rate["norm.weight"] == rate["blocks.1.mlp.fc1.weight"] == 0.5
        assert rate["blocks.0.mlp.fc1.weight"] == 0.25
        embedding = [
            key
            for key in rate
            if key.endswith(("_token", "pos_embed")) or key.startswith(("patch_embed", "norm_pre"))
        ]
        assert len(embedding) >= 4 and {rate[key] for key in embedding} == {0.125}
    decay = settings(first, module, "weight_decay")
    assert {decay[key] for key in embedding if key != "patch_embed.proj.weight"} == {0.0}


def test_the_schedule_warms_up_and_ends_where_it_should():
    config = OptimConfig(lr=1.0, warmup_epochs=2.0, warmup_lr=0.2, min_lr=0.1)
    optimizer = make_optimizer(tiny(), config)
    schedule = make_schedule(optimizer, config, 10, 4)
    rates = []
    for step in range(41):
        schedule(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:3] == pytest.approx([0.2, 0.3, 0.4])
    assert max(rates) == pytest.approx(0.95, abs=0.06)
    assert rates[8:] == sorted(rates[8:], reverse=True) and rates[40] == pytest.approx(0.1)
    schedule(5)
    assert optimizer.param_groups[0]["lr"] == rates[5]


@pytest.mark.parametrize(("epochs", "warmup"), [(10, 4), (10, 2.5), (100, 40), (3, 1), (3, 0)])
def test_after_a_prefix_the_cosine_begins_at_its_peak_and_ends_at_its_minimum(epochs, warmup):
    """MAE's schedule: linear to the peak, then half a cosine over what is left."""
    peak, least = 2.4e-3, 1e-6
    warm = {"warmup_lr": 0.0, "warmup_epochs": warmup, "warmup_prefix": True}
    config = OptimConfig(lr=peak, min_lr=least, **warm)
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=peak)
    schedule = make_schedule(optimizer, config, epochs, 8)
    for step in range(epochs * 8 + 1):
        schedule(step)
        at = step / 8
        cosine = (1 + math.cos(math.pi * (at - warmup) / (epochs - warmup))) / 2
        expected = peak * at / warmup if at < warmup else least + (peak - least) * cosine
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    "name",
    ["adamw", "sgd", "momentum", "lamb", "lion", "adafactorbv", "muon", "lookahead_adamw"],
)
def test_an_optimizer_goes_on_exactly(name):
    """Four steps, through the JSON and tensors of a checkpoint, and four more, against eight."""
    args = {"betas": [0.8, 0.9]} if name == "adamw" else {}
    config = OptimConfig(opt=name, warmup_epochs=1.0, opt_args=args)

    def start():
        module = tiny()
        optimizer = make_optimizer(module, config)
        return module, optimizer, make_schedule(optimizer, config, 4, 2)

    def take(module, optimizer, schedule, steps):
        for step in steps:
            schedule(step)
            optimizer.zero_grad()
            images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            torch.manual_seed(step)
            module.student(images).square().mean().backward()
            optimizer.step()

    whole, first, second = start(), start(), start()
    take(*whole, range(8))
    take(*first, range(4))
    tensors, structure = pack_optimizer(first[1].state_dict())
    tensors = {key: value.clone() for key, value in tensors.items()}
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(unpack_optimizer(tensors, json.loads(json.dumps(structure))))
    take(*second, range(4, 8))
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"opt": "adamv"}, "optim.opt"),
        ({"opt_args": {"bettas": [0.9, 0.99]}}, "optim.opt_args"),
        ({"opt_args": {"betas": [2.0, 0.99]}}, "optim.opt_args"),
        ({"opt": "adahessian"}, "optim.opt_args"),
        ({"layer_decay": 0.5}, "optim.layer_decay"),
    ],
)
def test_an_impossible_optimizer_is_one_sentence(config, field):
    module = tiny()
    if "layer_decay" in config:
        module.student = nn.Linear(3, 3)
    with pytest.raises(ConfigError) as refused:
        make_optimizer(module, OptimConfig(**config))
    assert refused.value.field == field and "\n" not in str(refused.value)


def test_clipping():
    module = nn.Linear(2, 1, bias=False)
    for largest, expected in ((None, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])):
        module.weight.grad = torch.tensor([[3.0, 4.0]])
        norm = gradient_norm(module)
        clip_gradients(module, largest, norm)
        assert norm == 5.0
        torch.testing.assert_close(module.weight.grad, torch.tensor([expected]))
    module.weight.grad[0, 0] = torch.nan
    assert gradient_norm(module).isnan()
