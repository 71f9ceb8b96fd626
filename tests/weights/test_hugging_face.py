"""Hugging Face's ViT and ViTMAE: built from their own config.json, with the answers their
definition gives.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import Tensor

from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import ConfigError, DataError
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit
from vitdistill.weights.create import class_names, create_model, describe
from vitdistill.weights.export import export_timm

CONFIG = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 60,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "qkv_bias": True,
}
LABELS = ("ant", "bee", "cat", "dog", "elk")
HALF = (0.5, 0.5, 0.5)


def encoder(
    prefix: str, grid: tuple[int, int] = (4, 4), qkv_bias: bool = True
) -> dict[str, Tensor]:
    """Random tensors under the names of transformers' ViT, nothing at its initial value."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, 24),
        "embeddings.position_embeddings": (1, 1 + grid[0] * grid[1], 24),
        "embeddings.patch_embeddings.projection.weight": (24, 3, 8, 8),
        "embeddings.patch_embeddings.projection.bias": (24,),
        "layernorm.weight": (24,),
        "layernorm.bias": (24,),
    }
    for i in range(2):
        layer = f"encoder.layer.{i}"
        linears = {
            f"attention.attention.{part}": (24, 24) for part in ("query", "key", "value")
        } | {"attention.output.dense": (24, 24)}
        for name, size in (
            linears | {"intermediate.dense": (60, 24), "output.dense": (24, 60)}
        ).items():
            shapes[f"{layer}.{name}.weight"] = size
            if qkv_bias or "attention.attention" not in name:
                shapes[f"{layer}.{name}.bias"] = size[:1]
        for norm in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{layer}.{norm}.weight": (24,), f"{layer}.{norm}.bias": (24,)}
    return {
        prefix + name: 0.3 * torch.randn(shape) + ("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def classifier(**changes: Any) -> dict[str, Tensor]:
    state = encoder("vit.", **changes)
    return {**state, "classifier.weight": torch.randn(5, 24), "classifier.bias": torch.randn(5)}


def autoencoder() -> dict[str, Tensor]:
    """ViTMAEForPreTraining's, of whose decoder the names alone matter."""
    decoder = {
        "mask_token": (1, 1, 16),
        "decoder_pos_embed": (1, 17, 16),
        "decoder_embed.weight": (16, 24),
        "decoder_pred.bias": (192,),
    }
    return {
        **encoder("vit."),
        **{f"decoder.{name}": torch.randn(shape) for name, shape in decoder.items()},
    }


def features_of(
    state: dict[str, Tensor], images: Tensor, prefix: str = "vit.", epsilon: float = 1e-12
) -> Tensor:
    """What transformers' ViT computes, written out: pre-norm blocks, exact GELU, the norm last."""
    state = {name.removeprefix(prefix): tensor.double() for name, tensor in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]

    projection = "embeddings.patch_embeddings.projection"
    filters = state[f"{projection}.weight"], state[f"{projection}.bias"]
    x = F.conv2d(images.double(), *filters, stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + state["embeddings.position_embeddings"]
    for i in range(2):
        layer = f"encoder.layer.{i}"
        y = norm(f"{layer}.layernorm_before", x)
        parts = [
            linear(f"{layer}.attention.attention.{part}", y).unflatten(2, (3, 8))
            for part in ("query", "key", "value")
        ]
        scores = torch.einsum("bihd,bjhd->bhij", parts[0], parts[1]) / 8**0.5
        context = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), parts[2]).flatten(2)
        x = x + linear(f"{layer}.attention.output.dense", context)
        y = linear(f"{layer}.intermediate.dense", norm(f"{layer}.layernorm_after", x))
        x = x + linear(f"{layer}.output.dense", y * (1 + torch.erf(y / 2**0.5)) / 2)
    return norm("layernorm", x)


def written(
    folder: Path,
    state: dict[str, Tensor],
    model_type: str,
    preprocessor: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A folder as ``save_pretrained`` leaves it."""
    folder.mkdir()
    config = {**CONFIG, "model_type": model_type, **changes}
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(state))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def labelled(labels: tuple[str, ...]) -> dict[str, Any]:
    """What ViTForImageClassification's config.json has besides; JSON sorts its keys as text."""
    return {
        "architectures": ["ViTForImageClassification"],
        "id2label": dict(sorted((str(i), label) for i, label in enumerate(labels))),
    }


@torch.no_grad()
def recorded(model: torch.nn.Module, images: Tensor) -> Tensor:
    found = run_vit(model.eval(), images, Needs(features=True)).features
    assert found is not None
    return found


Hub = Callable[[Path], str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """Serves a folder as a repository of the hub, of which the download alone is not real."""

    def serve(folder: Path) -> str:
        def download(repo: str, filename: str, revision: str | None = None) -> str:
            assert repo == "some/vit"
            if not (folder / filename).is_file():
                raise EntryNotFoundError(f"404 {filename}")
            snapshot = tmp_path / "cache"
            snapshot.mkdir(exist_ok=True)
            return shutil.copy(folder / filename, snapshot / filename)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return "hf-hub:some/vit"

    return serve


# -- masked autoencoders --------------------------------------------------------------------------


@pytest.mark.parametrize("from_hub", [False, True])
@pytest.mark.parametrize("decoder", [False, True])
def test_a_vitmae_is_built_from_its_own_config(tmp_path, hub, caplog, decoder, from_hub):
    state = autoencoder() if decoder else encoder("")
    folder = written(tmp_path / "vit-mae", state, "vit_mae", architectures=["ViTMAEForPreTraining"])
    name = hub(folder) if from_hub else str(folder)
    model = create_model(name)
    images = torch.randn(2, 3, 32, 32)
    expected = features_of(state, images, "vit." if decoder else "")
    assert torch.allclose(recorded(model, images).double(), expected, atol=1e-4)
    assert expected.std() > 0.3
    spec = input_spec_of(model)
    assert (spec.mean, spec.std, spec.image_size) == (
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
        (32, 32),
    )
    assert model.num_classes == 0
    (note,) = caplog.messages
    said = "its names are Hugging Face's, and were translated"
    assert said + "; 4 tensors of its decoder are not used" * decoder in note
    assert note.endswith("its norms add 1e-06 to the variance, and its config.json says 1e-12")


def test_a_vitmae_starts_a_student_that_exports(tmp_path: Path, caplog: Any) -> None:
    folder = written(
        tmp_path / "vit-mae",
        autoencoder(),
        "vit_mae",
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    )
    student = create_model(f"local-dir:{folder}", num_classes=7, global_pool="avg", image_size=64)
    assert "head.weight, head.bias start fresh; its final norm is not used" in caplog.text
    assert "from 4 x 4 patches to 8 x 8" in caplog.text
    spec = input_spec_of(student)
    assert (spec.mean, spec.std, spec.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (64, 64))
    architecture, args = describe(str(folder), {"global_pool": "avg", "img_size": 64})
    options = {"architecture": architecture, "model_args": args, "classes": None}
    export_timm(student, tmp_path / "out", input_spec=spec, **options)
    again = create_model(str(tmp_path / "out"))
    assert torch.equal(again(torch.ones(1, 3, 64, 64)), student.eval()(torch.ones(1, 3, 64, 64)))


# -- classifiers ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_classifier_answers_as_by_its_definition(tmp_path, hub, caplog, qkv_bias):
    state, images = classifier(qkv_bias=qkv_bias), torch.randn(2, 3, 32, 32)
    folder = written(tmp_path / "vit", state, "vit", qkv_bias=qkv_bias, **labelled(LABELS))
    expected = F.linear(
        features_of(state, images)[:, 0],
        state["classifier.weight"].double(),
        state["classifier.bias"].double(),
    )
    for name in (str(folder), hub(folder)):
        model = create_model(name).eval()
        assert torch.allclose(model(images).double(), expected, atol=1e-3) and expected.std() > 1
        assert class_names(model) == LABELS
        assert (input_spec_of(model).mean, input_spec_of(model).std) == (HALF, HALF)


@torch.no_grad()
def test_a_classifiers_file_alone_is_taken_under_a_timm_name(tmp_path):
    folder = written(tmp_path / "vit", classifier(), "vit", **labelled(LABELS))
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
    options = {"checkpoint": folder / "model.safetensors", "mlp_ratio": 2.5, **shape}
    model = create_model("vit_base_patch16_224", **options).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), create_model(str(folder)).eval()(images))
    assert model.num_classes == 5


def test_a_classifier_becomes_a_student_of_other_classes(tmp_path: Path, caplog: Any) -> None:
    folder = written(tmp_path / "vit", classifier(), "vit", **labelled(LABELS))
    student = create_model(str(folder), num_classes=3)
    assert student.head.weight.shape == (3, 24) and class_names(student) is None
    assert "its classifier is of other classes: head.weight, head.bias start fresh" in caplog.text
    assert torch.equal(student.norm.weight, create_model(str(folder)).norm.weight)


def test_the_pooler_of_a_vitmodel_is_left_out(tmp_path: Path, caplog: Any) -> None:
    pooler = {"pooler.dense.weight": torch.randn(24, 24), "pooler.dense.bias": torch.randn(24)}
    folder = written(tmp_path / "vit", {**encoder(""), **pooler}, "vit", architectures=["ViTModel"])
    assert create_model(str(folder)).num_classes == 0
    assert "; its pooler is not used; its norms" in caplog.text


def test_imagenets_classes_are_known_under_their_descriptions(tmp_path: Path) -> None:
    info = ImageNetInfo()
    words = tuple(info.label_descriptions())
    folder = written(tmp_path / "vit", {}, "vit", **labelled((*words[:-1], "paper")))
    assert class_names(create_model(str(folder), pretrained=False)) == tuple(info.label_names())
    turned = written(tmp_path / "turned", {}, "vit", **labelled(words[::-1]))
    assert class_names(create_model(str(turned), pretrained=False)) == words[::-1]


@pytest.mark.parametrize(
    ("changes", "num_classes", "names"),
    [
        # Two classes are transformers' default, and not written.
        ({"architectures": ["ViTForImageClassification"]}, 2, None),
        (labelled(("LABEL_0", "LABEL_1", "LABEL_2")), 3, None),
        ({"id2label": {"1": "b", "0": "a"}}, 2, ("a", "b")),
        ({"architectures": ["ViTModel"], "id2label": {"0": "a"}}, 0, None),
        ({}, 0, None),
    ],
)
def test_how_many_classes_a_config_speaks_of(tmp_path, changes, num_classes, names):
    model = create_model(str(written(tmp_path / "vit", {}, "vit", **changes)), pretrained=False)
    assert model.num_classes == num_classes and class_names(model) == names


MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        ({"image_mean": MEAN, "image_std": STD}, tuple(MEAN), tuple(STD)),
        ({"do_normalize": False, "image_mean": MEAN}, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ({"do_resize": True}, HALF, HALF),
    ],
)
def test_the_preprocessor_says_the_normalisation(tmp_path, hub, preprocessor, mean, std):
    folder = written(tmp_path / "vit", {}, "vit", preprocessor)
    for name in (str(folder), hub(folder)):
        spec = input_spec_of(create_model(name, pretrained=False))
        assert (spec.mean, spec.std) == (mean, std)


