"""Which weight gets which decay and learning rate, and when; and what of an optimizer comes back
from a checkpoint.
"""

import json
import math

import pytest
import torch
from torch import nn

from vitdistill.distill.step import Distillation
from vitdistill.errors import ConfigError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.recipes.config import OptimConfig, Recipe, StudentConfig
from vitdistill.runs.networks import build_student, plan_of
from vitdistill.runs.optim import (
    clip_gradients,
    gradient_norm,
    learning_rate,
    make_optimizer,
    make_schedule,
)
from vitdistill.storage.optimizer import pack_optimizer, unpack_optimizer

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def tiny() -> Distillation:
    recipe = Recipe(student=StudentConfig(model="vit_tiny_patch16_224", model_args=VIT))
    torch.manual_seed(0)
    student = build_student(recipe.student, 3)
    return Distillation(student.model, plan_of(recipe, student.network, {}))


def settings(optimizer, module) -> dict[str, dict]:
    """Every parameter's group by its name."""
    groups = {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }
    return {name: groups[id(parameter)] for name, parameter in module.named_parameters()}


def test_vectors_and_what_the_model_exempts_do_not_decay():
    module = tiny()
    module.adapters["kd"] = nn.Linear(3, 4)
    found = settings(make_optimizer(module, OptimConfig(weight_decay=0.3)), module)
    decay = {name: group["weight_decay"] for name, group in found.items()}
    assert (
        decay["student.blocks.0.attn.qkv.weight"]
        == decay["student.head.weight"]
        == decay["adapters.kd.weight"]
        == 0.3
    )
    assert (
        decay["student.blocks.0.attn.qkv.bias"]
        == decay["student.norm.weight"]
        == decay["adapters.kd.bias"]
        == 0.0
    )
    assert decay["student.pos_embed"] == decay["student.cls_token"] == 0.0


def test_layer_decay_shrinks_the_learning_rate_block_by_block():
    module = tiny()
    config = OptimConfig(lr=1.0, layer_decay=0.5, warmup_epochs=0.0, min_lr=0.0)
    optimizer = make_optimizer(module, config)
    make_schedule(optimizer, config, 10, 5)(0)
    rate = {name: group["lr"] for name, group in settings(optimizer, module).items()}
    assert rate["student.head.weight"] == 1.0 == learning_rate(optimizer)
    assert rate["student.blocks.1.mlp.fc1.weight"] == 0.5 * rate["student.head.weight"]
    assert rate["student.blocks.0.mlp.fc1.weight"] == 0.5 * rate["student.blocks.1.mlp.fc1.weight"]
    assert rate["student.patch_embed.proj.weight"] == 0.5 * rate["student.blocks.0.mlp.fc1.weight"]


def test_the_schedule_warms_up_and_ends_where_it_should():
    config = OptimConfig(lr=1.0, warmup_epochs=2.0, warmup_lr=0.2, min_lr=0.1)
    optimizer = make_optimizer(tiny(), config)
    schedule = make_schedule(optimizer, config, 10, 4)
    rates = []
    for step in range(41):
        schedule(step)
        rates.append(learning_rate(optimizer))
    assert rates[:3] == pytest.approx([0.2, 0.3, 0.4]) and max(rates) == pytest.approx(
        0.95, abs=0.06
    )
    assert rates[8:] == sorted(rates[8:], reverse=True) and rates[40] == pytest.approx(0.1)
    schedule(5)
    assert learning_rate(optimizer) == rates[5]


def test_layer_decay_needs_no_schedule():
    """And is in what a checkpoint brings back, once."""
    config = OptimConfig(lr=1.0, layer_decay=0.5, sched="none", warmup_epochs=0.0)
    module = tiny()
    first, second = make_optimizer(module, config), make_optimizer(module, config)
    second.load_state_dict(first.state_dict())
    for optimizer in (first, second):
        make_schedule(optimizer, config, 10, 5)(3)
        rate = {name: group["lr"] for name, group in settings(optimizer, module).items()}
        assert rate["student.head.weight"] == 1.0
        assert (
            rate["student.blocks.0.mlp.fc1.weight"] == 0.25 and rate["student.pos_embed"] == 0.125
        )


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_clip_224",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_all_of_the_embedding_has_its_rate_and_its_tokens_no_decay(name):
    student_of = StudentConfig(model=name, model_args={**VIT, "patch_size": 8})
    recipe = Recipe(student=student_of, objectives={"ce": CrossEntropy(head="all")})
    student = build_student(recipe.student, 3)
    module = Distillation(student.model, plan_of(recipe, student.network, {}))
    config = OptimConfig(lr=1.0, layer_decay=0.5, sched="none", warmup_epochs=0.0, weight_decay=0.3)
    found = {
        name.removeprefix("student."): group
        for name, group in settings(make_optimizer(module, config), module).items()
    }
    embedding = [
        key
        for key in found
        if key.endswith(("_token", "pos_embed")) or key.startswith(("patch_embed", "norm_pre"))
    ]
    assert len(embedding) >= 4 and {found[key]["lr"] for key in embedding} == {0.125}
    assert {
        found[key]["weight_decay"] for key in embedding if key != "patch_embed.proj.weight"
    } == {0.0}
    assert (
        found["norm.weight"]["lr"] == found["blocks.1.norm1.weight"]["lr"] == 0.5
        and found["head.weight"]["lr"] == 1.0
    )


def test_no_schedule_leaves_the_rate_alone():
    config = OptimConfig(lr=0.7, sched="none", warmup_epochs=0.0)
    optimizer = make_optimizer(tiny(), config)
    make_schedule(optimizer, config, 10, 4)(17)
    assert learning_rate(optimizer) == 0.7


@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        "sgd",
        "momentum",
        "lamb",
        "lion",
        "adafactorbv",
        "muon",
        "nadamw",
        "lookahead_adamw",
    ],
)
def test_an_optimizer_goes_on_exactly(name):
    """Four steps, through the JSON and tensors of a checkpoint, and four more, against eight."""
    config = OptimConfig(
        opt=name, warmup_epochs=1.0, opt_args={"betas": [0.8, 0.9]} if name == "adamw" else {}
    )

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

    whole = start()
    take(*whole, range(8))
    first = start()
    take(*first, range(4))
    tensors, structure = pack_optimizer(first[1].state_dict())
    tensors, structure = (
        {key: value.clone() for key, value in tensors.items()},
        json.loads(json.dumps(structure)),
    )
    second = start()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(unpack_optimizer(tensors, structure))
    take(*second, range(4, 8))
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True)
    )


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


@pytest.mark.parametrize(("epochs", "warmup"), [(10, 4), (10, 2.5), (100, 40), (3, 1)])
def test_after_a_prefix_the_cosine_begins_at_its_peak_and_ends_at_its_minimum(epochs, warmup):
    """MAE's schedule: linear to the peak, then half a cosine over what is left."""
    steps = 8
    config = OptimConfig(
        lr=2.4e-3, min_lr=1e-6, warmup_lr=0.0, warmup_epochs=warmup, warmup_prefix=True
    )
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=config.lr)
    schedule = make_schedule(optimizer, config, epochs, steps)
    for step in range(epochs * steps + 1):
        schedule(step)
        at = step / steps
        cosine = (1 + math.cos(math.pi * (at - warmup) / (epochs - warmup))) / 2
        expected = (
            config.lr * at / warmup
            if at < warmup
            else config.min_lr + (config.lr - config.min_lr) * cosine
        )
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6, abs=1e-12)
