"""Networks that are run whole: their features, tokens and places."""

from typing import Any

import pytest
import timm
import torch
from small_vits import loss_of, vit
from vit_forms import shake

from vitdistill.errors import ConfigError
from vitdistill.evaluate.features import image_features
from vitdistill.methods.tokens import TokenFeatures
from vitdistill.vit.families import family_of
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit

WHOLE: dict[str, dict[str, Any]] = {
    "xcit_nano_12_p16_224": {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2},
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
    assert torch.allclose(features.features, expected, atol=1e-5)
    normed = name.startswith(("xcit", "swin"))
    assert torch.allclose(features.feature_patches.vectors, raw, atol=1e-3) != normed
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


TOKENS: dict[str, tuple[dict[str, Any], bool]] = {
    "cait_xxs24_224": ({"embed_dim": 24, "depth": 2, "num_heads": 2}, False),
    "xcit_nano_12_p16_224": ({"embed_dim": 24, "depth": 2, "num_heads": 2}, False),
    "convit_tiny": ({"embed_dim": 24, "depth": 3, "local_up_to_layer": 1, "num_heads": 2}, False),
    "pit_ti_distilled_224": ({"base_dims": (12, 12), "depth": (1, 1), "heads": (1, 2)}, False),
    "tnt_s_patch16_224": (
        {"embed_dim": 24, "inner_dim": 8, "depth": 2, "num_heads_outer": 2},
        True,
    ),
    "vit_relpos_medium_patch16_cls_224": ({"embed_dim": 24, "depth": 2, "num_heads": 2}, True),
}
"""How to build it small, and whether its class token is with the patches at every stage."""


@pytest.mark.parametrize("name", TOKENS)
@torch.no_grad()
def test_the_class_token_of_a_network_that_is_run_whole_is_timms(name: str) -> None:
    args, at_every_stage = TOKENS[name]
    torch.manual_seed(1)
    model: Any = timm.create_model(name, num_classes=5, img_size=64, **args).eval()
    shake(model)
    images, network = torch.randn(2, 3, 64, 64), family_of(model).network
    output = run_vit(model, images, Needs(features=True, hidden=frozenset({-1})))
    assert output.features is not None and network.has_class_token and not network.walks
    expected, prefix = model.forward_features(images), network.num_prefix_tokens
    assert prefix == (2 if "distilled" in name else 1)
    assert torch.allclose(output.features[:, :prefix], expected[:, :prefix], atol=1e-5)
    places = output.feature_patches
    assert places.vectors.shape[1] == places.grid[0] * places.grid[1]
    found = output.class_token(-1)
    assert (found is not None) == at_every_stage
    assert output.patches(-1).vectors.shape == places.vectors.shape
    if found is not None:
        assert torch.allclose(model.norm(found), output.features[:, :1], atol=1e-5)
    assert torch.allclose(image_features(output, "class"), expected[:, 0], atol=1e-5)
    assert torch.allclose(image_features(output, "mean"), places.vectors.mean(1), atol=1e-5)


def test_a_class_token_is_taught_to_and_by_networks_that_are_run_whole() -> None:
    """The class term of `tokens` reads it, on either side."""
    args, _ = TOKENS["cait_xxs24_224"]
    torch.manual_seed(0)
    whole: Any = timm.create_model(
        "cait_xxs24_224", num_classes=5, img_size=16, patch_size=4, **args
    )
    shake(whole)
    objective = TokenFeatures(patch_weight=0)
    for student, teacher in ((whole, vit()), (vit(), whole)):
        torch.manual_seed(0)
        before = loss_of(objective, student, teacher)
        with torch.no_grad():
            whole.cls_token.add_(1)
        torch.manual_seed(0)
        assert loss_of(objective, student, teacher) != before


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