def test_images_that_are_not_square(tmp_path: Path) -> None:
    state, images = encoder("", grid=(2, 3)), torch.randn(1, 3, 16, 24)
    model = create_model(str(written(tmp_path / "vit", state, "vit", image_size=[16, 24])))
    assert torch.allclose(
        recorded(model, images).double(), features_of(state, images, ""), atol=1e-4
    )
    wide = create_model(str(tmp_path / "vit"), image_size=(24, 24))
    assert wide.pos_embed.shape == (1, 10, 24)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "dinov2"}, "of model_type dinov2"),
        ({"hidden_act": "quick_gelu"}, "hidden_act quick_gelu"),
        ({"hidden_size": "wide"}, "is not a ViT's"),
        ({"hidden_size": 0}, "is not a ViT's"),
        ({"id2label": {"0": "a", "2": "c"}}, "is not a ViT's"),
        ({"id2label": ["a"]}, "is not a ViT's"),
    ],
)
def test_other_configurations_are_one_sentence(tmp_path, changes, sentence):
    folder = written(tmp_path / "vit", encoder(""), **{"model_type": "vit", **changes})
    with pytest.raises(DataError, match=sentence) as caught:
        create_model(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"image_mean": 0.5}', '{"image_std": ["a"]}'])
def test_a_damaged_preprocessor_is_one_sentence(tmp_path, text):
    folder = written(tmp_path / "vit", encoder(""), "vit")
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(DataError, match=r"preprocessor_config\.json"):
        create_model(str(folder))


