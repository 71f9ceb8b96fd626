"""`run_vit` against timm's own forward, on every form of the plain ViT."""

from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
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
    "rotary (DINOv3)": ("vit_small_patch16_dinov3", {}),
    "rotary, separate projections (DINOv3)": ("vit_small_plus_patch16_dinov3", {"img_size": 48}),
    "rotary, swiglu (EVA-02)": ("eva02_tiny_patch14_224", {"img_size": 56}),
    "rotary, norms within (EVA-02)": ("eva02_base_patch16_clip_224", {}),
    "rotary, attention pooling (PE)": ("vit_pe_core_tiny_patch16_384", {"num_heads": 3}),
    "rotary, no class token": (
        "vit_pe_spatial_tiny_patch16_512",
        {"class_token": False, "global_pool": "avg"},
    ),
    "rotary, mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "rotary, axial with positions": ("vit_small_patch16_rope_ape_224", {}),
    "rotary, registers": ("vit_medium_patch16_rope_reg1_gap_256", {}),
    "rotary, grouped queries (Sapiens2)": (
        "vit_base_patch16_sapiens2",
        {"num_heads": 4, "num_kv_heads": (None, 2, 2), "img_size": 64, "embed_dim": 64},
    ),
    "rotary, norm after": ("eva02_enormous_patch14_clip_224", {"img_size": 56}),
    "EVA without rotation": ("eva_giant_patch14_224", {"img_size": 56}),
    "rotary, oblong and dynamic": ("vit_small_patch16_dinov3", {"img_size": (48, 96)}),
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
    normed = name.startswith(("beit", "swin"))
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


def run_timm(
    model: Any, images: torch.Tensor, keep: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, ...]]]:
    """The tokens after each of timm's own blocks on the kept patches, and the q, k and v that its
    attention gets.
    """
    prefix, embedded = model.num_prefix_tokens, model.patch_embed(images)

    def choose(tokens: torch.Tensor) -> torch.Tensor:
        if keep is None:
            return tokens
        batch = torch.arange(len(images))[:, None]
        return torch.cat([tokens[:, :prefix], tokens[batch, prefix + keep]], dim=1)

    arguments: list[dict[str, Any]] = [{}] * len(model.blocks)
    if isinstance(model, Eva):
        # timm gathers the rotary table of the patches that its random dropping leaves.
        model.patch_drop = None if keep is None else lambda tokens: (choose(tokens), keep)
        tokens, rope = model._pos_embed(embedded)
        model.patch_drop = None
        arguments = [{"rope": rope[i] if model.rope_mixed else rope} for i in range(3)]
    else:
        tokens = choose(model._pos_embed(embedded))
    tokens, hidden, seen = model.norm_pre(tokens), [], []
    attend = F.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((q, k, v))
        return attend(q, k, v, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", spy):
        for block, given in zip(model.blocks, arguments, strict=True):
            tokens = block(tokens, **given)
            hidden.append(tokens)
    return hidden, seen


@pytest.mark.parametrize("seen", ["all", "half", "all in another order"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_kept_patches_go_through_the_blocks_as_through_timms_own(form: str, seen: str) -> None:
    model, images = build(form)
    grid = family_of(model).grid(images)
    num_patches = grid[0] * grid[1]
    count = max(num_patches // 2, 1) if seen == "half" else num_patches
    keep = torch.stack([torch.randperm(num_patches)[:count] for _ in images])
    given = None if seen == "all" else keep
    hidden, qkv = run_timm(model, images, given)
    needs = Needs(logits=True, qkv=frozenset({0, 2}), hidden=frozenset({0, 1, 2}), features=True)
    output = run_vit(model, images, needs, given)
    prefix = output.num_prefix_tokens
    for i, expected in enumerate(hidden):
        assert torch.allclose(output.hidden[i], expected, atol=1e-4)
        patches = output.patches(i)
        assert torch.equal(patches.vectors, output.hidden[i][:, prefix:])
        assert patches.keep is given and patches.grid == grid
    for i in (0, 2):
        for part, expected in zip(output.qkv[i], qkv[i], strict=True):
            assert torch.allclose(part, expected, atol=1e-4)
    normed = model.norm(hidden[2])
    assert torch.allclose(output.features, normed, atol=1e-4)
    assert output.feature_patches.keep is given
    logits = model.forward_head(normed)
    short = run_vit(model, images, Needs(logits=True), given).logits
    for answer in (output.logits, short):
        assert torch.allclose(answer, logits, atol=1e-4)


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
