"""`run_vit` against timm's own forward, on every form of the plain ViT."""

import pytest
import timm
import torch
import torch.nn.functional as F
from vit_forms import FORMS, SMALL, build

from vitdistill.errors import ConfigError
from vitdistill.vit.families import family_of
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_equals_timm(form: str) -> None:
    """Bit for bit where every token is read, to rounding with a shortened last block."""
    model, images = build(form)
    whole = model(images)
    output = run_vit(model, images, Needs(logits=True, hidden=frozenset({0, 1, -1})))
    assert torch.equal(output.logits, whole)
    has_prefix = model.num_prefix_tokens > 0  # timm's `Eva` fails where it is to return none
    final, hidden = model.forward_intermediates(
        images, return_prefix_tokens=has_prefix, output_fmt="NLC"
    )
    assert torch.equal(model.norm(output.hidden[2]), final)
    for i, entry in enumerate(hidden):  # patches alone where there are no prefix tokens
        parts = reversed(entry) if isinstance(entry, tuple) else [entry]
        assert torch.equal(output.hidden[i], torch.cat(list(parts), dim=1))
    features = run_vit(model, images, Needs(features=True))
    assert torch.equal(features.features, model.forward_features(images))
    assert features.logits is None and not features.hidden
    patches, num_patches = features.feature_patches, output.grid[0] * output.grid[1]
    assert torch.equal(patches.vectors, features.features[:, features.num_prefix_tokens :])
    assert patches.grid == output.grid and patches.vectors.shape[1] == num_patches
    for needs in (Needs(logits=True), Needs(logits=True, attention=frozenset({-1, 0}))):
        assert (run_vit(model, images, needs).logits - whole).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_attention_is_that_of_the_block(form: str) -> None:
    """Against a hook on the blocks' own softmax, with timm's explicit attention."""
    model, images = build(form)
    family = family_of(model)
    recorded = run_vit(model, images, Needs(attention=frozenset({1, 2}))).attention
    for i in (1, 2):
        block = model.blocks[i]
        block.attn.fused_attn = False
        seen: list[torch.Tensor] = []
        handle = block.attn.attn_drop.register_forward_hook(
            lambda _, inputs, __, seen=seen: seen.append(inputs[0])
        )
        model(images)
        handle.remove()
        source = family.network.attention_source
        expected = seen[0][:, :, 0] if source == "class" else seen[0].mean(2)
        if source == "pool" and i == 2:
            pool, x = model.attn_pool, model.forward_features(images)
            skipped = 0 if getattr(model, "pool_include_prefix", True) else model.num_prefix_tokens
            x = x[:, skipped:]
            heads = (pool.num_heads, pool.head_dim)
            q = pool.q(pool.latent).unflatten(2, heads).transpose(1, 2)
            k = pool.kv(x).unflatten(2, (2, *heads))[:, :, 0].transpose(1, 2)
            expected = (q @ k.transpose(-2, -1) * pool.scale).softmax(-1)[:, :, 0]
            expected = F.pad(expected, (skipped, 0))
        assert torch.allclose(recorded[i], expected, atol=1e-6)
        assert torch.allclose(recorded[i].sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_timms(form: str) -> None:
    """Through the shortened last block and the gathered embedding too."""
    model, images = build(form)
    model(images).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    rows, columns = family_of(model).grid(images)
    everything = torch.arange(rows * columns).flip(0).expand(len(images), -1)
    needs = Needs(logits=True, attention=frozenset({-1}))
    for keep in (None, everything):
        model.zero_grad()
        run_vit(model, images, needs, keep).logits.square().sum().backward()
        for name, right in expected.items():
            off = model.get_parameter(name).grad - right
            assert off.abs().max() / right.abs().max().clamp_min(1e-2) < 1e-4, name


def test_distilled_heads_are_recorded_apart() -> None:
    model, images = build("two tokens")
    output = run_vit(model, images, Needs(logits=True))
    assert output.head_logits.shape == (3, 2, 7)
    model.distilled_training = True
    by_class, by_distillation = model.train()(images)
    assert torch.allclose(output.head_logits[:, 0], by_class, atol=1e-5)
    assert torch.allclose(output.head_logits[:, 1], by_distillation, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_whether_the_prediction_reads_the_class_token(form: str) -> None:
    model, images = build(form)
    family = family_of(model)
    features = run_vit(model, images, Needs(features=True)).features
    other = features.clone()
    if family.network.has_class_token:
        other[:, 0] += 1
    assert family.network.reads_class_token == (
        not torch.equal(family.head(features)[0], family.head(other)[0])
    )


def test_unusual_blocks_are_walked_whole_and_refuse_attention() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_rpn_224", **SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(run_vit(model, images, Needs(logits=True)).logits, model(images))
        with pytest.raises(ConfigError, match="cannot be recorded"):
            run_vit(model, images, Needs(attention=frozenset({0})))


def test_a_subclass_with_its_own_forward_is_not_walked_by_hand() -> None:
    from timm.models.vision_transformer import VisionTransformer

    class Doubled(VisionTransformer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = Doubled(
        img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3
    ).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(run_vit(model, images, Needs(logits=True)).logits, model(images))


def test_dropping_patches_at_random_is_refused_with_a_choice_of_patches() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, patch_drop_rate=0.5).train()
    with pytest.raises(ConfigError, match="patch_drop_rate"):
        run_vit(model, torch.randn(1, 3, 64, 64), Needs(logits=True), torch.arange(4)[None])


FAMILIES = ("class token", "relative bias (BEiT)", "any grid, class token (C-RADIO)")


@pytest.mark.parametrize("form", FAMILIES)
def test_position_dropout_and_checkpointing_are_honoured(form: str) -> None:
    model, images = build(form)
    embeds = getattr(model, "embeds", model)
    embeds.pos_drop.p = 0.5
    model.train()
    rows, columns = family_of(model).grid(images)
    keep = torch.arange(rows * columns).expand(3, -1)
    torch.manual_seed(0)
    dropped = run_vit(model, images, Needs(logits=True), keep).logits
    torch.manual_seed(0)
    assert torch.allclose(dropped, model(images), atol=1e-5)
    model.set_grad_checkpointing(True)
    torch.manual_seed(0)
    again = run_vit(model, images, Needs(logits=True, hidden=frozenset({0})), keep).logits
    assert torch.allclose(dropped, again, atol=1e-5)
    again.sum().backward()
    weight = getattr(embeds, "patch_embed", embeds).proj.weight
    assert weight.grad is not None and weight.grad.any()


@pytest.mark.parametrize("form", FAMILIES)
def test_traces_as_one_graph(form: str) -> None:
    model, images = build(form)
    needs = Needs(logits=True, attention=frozenset({-1}))
    keep = torch.arange(8).expand(3, -1)
    explanation = torch._dynamo.explain(run_vit)(model, images, needs, keep)
    assert explanation.graph_break_count == 0
