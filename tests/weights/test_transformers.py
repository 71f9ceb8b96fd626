"""Networks of Hugging Face's transformers, tiny and random: answers and tokens are transformers' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitdistill.data.model_input import input_spec_of
from vitdistill.distill.distiller import Distiller
from vitdistill.errors import ConfigError, DataError
from vitdistill.vit.flops import forward_flops
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit
from vitdistill.weights.adopted import adopt
from vitdistill.weights.create import class_names, create_model, describe
from vitdistill.weights.export import export_timm

library = pytest.importorskip("transformers")

VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
VIT |= {"patch_size": 8, "intermediate_size": 96, "layer_norm_eps": 1e-6}
STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "image_size": 32}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
HIERA = {"image_size": [32, 32], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
HIERA |= {"query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [4, 4]}
TEXT = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
TEXT |= {"intermediate_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TWO = {"vision_config": VIT, "text_config": TEXT}
NAFLEX = {"vision_config": {**VIT, "num_patches": 16}, "text_config": TEXT}
WIDE = {key: VIT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
DINO = {**WIDE, "image_size": 32, "patch_size": 8}

# Configuration, the class of a network with a classifier and of one without, whether timm's plain
# ViT has the layout of each.
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, str], tuple[bool, bool]]] = {
    "vit": ("ViT", VIT, ("ViTForImageClassification", "ViTModel"), (True, True)),
    "deit": ("DeiT", VIT, ("DeiTForImageClassification", "DeiTModel"), (True, True)),
    "deit-two": ("DeiT", VIT, ("DeiTForImageClassificationWithTeacher", "DeiTModel"), (True, True)),
    "dinov2": ("Dinov2", DINO, ("Dinov2ForImageClassification", "Dinov2Model"), (False, True)),
    "dinov2-swiglu": (
        "Dinov2",
        {**DINO, "use_swiglu_ffn": True},
        ("Dinov2ForImageClassification", "Dinov2Model"),
        (False, True),
    ),
    "dinov2-registers": (
        "Dinov2WithRegisters",
        DINO,
        ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersModel"),
        (False, True),
    ),
    "msn": ("ViTMSN", VIT, ("ViTMSNForImageClassification", "ViTMSNModel"), (True, True)),
    "ijepa": ("IJepa", VIT, ("IJepaForImageClassification", "IJepaModel"), (True, True)),
    "dinov3": (
        "DINOv3ViT",
        {**VIT, "num_register_tokens": 4},
        ("", "DINOv3ViTModel"),
        (False, False),
    ),
    "dinov3-convnext": ("DINOv3ConvNext", STAGES, ("", "DINOv3ConvNextModel"), (False, False)),
    "beit": ("Beit", VIT, ("BeitForImageClassification", "BeitModel"), (False, False)),
    "siglip": ("Siglip", TWO, ("SiglipForImageClassification", "SiglipModel"), (False, False)),
    "siglip2": (
        "Siglip2",
        NAFLEX,
        ("Siglip2ForImageClassification", "Siglip2Model"),
        (False, False),
    ),
    "clip": ("CLIP", TWO, ("CLIPForImageClassification", "CLIPModel"), (False, False)),
    "swin": (
        "Swin",
        {**SWIN, "window_size": 4},
        ("SwinForImageClassification", "SwinModel"),
        (False, False),
    ),
    "convnext": (
        "ConvNext",
        STAGES,
        ("ConvNextForImageClassification", "ConvNextModel"),
        (False, False),
    ),
    "hiera": ("Hiera", HIERA, ("HieraForImageClassification", "HieraModel"), (False, False)),
    "resnet": (
        "ResNet",
        {**STAGES, "embedding_size": 8, "layer_type": "basic"},
        ("ResNetForImageClassification", "ResNetModel"),
        (False, False),
    ),
}
CASES = [(kind, i) for kind, (_, _, classes, _) in KINDS.items() for i in range(2) if classes[i]]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PREPROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True}
PREPROCESSOR |= {"size": {"height": 32, "width": 32}}


def saved(folder: Path, kind: str, i: int) -> Any:
    """A random network in evaluation mode, and in a folder as transformers saves it."""
    name, sizes, classes, _ = KINDS[kind]
    labels = {} if i else {"id2label": {0: "ant", 1: "bee", 2: "cat"}}
    torch.manual_seed(0)
    network = getattr(library, classes[i])(
        getattr(library, f"{name}Config")(**sizes, **labels)
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return network


@torch.no_grad()
def own_answer(network: Any, kind: str) -> Any:
    """What transformers itself answers; of two towers, what the one of images does."""
    given = {"pixel_values": IMAGES}
    if kind == "siglip2":
        patches = IMAGES.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3)
        given = {"pixel_values": patches.flatten(1, 2)}
        given |= {"pixel_attention_mask": torch.ones(2, 16, dtype=torch.int32)}
        given |= {"spatial_shapes": torch.tensor([[4, 4]] * 2)}
    network = (
        network
        if hasattr(network, "classifier") or not hasattr(network, "vision_model")
        else network.vision_model
    )
    return network(**given, output_hidden_states=True)


def tokens_of(states: Tensor, kind: str) -> Tensor:
    if kind == "hiera":
        return states.flatten(1, 2)
    return states if states.ndim == 3 else states.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("kind", "i"), CASES)
def test_answers_and_tokens_are_transformers_own(tmp_path, kind, i):
    expected = own_answer(saved(tmp_path, kind, i), kind)
    model = create_model(str(tmp_path)).eval()
    with torch.no_grad():
        output = run_vit(model, IMAGES, Needs(not i, frozenset({0, 1}), features=True))
    assert output.network.walks == KINDS[kind][3][i]
    if not i:
        assert (output.logits - expected.logits).abs().max() < 1e-5
        assert torch.allclose(model(IMAGES), output.logits, atol=1e-5)
        assert class_names(model) == ("ant", "bee", "cat")
    states = (expected.get("reshaped_hidden_states") or expected.hidden_states)[1:]
    assert output.network.depth == len(states)
    first = tokens_of(states[0], kind)
    assert (output.hidden[0] - first).abs().max() < 1e-5 * max(1, first.abs().max())
    assert output.network.has_class_token == (output.network.num_prefix_tokens > 0)
    if i:
        last = expected.last_hidden_state
        last = last if last.ndim == 3 else last.flatten(2).transpose(1, 2)
        assert (output.features - last[:, -output.features.shape[1] :]).abs().max() < 2e-5
    spec = input_spec_of(model)
    assert (spec.mean, spec.std, spec.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (32, 32))
    # SigLIP2 of any grid reads its shape from a tensor, which has none while costs are counted.
    assert (forward_flops(model, (32, 32)) > 0) != (kind == "siglip2")


@pytest.mark.parametrize("kind", ["dinov2", "dinov2-registers", "deit", "ijepa"])
def test_what_has_timms_layout_runs_on_a_part_of_its_patches(tmp_path, kind):
    saved(tmp_path, kind, 1)
    model = create_model(str(tmp_path)).eval()
    keep = torch.stack([torch.randperm(16), torch.randperm(16)])
    needs = Needs(features=True)
    whole, part = (run_vit(model, IMAGES, needs, k).features for k in (None, keep))
    prefix = whole.shape[1] - 16
    assert torch.allclose(part[:, :prefix], whole[:, :prefix], atol=1e-5)


@pytest.mark.parametrize("kind", ["beit", "swin", "clip", "resnet", "vit"])
def test_a_student_gets_a_head_of_its_own_and_is_exported(tmp_path, kind):
    saved(tmp_path / "teacher", kind, 0)
    student = create_model(str(tmp_path / "teacher"), num_classes=5)
    assert student(IMAGES).shape == (2, 5)
    student(IMAGES).sum().backward()
    name, args = describe(str(tmp_path / "teacher"), {})
    options = {"classes": None, "input_spec": input_spec_of(student), "architecture": name}
    export_timm(student.eval(), tmp_path / "out", model_args=args, **options)
    assert torch.equal(create_model(str(tmp_path / "out")).eval()(IMAGES), student(IMAGES))


def test_a_network_of_transformers_may_come_from_a_factory_or_into_a_loop(tmp_path: Path) -> None:
    network = saved(tmp_path, "swin", 0)
    model = adopt(network, "the teacher")
    assert model.num_classes == 3 and input_spec_of(model).image_size == (32, 32)
    assert torch.allclose(model(IMAGES), network(IMAGES).logits, atol=1e-5)
    distiller = Distiller(create_model("test_vit", num_classes=3, image_size=32), network, ["kd"])
    assert distiller(IMAGES)["loss"].isfinite()


def test_a_wrapper_around_a_network_of_timms_is_one_of_timms(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    config = library.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=3, do_pooling=True
    )
    network = library.TimmWrapperForImageClassification(config).eval()
    network.save_pretrained(tmp_path)
    model = create_model(str(tmp_path)).eval()
    assert torch.allclose(model(IMAGES), network(IMAGES).logits, atol=1e-5)
    assert run_vit(model, IMAGES, Needs(logits=True)).network.walks


def test_sizes_follow_the_preprocessor(tmp_path: Path) -> None:
    saved(tmp_path, "convnext", 0)
    file = tmp_path / "preprocessor_config.json"
    crop = {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": 48}
    for said, size, crop_pct, mode in (
        (crop, (48, 48), 0.75, "center"),
        ({"size": {"shortest_edge": 64}, "crop_pct": 0.875}, (64, 64), 0.875, "center"),
        ({"size": {"height": 64, "width": 32}}, (64, 32), 1.0, "squash"),
        ({"size": 64, "do_normalize": False}, (64, 64), 1.0, "center"),
    ):
        file.write_text(json.dumps(said))
        spec = input_spec_of(create_model(str(tmp_path)))
        assert (spec.image_size, spec.crop_pct, spec.crop_mode) == (size, crop_pct, mode)
        assert spec.mean == ((0.0,) * 3 if "do_normalize" in said else (0.485, 0.456, 0.406))


def test_what_cannot_be_had_is_one_sentence(tmp_path, monkeypatch):
    saved(tmp_path, "dinov3", 1)
    with pytest.raises(ConfigError) as caught:
        create_model(str(tmp_path), num_classes=5)
    assert "\n" not in str(caught.value)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "no_such"}))
    with pytest.raises(ConfigError, match="no_such"):
        create_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    with pytest.raises(DataError):
        create_model(str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"vitdistill\[transformers\]"):
        create_model(str(tmp_path))
