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
from vitdistill.distill.plan import make_plan
from vitdistill.errors import ConfigError
from vitdistill.explain.cost import cost_of
from vitdistill.explain.text import explain
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.runs.networks import without_memory
from vitdistill.vit.families import describe_network, family_of
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
        for (
            parameter
        ) in model.parameters():  # weights that start at zero or one would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.ndim == 1 and len(buffer) > 4:
                buffer.add_(torch.rand_like(buffer))
    return model, torch.randn(
        3, 3, *((48, 32) if form == "dynamic size" else model.patch_embed.img_size)
    )


def grid_of(model: nn.Module, images: Tensor) -> int:
    rows, columns = family_of(model).grid(images)
    return rows * columns


# --- against timm's forward ----------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_equals_the_models_own_forward(form: str) -> None:
    model, images = build(form)
    whole = model(images)
    output = run_vit(model, images, Needs(logits=True, hidden=frozenset({0, -1})))
    assert torch.equal(output.logits, whole)
    assert torch.equal(
        run_vit(model, images, Needs(features=True)).features, model.forward_features(images)
    )
    short = run_vit(model, images, Needs(logits=True, attention=frozenset({-1})))
    assert (short.logits - whole).abs().max() < 1e-5 and (
        short.head_logits - output.head_logits
    ).abs().max() < 1e-5
    assert output.heads == family_of(model).network.heads == ("class", *model.teachers)
    assert output.num_prefix_tokens == len(output.heads) and output.head_logits.shape == (
        3,
        len(output.heads),
        7,
    )
    assert output.hidden[1].shape[1] == len(output.heads) + grid_of(model, images)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_some_patches_are_those_tokens_alone(form: str) -> None:
    """The teachers' tokens come from the whole image, whatever patches are kept."""
    model, images = build(form)
    count = grid_of(model, images)
    tokens = model._pos_embed(model.patch_embed(images))
    prefix = len(model.teachers) + 1
    assert tokens.shape[1] == prefix + count
    for kept in (max(1, count // 2), count):
        keep = torch.stack([torch.randperm(count)[:kept] for _ in images])
        index = keep[:, :, None].expand(-1, -1, tokens.shape[-1])
        alone = torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, index)], dim=1)
        expected = model.forward_head(model.norm(model.blocks(model.norm_pre(alone))))
        assert (
            run_vit(model, images, Needs(logits=True), keep).logits - expected
        ).abs().max() < 1e-5
    assert (expected - model(images)).abs().max() < 1e-5


@pytest.mark.whole
@pytest.mark.parametrize("form", ["three, weighted", "stems"])
def test_compiles_as_one_graph(form: str) -> None:
    model, images = build(form)
    needs, keep = Needs(logits=True, attention=frozenset({-1})), torch.arange(4).expand(3, -1)
    compiled = torch.compile(run_vit, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(
            compiled(model, images, needs, keep).logits,
            run_vit(model, images, needs, keep).logits,
            atol=1e-5,
        )


# --- heads ---------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    weights=st.lists(st.integers(0, 8), min_size=3, max_size=3).filter(any),
)
@torch.no_grad()
def test_the_prediction_is_made_of_logits(seed: int, weights: list[int]) -> None:
    torch.manual_seed(seed)
    tokens = torch.randn(2, 5, 6)
    for prediction in ("mean", "class", weights):
        heads = TokenHeads(6, 4, ["conv", "inv"], prediction)
        each = torch.stack(
            [tokens[:, i] @ heads.linears[i].weight.T + heads.linears[i].bias for i in range(3)]
        )
        share = {"mean": [1, 1, 1], "class": [1, 0, 0]}.get(str(prediction), weights)
        expected = sum(w * logits for w, logits in zip(share, each, strict=True)) / sum(share)
        assert torch.allclose(heads(tokens), expected, atol=1e-5) and torch.allclose(
            heads.logits(tokens), each.transpose(0, 1), atol=1e-6
        )
        assert heads.answering == tuple(
            name for name, w in zip(("class", "conv", "inv"), share, strict=True) if w
        )
    assert set(heads.state_dict()) == {
        f"linears.{i}.{part}" for i in range(3) for part in ("weight", "bias")
    }


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
    with pytest.raises(ConfigError, match="give a list of distinct names"):
        create_model("advised_vit", teachers=names, **SMALL)


