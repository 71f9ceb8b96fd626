"""What is recorded of the patches that are kept: tokens, queries, keys and values."""

import pytest
import torch
from small_vits import recorded_flops
from timm.models.naflexvit import batch_patchify
from vit_forms import FORMS, build, run_timm

from vitdistill.vit.families import family_of
from vitdistill.vit.needs import Needs
from vitdistill.vit.output import ViTOutput
from vitdistill.vit.walk import run_vit


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
    costs = [recorded_flops(model, size, needs) for needs in by_needs]
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


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("any grid")])
@torch.no_grad()
def test_kept_patches_are_those_that_timm_calls_valid(form: str) -> None:
    """timm's own way to leave patches out: a mask of attention and of pooling."""
    model, images = build(form)
    if not model.embeds.is_linear:
        return
    embed = model.embeds
    pixels, (rows, columns) = batch_patchify(
        images, embed.patch_size, pad=embed.dynamic_img_pad, channels_last=embed.channels_last
    )
    keep = torch.stack([torch.randperm(rows * columns)[:7] for _ in images])
    valid = torch.zeros(3, rows * columns).scatter(1, keep, 1.0).bool()
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).expand(3, -1, -1)
    expected = model({"patches": pixels, "patch_coord": places, "patch_valid": valid})
    found = run_vit(model, images, Needs(logits=True), keep).logits
    assert torch.allclose(found, expected, atol=1e-5)
