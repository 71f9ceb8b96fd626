"""`run_vit` against timm's own forward, on every form of the plain ViT."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from vitdistill.errors import ConfigError
from vitdistill.vit.families import family_of
from vitdistill.vit.flops import forward_flops
from vitdistill.vit.needs import Needs
from vitdistill.vit.output import ViTOutput
from vitdistill.vit.walk import run_vit

SMALL: dict[str, Any] = {
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "img_size": 64,
    "num_classes": 7,
}

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "two tokens": ("deit_tiny_distilled_patch16_224", {}),
    "class token without position": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "registers, average pooling": ("vit_little_patch16_reg4_gap_256", {}),
    "average pooling": ("vit_medium_patch16_gap_240", {}),
    "average pooling with class token": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "max pooling": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "pre-norm (CLIP)": ("vit_base_patch16_clip_224", {}),
    "layer scale, q/k norm": ("vit_tiny_patch16_224", {"qk_norm": True, "init_values": 1e-5}),
    "no qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "no final norm": ("vit_tiny_patch16_224", {"final_norm": False}),
    "no position embedding": (
        "vit_tiny_patch16_224",
        {"pos_embed": "none", "class_token": False, "global_pool": "avg"},
    ),
    "oblong image and patches": (
        "vit_tiny_patch16_224",
        {"img_size": (32, 96), "patch_size": (8, 16)},
    ),
    "dynamic size": ("vit_tiny_patch16_224", {"dynamic_img_size": True, "img_size": 48}),
    "dynamic size with padding": (
        "vit_tiny_patch16_224",
        {"dynamic_img_size": True, "dynamic_img_pad": True},
    ),
}


def build(form: str) -> tuple[nn.Module, torch.Tensor]:
    name, args = FORMS[form]
    torch.manual_seed(1)
    model = timm.create_model(name, **{**SMALL, **args}).eval()
    shake(model)
    sizes = {"dynamic size": (64, 96), "dynamic size with padding": (50, 70)}
    return model, torch.randn(3, 3, *sizes.get(form, model.patch_embed.img_size))


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Weights that timm initialises to zero or one would hide mistakes."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_equals_timm(form: str) -> None:
    """Bit for bit where every token is read, to rounding with a shortened last block."""
    model, images = build(form)
    whole = model(images)
    output = run_vit(model, images, Needs(logits=True, hidden=frozenset({0, 1, -1})))
    assert torch.equal(output.logits, whole)
    final, hidden = model.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC")
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
            heads = (pool.num_heads, pool.head_dim)
            q = pool.q(pool.latent).unflatten(2, heads).transpose(1, 2)
            k = pool.kv(x).unflatten(2, (2, *heads))[:, :, 0].transpose(1, 2)
            expected = (q @ k.transpose(-2, -1) * pool.scale).softmax(-1)[:, :, 0]
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


WHOLE: dict[str, dict[str, Any]] = {
    "eva02_tiny_patch14_224": {
        "img_size": 28,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 2,
        "global_pool": "token",
    },
    "beit_base_patch16_224": {
        "img_size": 32,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 2,
        "global_pool": "token",
    },
    "swin_tiny_patch4_window7_224": {
        "img_size": 56,
        "embed_dim": 12,
        "depths": (1, 1),
        "num_heads": (1, 2),
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "resnet10t": {},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 24, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "mobilenetv2_035": {},
}


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_features_of_other_networks_come_after_their_final_norm(name: str) -> None:
    """What timm's ``forward_features`` gives, whatever else is recorded; hidden states are before
    that.
    """
    torch.manual_seed(1)
    model: Any = timm.create_model(name, num_classes=5, **WHOLE[name]).eval()
    shake(model)
    side, last = WHOLE[name].get("img_size", 64), family_of(model).network.depth - 1
    images = torch.randn(2, 3, side, side)
    raw = model.forward_intermediates(images, indices=[last], intermediates_only=True)[0]
    features = run_vit(model, images, Needs(features=True))
    assert features.features is not None
    assert features.feature_patches.grid == raw.shape[2:] == features.grids[last]
    expected, raw = model.forward_features(images), raw.flatten(2).transpose(1, 2)
    if expected.ndim == 4:
        if not name.startswith("swin"):  # channels come last there
            expected = expected.permute(0, 2, 3, 1)
        expected = expected.flatten(1, 2)
    if name == "mobilenetv2_035":  # a further convolution, to another width than the stages say
        expected = raw
    assert torch.allclose(features.features, expected[:, -raw.shape[1] :], atol=1e-5)
    normed = name.startswith(("eva", "beit", "swin"))
    assert torch.allclose(features.features, raw, atol=1e-3) != normed
    for needs in (
        Needs(logits=True, features=True),
        Needs(logits=True, hidden=frozenset({0, last}), features=True),
    ):
        both = run_vit(model, images, needs)
        assert torch.equal(both.features, features.features) and torch.allclose(
            both.logits, model(images), atol=1e-5
        )
        for i, hidden in both.hidden.items():
            assert torch.equal(
                hidden, run_vit(model, images, Needs(hidden=frozenset({i}))).hidden[i]
            )
        assert not needs.hidden or torch.equal(both.hidden[last], raw)


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


def test_position_dropout_and_checkpointing_are_honoured() -> None:
    model, images = build("class token")
    model.pos_drop.p = 0.5
    model.train()
    keep = torch.arange(16).expand(3, -1)
    torch.manual_seed(0)
    dropped = run_vit(model, images, Needs(logits=True), keep).logits
    torch.manual_seed(0)
    assert torch.allclose(dropped, model(images), atol=1e-5)
    model.set_grad_checkpointing(True)
    torch.manual_seed(0)
    again = run_vit(model, images, Needs(logits=True), keep).logits
    assert torch.allclose(dropped, again, atol=1e-5)
    again.sum().backward()
    assert model.patch_embed.proj.weight.grad is not None


def test_traces_as_one_graph() -> None:
    model, images = build("class token")
    needs = Needs(logits=True, attention=frozenset({-1}))
    keep = torch.arange(8).expand(3, -1)
    explanation = torch._dynamo.explain(run_vit)(model, images, needs, keep)
    assert explanation.graph_break_count == 0


# --- queries, keys and values --------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_queries_keys_and_values_are_the_blocks_own(form: str) -> None:
    """Those the block projects, after its norms; and what the block's attention makes of them, with
    the scale it applies itself.
    """
    model, images = build(form)
    output = run_vit(model, images, Needs(qkv=frozenset({0, -1})))
    assert set(output.qkv) == {0, 2}
    for i, (q, k, v) in output.qkv.items():
        attn, seen = model.blocks[i].attn, {}
        for name, module in attn.named_modules():  # the attention itself is called ""
            module.register_forward_hook(
                lambda _, __, result, name=name, seen=seen: seen.update({name: result})
            )
        model(images)
        assert torch.equal(q, seen["q_norm"]) and torch.equal(k, seen["k_norm"])
        by_head = seen["qkv"].unflatten(2, (3, attn.num_heads, -1))
        assert torch.equal(v, by_head[:, :, 2].transpose(1, 2))
        out = ((q @ k.transpose(-2, -1) * attn.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)
        assert torch.allclose(attn.proj(out), seen[""], atol=1e-5)


@pytest.mark.parametrize("form", ["class token", "registers", "attention pooling"])
def test_queries_alone_stop_before_the_blocks_mlp(form: str) -> None:
    model, images = build(form)
    size = (images.shape[2], images.shape[3])
    by_needs = (
        Needs(qkv=frozenset({0})),
        Needs(hidden=frozenset({0})),
        Needs(qkv=frozenset({1})),
        Needs(features=True),
    )
    costs = [forward_flops(model, size, needs) for needs in by_needs]
    tokens = run_vit(model, images, by_needs[0]).qkv[0].q.shape[2]
    projection_and_mlp = 2 * tokens * 9 * model.embed_dim**2
    attention = 4 * tokens**2 * model.embed_dim
    assert costs == sorted(set(costs)) and costs[1] - costs[0] == projection_and_mlp + attention


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_kept_patches_are_a_run_on_those_tokens_alone(form: str) -> None:
    model, images = build(form)
    family = family_of(model)
    (rows, columns), prefix = family.grid(images), family.network.num_prefix_tokens
    keep = torch.stack([torch.randperm(rows * columns)[: rows * columns // 2] for _ in images])
    needs = Needs(logits=True, qkv=frozenset({2}), hidden=frozenset({1}), features=True)
    output = run_vit(model, images, needs, keep)
    embedded = model._pos_embed(model.patch_embed(images))
    places = torch.cat([torch.arange(prefix).expand(len(images), -1), prefix + keep], dim=1)
    batch = torch.arange(len(images))[:, None]
    tokens = model.blocks[1](model.blocks[0](model.norm_pre(embedded[batch, places])))
    assert torch.allclose(output.patches(-2).vectors, tokens[:, prefix:], atol=1e-4)
    attn = model.blocks[2].attn
    q, k, v = (
        attn.qkv(model.blocks[2].norm1(tokens))
        .unflatten(2, (3, attn.num_heads, -1))
        .permute(2, 0, 3, 1, 4)
    )
    for ours, expected in zip(output.qkv[2], (attn.q_norm(q), attn.k_norm(k), v), strict=True):
        assert torch.allclose(ours, expected, atol=1e-4)
    final = model.norm(model.blocks[2](tokens))
    assert torch.allclose(output.features, final, atol=1e-4)
    for logits in (output.logits, run_vit(model, images, Needs(logits=True), keep).logits):
        assert torch.allclose(logits, model.forward_head(final), atol=1e-4)
    assert output.feature_patches.keep is output.patches(1).keep is keep
    assert output.patches(1).grid == output.grid == (rows, columns)


def recorded(output: ViTOutput) -> dict[object, torch.Tensor]:
    """Every tensor by its kind, block and part."""
    single = {kind: getattr(output, kind) for kind in ("logits", "head_logits", "features")}
    found: dict[object, torch.Tensor] = {k: t for k, t in single.items() if t is not None}
    for kind in ("hidden", "attention"):
        found |= {(kind, i): t for i, t in getattr(output, kind).items()}
    return found | {(i, part): t for i, qkv in output.qkv.items() for part, t in enumerate(qkv)}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_recording_more_changes_no_number(form: str) -> None:
    model, images = build(form)
    blocks = frozenset({0, 1, 2})
    everything = run_vit(
        model,
        images,
        Needs(logits=True, hidden=blocks, attention=blocks, qkv=blocks, features=True),
    )
    # Attention of networks without a class token is computed explicitly, which agrees with the
    # fused kernel to rounding.
    exact = (
        everything.num_prefix_tokens > 0 and family_of(model).network.attention_source == "class"
    )
    for needs in (
        Needs(logits=True),
        Needs(hidden=blocks),
        Needs(attention=blocks),
        Needs(qkv=blocks),
        Needs(features=True),
        Needs(features=True, qkv=frozenset({2})),
        Needs(logits=True, qkv=blocks),
    ):
        alone = run_vit(model, images, needs)
        found, whole = recorded(alone), recorded(everything)
        for place, value in found.items():
            assert torch.allclose(value, whole[place], atol=2e-5)
            same = torch.equal(value, whole[place])
            assert same or not exact or needs.logits or needs.attention
    assert {id(t) for t in everything.tensors()} == {id(t) for t in whole.values()}


@torch.no_grad()
def test_feature_maps_of_other_networks_know_where_their_patches_are() -> None:
    model = timm.create_model("resnet10t", num_classes=5).eval()
    images = torch.randn(2, 3, 64, 96)
    output = run_vit(model, images, Needs(features=True, hidden=frozenset({1, -1})))
    assert output.logits is None and output.feature_patches.grid == (2, 3)
    assert torch.equal(output.features, model.forward_features(images).flatten(2).mT)
    assert torch.equal(output.hidden[4], output.features)
    assert output.patches(-1).grid == (2, 3) and output.patches(1).grid == (16, 24)
    assert output.patches(1).vectors.shape == (2, 384, 64)
    for needs in (Needs(qkv=frozenset({0})), Needs(attention=frozenset({0}))):
        with pytest.raises(ConfigError, match="attention"):
            run_vit(model, images, needs)
    with pytest.raises(ConfigError, match="no patches"):
        run_vit(model, images, Needs(logits=True), torch.zeros(2, 1, dtype=torch.int64))