@pytest.mark.parametrize("form", ["three, weighted", "stems"])
@torch.no_grad()
def test_another_number_of_classes(form: str) -> None:
    model, images = build(form)
    names = model.head.names
    model.reset_classifier(4)
    assert (
        model(images).shape == (3, 4)
        and model.head.names == family_of(model).network.heads == names
        and model.num_classes == 4
    )
    model.train().reset_classifier(0)
    assert (
        model.head.training
        and model.eval()(images).shape == model.forward_features(images).shape
        and family_of(model).network.heads == ("class",)
    )
    assert torch.equal(
        run_vit(model, images, Needs(features=True)).features, model.forward_features(images)
    )
    model.reset_classifier(3)
    assert model(images).shape == (3, 3) and model.head.names == names
    with pytest.raises(ConfigError, match="does not pool"):
        model.reset_classifier(3, "avg")
    name, args = FORMS[form]
    assert create_model(name, **{**SMALL, **args, "num_classes": 0}).num_classes == 0


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
    with without_memory():
        model = timm.create_model(f"cit_{size}_patch16_224")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert forward_flops(model, (224, 224)) / 2e9 == pytest.approx(gmacs, rel=0.003)


@torch.no_grad()
def test_the_teachers_tokens_are_means_of_the_stems() -> None:
    model, images = build("stems, oblong")
    conv, inv = (
        stem(images).flatten(2).transpose(1, 2)
        for stem in (model.patch_embed.conv, model.patch_embed.inv)
    )
    rest = [
        model.cls_token.expand(3, -1, -1),
        conv.mean(1, keepdim=True),
        inv.mean(1, keepdim=True),
        conv + inv,
    ]
    assert conv.shape == inv.shape == (3, 4 * 6, 48) and model.pos_embed.shape == (1, 4 * 6 + 3, 48)
    assert torch.equal(
        model._pos_embed(model.patch_embed(images)), torch.cat(rest, dim=1) + model.pos_embed
    )
    assert model.reg_token is None and model.patch_embed.grid_size == (4, 6)


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
        (CIT, {"img_size": 35, "patch_size": 7}, "even patch size"),
        (CIT, {"img_size": 36, "patch_size": 8}, "36 x 36 pixels into patches of 8 x 8"),
        (CIT, {"dynamic_img_size": True}, "decides dynamic_img_size itself"),
        (CIT, {"class_token": False}, "decides class_token itself"),
        (CIT, {"global_pool": "avg"}, "decides global_pool itself"),
        (CIT, {"colour": 1}, "takes no argument 'colour'"),
        (ADVISED, {"reg_tokens": 4}, "decides reg_tokens itself"),
        (ADVISED, {"base": "resnet18"}, "is no plain ViT"),
        (ADVISED, {"base": "vit_gigantic"}, "is no plain ViT"),
        (ADVISED, {"base": "advised_vit"}, "is no plain ViT"),
        (ADVISED, {"base": "deit_tiny_distilled_patch16_224"}, "is a VisionTransformerDistilled"),
        (ADVISED, {"base": "vit_small_patch14_reg4_dinov2"}, "has register tokens"),
        (ADVISED, {"base": "vit_base_patch16_siglip_224"}, "has no class token"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        create_model(name, **{**SMALL, **args})


def test_weights_that_are_not_there_and_images_of_another_size_are_refused() -> None:
    for name in ("advised_vit", "cit_tiny_patch16_224"):
        with pytest.raises(ConfigError, match="no pretrained weights"):
            create_model(name, pretrained=True)
    with pytest.raises(ConfigError, match="no pretrained weights"):
        timm.create_model("advised_vit", pretrained=True)
    model, _ = build("stems")
    with pytest.raises(ConfigError, match="images are 40 x 32, and the student takes 32 x 32"):
        model(torch.randn(1, 3, 40, 32))
    model.set_input_size((40, 48))
    assert model(torch.randn(1, 3, 40, 48)).shape == (1, 7) and model.pos_embed.shape[1] == 33
    with pytest.raises(ConfigError, match="cannot be given another"):
        model.set_input_size(patch_size=4)


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


def test_networks_of_timm_need_no_import(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, args, says in (
        ("vit_tiny_patch16_224", SMALL, False),
        ("rednet26", {"channels": [16, 16, 16, 16], "stem_width": 16, "num_classes": 7}, True),
    ):
        model = create_model(name, **args)
        spec = InputSpec((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
        folder = export_timm(
            model,
            tmp_path / name,
            architecture=name,
            model_args=args,
            classes=None,
            input_spec=spec,
        )
        assert main(["export", str(folder), "--output", str(tmp_path / f"{name}_again")]) == 0
        assert ("import vitdistill.models.involution" in capsys.readouterr().out) == says


def test_stems_have_a_line_in_the_costs() -> None:
    for name, shown in (("cit_tiny_patch16_224", True), ("advised_vit", False)):
        with without_memory():
            model = timm.create_model(name, num_classes=10)
        plan = make_plan(
            describe_network(model, "student", name, (224, 224)),
            {},
            {"ce": CrossEntropy(head="all")},
        )
        text = explain(plan, cost_of(plan, model, {}), 100, 1)
        assert ("of which the stems (patch embedding)" in text) == shown
        assert not shown or "of the student)" in text
