"""Students with a token for each teacher: timm's forward exactly, Co-advise's tokens, and what is
refused.
"""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vitdistill.cli import main
from vitdistill.data.augment import InputSpec
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import ConfigError
from vitdistill.vit.families import family_of
from vitdistill.vit.flops import forward_flops
from vitdistill.vit.heads import TokenHeads
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit
from vitdistill.weights.create import create_model
from vitdistill.weights.export import export_onnx, export_timm

SMALL: dict[str, Any] = {
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 7,
    "img_size": 32,
    "patch_size": 8,
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "two learned tokens": ("advised_vit", {}),
    "one": ("advised_vit", {"teachers": ["only"], "base": "deit_tiny_patch16_224"}),
    "three, weighted": ("advised_vit", {"teachers": ["a", "b", "c"], "prediction": [1, 0, 2, 3.5]}),
    "class alone": ("advised_vit", {"prediction": "class"}),
    "class token without position": ("advised_vit", {"base": "deit3_small_patch16_224"}),
    "dynamic size": ("advised_vit", {"dynamic_img_size": True}),
    "oblong": ("advised_vit", {"img_size": (16, 48), "patch_size": (4, 8)}),
    "stems": ("cit_tiny_patch16_224", {}),
    "stems, oblong": ("cit_small_patch16_224", {"img_size": (16, 48), "patch_size": (4, 8)}),
    "stems, weighted": (
        "cit_base_patch16_224",
        {"prediction": [0.5, 0.25, 0.25], "qk_norm": True, "init_values": 1e-5},
    ),
}


def build(form: str) -> tuple[Any, Tensor]:
    name, args = FORMS[form]
    torch.manual_seed(1)
    model: Any = create_model(name, **{**SMALL, **args}).eval()
    with torch.no_grad():
        # Weights that start at zero or one would hide mistakes.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.ndim == 1 and len(buffer) > 4:
                buffer.add_(torch.rand_like(buffer))
    size = (48, 32) if form == "dynamic size" else model.patch_embed.img_size
    return model, torch.randn(3, 3, *size)


def num_patches(model: nn.Module, images: Tensor) -> int:
    rows, columns = family_of(model).grid(images)
    return rows * columns