# -- the hub --------------------------------------------------------------------------------------


def test_a_network_of_the_hub_is_described_with_its_own_arguments(tmp_path: Path, hub: Hub) -> None:
    """The first evaluation of a student from there exports it by what `describe` says: fails where
    the saved arguments are left out.
    """
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=5, **shape).eval()
    options = {"classes": None, "input_spec": input_spec_of(model)}
    timm_name = "vit_tiny_patch16_224"
    export_timm(model, tmp_path / "first", architecture=timm_name, model_args=shape, **options)
    name = hub(tmp_path / "first")
    student = create_model(name, num_classes=3, global_pool="avg")
    architecture, args = describe(name, {"global_pool": "avg"})
    assert architecture == "vit_tiny_patch16_224"
    assert {**shape, "img_size": [32, 32]}.items() <= args.items()
    assert describe(name, {"depth": 1})[1]["depth"] == 1
    export_timm(student, tmp_path / "second", architecture=architecture, model_args=args, **options)
    assert torch.equal(
        create_model(str(tmp_path / "second")).blocks[0].attn.qkv.weight,
        model.blocks[0].attn.qkv.weight,
    )


def test_what_the_hub_does_not_have_is_one_sentence(tmp_path, hub, monkeypatch):
    (tmp_path / "empty").mkdir()
    name = hub(tmp_path / "empty")
    for ask in (lambda: create_model(name), lambda: describe(name, {})):
        with pytest.raises(ConfigError, match=r"some/vit has no config.json"):
            ask()
    folder = written(tmp_path / "vit", {}, "vit")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"has none of model.safetensors"):
        create_model(hub(folder))

    def offline(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        DataError, match=r"cannot be reached \(not in the cache\): without network, download"
    ):
        describe(name, {})
