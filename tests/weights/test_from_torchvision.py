"""Names and files of torchvision and open_clip."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models

from tests.weights.networks import NAME, TINY, equal, write
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import ConfigError
from vitdistill.vit.families import family_of
from vitdistill.weights.create import carries_weights, class_names, create_model, describe
from vitdistill.weights.export import export_timm

CLIP = "vit_base_patch32_clip_224"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


# -- torchvision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bare", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"]
)
def test_a_name_and_a_file_of_torchvisions(tmp_path: Path, bare: str) -> None:
    source = moved(models.get_model(bare))
    path = write(tmp_path / "w.pth", source.state_dict())
    name = f"torchvision/{bare}"
    model = create_model(name, checkpoint=path).eval()
    assert torch.equal(model(IMAGES), source(IMAGES)) and not carries_weights(name)
    assert class_names(model)[0] == "n01440764" and input_spec_of(model).mean == (
        0.485,
        0.456,
        0.406,
    )
    if bare == "squeezenet1_1":  # its last layer is a convolution
        return
    student = create_model(name, num_classes=5, checkpoint=path).eval()
    options = {"classes": list("abcde"), "input_spec": input_spec_of(student)}
    architecture, args = describe(name, {})
    folder = export_timm(
        student, tmp_path / "out", architecture=architecture, model_args=args, **options
    )
    again = create_model(str(folder))
    assert equal(again.state_dict(), student.state_dict()) and class_names(again) == tuple("abcde")


@pytest.mark.parametrize("other_name", [False, True])
def test_torchvisions_vit_is_timms(tmp_path, monkeypatch, other_name):
    sizes = {"image_size": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 96}
    source = moved(models.VisionTransformer(patch_size=16, num_classes=5, **sizes))
    path = write(tmp_path / "w.pth", source.state_dict())
    name = "vit_tiny_patch16_224" if other_name else "torchvision/vit_b_16"
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "image_size": 32}
    model = create_model(name, checkpoint=path, **small).eval()
    assert (model(IMAGES) - source(IMAGES)).abs().max() < 1e-5 and model.num_classes == 5
    assert family_of(model).network.walks
    assert input_spec_of(model).mean == (0.485, 0.456, 0.406)
    assert create_model(name, num_classes=7, checkpoint=path, **small).num_classes == 7
    assert describe(name, {"depth": 2})[1] == {"depth": 2}


def test_pretrained_weights_of_torchvisions(monkeypatch):
    source = moved(models.get_model("resnet18"))
    weights = models.get_model_weights("resnet18")
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **given: source.state_dict())
    student = create_model("torchvision/resnet18", num_classes=5, pretrained=True)
    assert torch.equal(student.conv1.weight, source.conv1.weight) and student.num_classes == 5
    teacher = create_model("torchvision/resnet18", pretrained=True)
    assert torch.equal(teacher.fc.weight, source.fc.weight)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_b_16", "torchvision/vit_b_16"),
        ("swin_t", "torchvision/swin_t"),
        ("resnet-50", "'resnet50'"),
        ("vit-base-patch16-224", "'vit_base_patch16_224'"),
        ("deit_small", "'deit_small_"),
        ("ViT-B-32", "list_models"),
        ("dinov2_vitb14", "list_models"),
        ("torchvision/resnet_18", "'resnet18'"),
    ],
)
def test_a_name_is_not_taken_for_another_kind_of_network(name, near):
    with pytest.raises(ConfigError) as caught:
        create_model(name)
    assert near in str(caught.value)


# -- open_clip ------------------------------------------------------------------------------------


def open_clip(state: dict[str, torch.Tensor], timms: bool) -> dict[str, torch.Tensor]:
    """The same tensors as open_clip calls them, of its own tower or around one of timm's."""
    found = {"text.weight": torch.zeros(3), "logit_scale": torch.zeros(())}
    swaps = [
        ("patch_embed.proj", "conv1"),
        ("norm_pre", "ln_pre"),
        ("blocks.", "transformer.resblocks."),
    ]
    swaps += [
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
    ]
    swaps += [("mlp.fc2", "mlp.c_proj"), ("norm1", "ln_1"), ("norm2", "ln_2")]
    for key, value in state.items():
        if timms:
            found["visual.head.proj.weight" if key == "head.weight" else f"visual.trunk.{key}"] = (
                value
            )
            continue
        key = key.replace("norm.", "ln_post.") if key.startswith("norm.") else key
        for own, theirs in swaps:
            key = key.replace(own, theirs)
        value = value[0] if key == "pos_embed" else value[0, 0] if key == "cls_token" else value
        key = {"pos_embed": "positional_embedding", "cls_token": "class_embedding"}.get(key, key)
        found["visual.proj" if key == "head.weight" else f"visual.{key}"] = (
            value.T.contiguous() if key == "head.weight" else value
        )
    return {key: value for key, value in found.items() if not key.endswith("head.bias")}


@pytest.mark.parametrize("timms", [False, True])
@pytest.mark.parametrize("width", [16, 40, 0])
def test_a_file_of_open_clips_whatever_its_head(tmp_path, timms, width):
    name = NAME if timms else CLIP
    source = moved(create_model(name, num_classes=width, **TINY))
    if width:
        torch.nn.init.zeros_(source.head.bias)
    path = write(tmp_path / "w.pth", open_clip(source.state_dict(), timms))
    model = create_model(name, checkpoint=path, **TINY).eval()
    assert model.num_classes == width
    assert torch.allclose(model(IMAGES), source(IMAGES), atol=4e-6)
    assert create_model(name, num_classes=5, checkpoint=path, **TINY).num_classes == 5