# --- against timm's forward ----------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_equals_the_models_own_forward(form: str) -> None:
    model, images = build(form)
    whole, names = model(images), ("class", *model.teachers)
    output = run_vit(model, images, Needs(logits=True, hidden=frozenset({1}), features=True))
    assert torch.equal(output.logits, whole)
    assert torch.equal(output.features, model.forward_features(images))
    short = run_vit(model, images, Needs(logits=True, attention=frozenset({-1})))
    assert (short.logits - whole).abs().max() < 1e-5
    assert (short.head_logits - output.head_logits).abs().max() < 1e-5
    assert output.heads == names and output.head_logits.shape == (3, len(names), 7)
    assert output.num_prefix_tokens == len(names)
    assert output.hidden[1].shape[1] == len(names) + num_patches(model, images)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_some_patches_are_those_tokens_alone(form: str) -> None:
    """The teachers' tokens come from the whole image, whatever patches are kept."""
    model, images = build(form)
    count, prefix = num_patches(model, images), len(model.teachers) + 1
    tokens = model._pos_embed(model.patch_embed(images))
    keep = torch.stack([torch.randperm(count)[: max(1, count // 2)] for _ in images])
    index = keep[:, :, None].expand(-1, -1, tokens.shape[-1])
    alone = torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, index)], dim=1)
    expected = model.forward_head(model.norm(model.blocks(model.norm_pre(alone))))
    found = run_vit(model, images, Needs(logits=True), keep).logits
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.whole
@pytest.mark.parametrize("form", ["three, weighted", "stems"])
def test_compiles_as_one_graph(form: str) -> None:
    model, images = build(form)
    needs, keep = Needs(logits=True, attention=frozenset({-1})), torch.arange(4).expand(3, -1)
    compiled = torch.compile(run_vit, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, expected = (run(model, images, needs, keep).logits for run in (compiled, run_vit))
    assert torch.allclose(found, expected, atol=1e-5)


# --- heads ---------------------------------------------------------------------------------------


@given(weights=st.lists(st.integers(0, 8), min_size=3, max_size=3).filter(any))
@torch.no_grad()
def test_the_prediction_is_made_of_logits(weights: list[int]) -> None:
    tokens = torch.randn(2, 5, 6)
    for prediction, share in (("mean", [1, 1, 1]), ("class", [1, 0, 0]), (weights, weights)):
        heads = TokenHeads(6, 4, ["conv", "inv"], prediction)
        each = torch.stack([linear(tokens[:, i]) for i, linear in enumerate(heads.linears)])
        expected = torch.einsum("h,hbc->bc", torch.tensor(share) / sum(share), each)
        assert torch.allclose(heads(tokens), expected, atol=1e-5)
        assert torch.equal(heads.logits(tokens), each.transpose(0, 1))
        named = zip(("class", "conv", "inv"), share, strict=True)
        assert heads.answering == tuple(name for name, weight in named if weight)


@pytest.mark.parametrize(
    "prediction", ["median", "", [], [1, 1], [1, 1, -1], [0, 0, 0], [1, 1, float("nan")]]
)
def test_a_prediction_that_means_nothing_is_refused(prediction: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        TokenHeads(6, 4, ["conv", "inv"], prediction)
    assert caught.value.field == "student.model_args.prediction"


@pytest.mark.parametrize(
    "names", [[], "conv", ["a", "a"], ["class"], ["all"], ["auto"], ["a b"], ["1st"], [""]]
)
def test_names_that_are_none_are_refused(names: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        create_model("advised_vit", teachers=names, **SMALL)
    assert caught.value.field == "student.model_args.teachers"


@pytest.mark.parametrize("form", ["three, weighted", "stems"])
@torch.no_grad()
def test_another_number_of_classes(form: str) -> None:
    model, images = build(form)
    names = model.head.names
    model.train().reset_classifier(0)
    assert model.head.training and family_of(model).network.heads == ("class",)
    assert torch.equal(model.eval()(images), model.forward_features(images))
    model.reset_classifier(4)
    assert model(images).shape == (3, 4) and model.num_classes == 4
    assert model.head.names == family_of(model).network.heads == names


def test_tokens_and_heads_start_as_deits() -> None:
    model: Any = create_model("advised_vit", base="deit_small_patch16_224", depth=1)
    assert model.reg_token.std().item() == pytest.approx(
        0.02, rel=0.15
    ) and model.reg_token.shape == (1, 2, 384)
    assert not torch.equal(model.reg_token[:, 0], model.reg_token[:, 1])
    for linear in model.head.linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()


# --- Co-advise's form ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "parameters", "gmacs"),
    [("tiny", 7_632_906, 2.84), ("small", 25_776_138, 6.50), ("base", 93_913_098, 20.2)],
)
def test_sizes_are_the_authors(size: str, parameters: int, gmacs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"cit_{size}_patch16_224")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert forward_flops(model, (224, 224)) / 2e9 == pytest.approx(gmacs, rel=0.003)


@torch.no_grad()
def test_the_teachers_tokens_are_means_of_the_stems() -> None:
    model, images = build("stems, oblong")
    stems = (model.patch_embed.conv, model.patch_embed.inv)
    conv, inv = (stem(images).flatten(2).transpose(1, 2) for stem in stems)
    cls = model.cls_token.expand(3, -1, -1)
    means = [conv.mean(1, keepdim=True), inv.mean(1, keepdim=True)]
    expected = torch.cat([cls, *means, conv + inv], dim=1) + model.pos_embed
    assert torch.equal(model._pos_embed(model.patch_embed(images)), expected)
    assert expected.shape[1] == 4 * 6 + 3 and model.patch_embed.grid_size == (4, 6)


def test_stems_start_by_kaiming() -> None:
    model: Any = create_model("cit_small_patch16_224", depth=1)
    for conv in (m for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d)):
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.2)
    assert model.patch_embed.conv[-1].kernel_size == model.patch_embed.inv[-1].stride == (8, 8)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


@torch.no_grad()
def test_stochastic_depth_reaches_the_blocks() -> None:
    model: Any = create_model("cit_tiny_patch16_224", drop_path=0.1, **SMALL)
    assert [block.drop_path1.drop_prob for block in model.blocks[1:]] == [pytest.approx(0.1)]


CIT, ADVISED = "cit_tiny_patch16_224", "advised_vit"


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        (CIT, {"img_size": 35, "patch_size": 7}, "of even size"),
        (CIT, {"img_size": 36, "patch_size": 8}, "fill the image"),
        (CIT, {"class_token": False}, "takes no argument 'class_token'"),
        (CIT, {"colour": 1}, "takes no argument 'colour'"),
        (ADVISED, {"reg_tokens": 4}, "takes no argument 'reg_tokens'"),
        (ADVISED, {"base": "resnet18"}, "is no plain ViT"),
        (ADVISED, {"base": "vit_gigantic"}, "is no plain ViT"),
        (ADVISED, {"base": "advised_vit"}, "is no plain ViT"),
        (ADVISED, {"base": "deit_tiny_distilled_patch16_224"}, "is no plain ViT"),
        (ADVISED, {"base": "vit_base_patch16_siglip_224"}, "is no plain ViT with a class token"),
        (ADVISED, {"pretrained": True}, "no pretrained weights"),
        (CIT, {"pretrained": True}, "no pretrained weights"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        create_model(name, **{**SMALL, **args})


def test_stems_can_be_given_another_image_size() -> None:
    model, _ = build("stems")
    model.set_input_size((40, 48))
    assert model(torch.randn(1, 3, 40, 48)).shape == (1, 7) and model.pos_embed.shape[1] == 33


# --- exported ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    ["two learned tokens", "three, weighted", "class alone", "dynamic size", "stems, oblong"],
)
@torch.no_grad()
def test_exports_load_with_the_same_answers(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = build(form)
    name, args = FORMS[form]
    given = {**SMALL, **args}
    spec = InputSpec((images.shape[2], images.shape[3]), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    folder = export_timm(
        model,
        tmp_path / "out",
        architecture=name,
        model_args=given,
        classes=tuple("abcdefg"),
        input_spec=spec,
    )
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(theirs(images), model(images)) and theirs.head.names == model.head.names
    fresh: Any = create_model(str(folder), num_classes=4).eval()
    assert fresh(images).shape == (3, 4) and fresh.head.names == model.head.names
    assert torch.equal(fresh.forward_features(images), model.forward_features(images))
    assert main(["export", str(folder), "--output", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert (
        f"after 'import vitdistill.models.advised', because plain timm does not know {name}" in said
        and said.count("\n") == 1
    )


@pytest.mark.whole
@pytest.mark.parametrize("form", ["two learned tokens", "stems"])
def test_onnx(form: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, _ = build(form)
    assert export_onnx(model, tmp_path / "model.onnx", input_spec_of(model)) < 1e-4
