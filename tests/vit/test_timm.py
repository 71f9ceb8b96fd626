"""timm's networks: built, described and run as their configuration says, whatever is inside."""

from typing import Any

import pytest
import timm
import torch
from small_vits import WALKED, vit
from torch import nn

from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import ConfigError
from vitdistill.vit import Needs, describe_network, family_of, run_vit
from vitdistill.vit.beit import BiasedViT
from vitdistill.vit.copies import copy_network, on_meta
from vitdistill.vit.families import FAMILIES
from vitdistill.vit.naflex import NaFlexViT
from vitdistill.vit.plain import PlainViT
from vitdistill.weights.create import create_model

# One of a kind; the first of each list is one that a guess at its insides once refused.
KINDS = {
    "one number for sizes": "xcit_*",
    "channels of a stem that is no image": "csatv2*",
    "channels of unfolded images": "tresnet_*",
    "crops wider than the image": "volo_d*_[45]*",
    "convolutions before blocks": "vitamin_xl*",
    "positions beside patches": "gemma4_vit_167m*",
    "tokens behind tokens": "cait_xxs*",
    "windows": "swin_tiny*",
    "mask units": "hiera_tiny*",
    "patches of several sizes": "flexivit_small*",
    "images in sequence": "naflexvit_base*",
    "rotations": "vit_small_patch16_dinov3*",
    "no image size at all": "mobilenetv4_conv_small*",
    "hybrids": "levit_128*",
}


def check(name: str) -> None:
    with torch.device("meta"):
        model: Any = create_model(name, num_classes=5).eval()
    spec = input_spec_of(model)
    channels, *size = model.pretrained_cfg["input_size"]
    assert channels == 3 and spec.image_size == tuple(size)
    network = describe_network(model, "student", name, spec.image_size)
    assert network.num_classes == 5 and network.dim > 0 and network.depth > 0
    output = run_vit(model, torch.empty(2, 3, *size, device="meta"), Needs(logits=True))
    assert output.logits is not None and output.logits.shape == (2, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_every_kind(kind: str) -> None:
    check(timm.list_models(KINDS[kind])[0])


@pytest.mark.whole
@pytest.mark.parametrize("kind", [*KINDS][:6])
def test_every_network_of_a_kind_that_was_refused(kind: str) -> None:
    for name in timm.list_models(KINDS[kind])[::3]:
        if "volo" not in name or name.endswith(("448", "512")):
            check(name)


TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, BiasedViT) for name in timm.list_models(module="beit")),
        *((name, NaFlexViT) for name in timm.list_models(module="naflexvit")),
    ],
)
@torch.no_grad()
def test_every_name_of_a_family_is_walked_on_any_patches(name: str, family: type) -> None:
    torch.manual_seed(0)
    model: Any = create_model(name, **TINY).eval()
    assert type(family_of(model)) is family
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    keep = torch.stack([torch.randperm(16) for _ in images])
    needs = Needs(logits=True, attention=frozenset({-1}))
    for given in (None, keep):
        assert torch.allclose(run_vit(model, images, needs, given).logits, expected, atol=1e-5)
    half = run_vit(model, images, needs, keep[:, :8])
    assert half.logits.isfinite().all() and half.attention[1].shape[2] == 8 + half.num_prefix_tokens


def test_every_family_is_in_the_contract_suite() -> None:
    seen = {type(family_of(vit(name=name, **args))) for name, args in WALKED.values()}
    assert {PlainViT, *seen} == set(FAMILIES)


@pytest.mark.parametrize("side", [32, 48, (32, 64)])
@pytest.mark.parametrize(
    "name",
    ["xcit_nano_12_p16_224", "vit_tiny_patch16_224", "resnet10t", "vit_base_patch16_sapiens2"],
)
def test_another_image_size_is_the_one_that_is_asked_for(name: str, side: Any) -> None:
    with torch.device("meta"):
        model = create_model(name, image_size=side)
    assert input_spec_of(model).image_size == ((side, side) if isinstance(side, int) else side)


@pytest.mark.parametrize("name", ["efficientvit_m0", "levit_128s", "vit_tiny_patch16_224"])
def test_a_network_is_copied_wherever_it_has_run(name: str) -> None:
    """LeViT and its kin keep what they computed from their weights, with its gradients."""
    model: Any = create_model(name, num_classes=5).eval()
    images = torch.randn(1, 3, 224, 224)
    expected = model(images)
    copied = copy_network(model)
    assert torch.equal(copied(images), expected)
    own = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert own.isdisjoint(id(tensor) for tensor in copied.state_dict(keep_vars=True).values())
    counted = on_meta(model)
    assert all(p.is_meta and p.requires_grad for p in counted.parameters())
    assert counted(images.to("meta")).shape == (1, 5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "naflexvit_base_patch16_gap"])
def test_patches_that_do_not_fill_an_image_are_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError) as caught:
        create_model(name, image_size=50)
    assert caught.value.field == "image_size"


class Reading(nn.Module):
    """Its features depend on what a tensor holds."""

    feature_info = ({"num_chs": 3},)

    def forward_intermediates(self, images: torch.Tensor, **_: Any) -> Any:
        return [images * images.max().item()]


def test_what_cannot_be_counted_is_refused_and_still_runs() -> None:
    images, needs = torch.rand(1, 3, 4, 4), Needs(hidden=frozenset({0}))
    assert run_vit(Reading(), images, needs).hidden[0].shape == (1, 16, 3)
    with pytest.raises(ConfigError, match="cannot be counted"):
        run_vit(Reading(), images.to("meta"), needs)
