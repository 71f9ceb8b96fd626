"""Hugging Face's ViT and ViTMAE: built from their own config.json, in a folder or on the hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo

from tests.weights.networks import (
    TINY,
    State,
    encoder_of,
    equal,
    features,
    hugging_face,
    mae,
    tiny,
    write,
)
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import ConfigError, DataError
from vitdistill.weights.create import class_names, create_model, describe
from vitdistill.weights.export import export_timm
from vitdistill.weights.load import load_into
from vitdistill.weights.vit_checkpoints import Target

CONFIG = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "qkv_bias": True,
}
LABELS = ("ant", "bee", "cat", "dog", "elk")
HALF = (0.5, 0.5, 0.5)


def written(
    folder: Path,
    state: State,
    model_type: str = "vit",
    preprocessor: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A folder as ``save_pretrained`` leaves it."""
    folder.mkdir()
    config = {**CONFIG, "model_type": model_type, **changes}
    (folder / "config.json").write_text(json.dumps(config))
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


# -- masked autoencoders and classifiers ----------------------------------------------------------


@pytest.mark.parametrize("from_hub", [False, True])
@pytest.mark.parametrize("decoder", [False, True])
def test_a_vitmae_is_built_from_its_own_config(tmp_path, hub, caplog, decoder, from_hub):
    source, images = mae(1), torch.randn(2, 3, 32, 32)
    state = hugging_face(source.state_dict()) if decoder else hugging_face(encoder_of(source), "")
    folder = written(tmp_path / "vit-mae", state, "vit_mae", architectures=["ViTMAEForPreTraining"])
    model = create_model(hub(folder) if from_hub else str(folder))
    assert model.num_classes == 0
    assert torch.equal(features(model, images), source.forward_features(images))
    spec, size = input_spec_of(model), (32, 32)
    imagenet = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (spec.mean, spec.std, spec.image_size) == (*imagenet, size)
    (note,) = caplog.messages
    assert ("of its decoder are not used" in note) == decoder
    assert note.endswith("its norms add 1e-06 to the variance, and its config.json says 1e-12")


def test_a_vitmae_starts_a_student_that_exports(tmp_path: Path) -> None:
    spec = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    folder = written(tmp_path / "mae", hugging_face(mae().state_dict()), "vit_mae", spec)
    student = create_model(f"local-dir:{folder}", num_classes=7, global_pool="avg", image_size=64)
    spec = input_spec_of(student)
    assert (spec.mean, spec.std, spec.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (64, 64))
    architecture, args = describe(str(folder), {"global_pool": "avg", "img_size": 64})
    options = {"architecture": architecture, "model_args": args, "classes": None}
    export_timm(student, tmp_path / "out", input_spec=spec, **options)
    assert equal(create_model(str(tmp_path / "out")).state_dict(), student.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_classifier_answers_as_its_tensors_do_in_timm(tmp_path, hub, qkv_bias):
    source, images = tiny(1, qkv_bias=qkv_bias), torch.randn(2, 3, 32, 32)
    state = hugging_face(source.state_dict())
    folder = written(tmp_path / "vit", state, qkv_bias=qkv_bias, **labelled(LABELS))
    for name in (str(folder), hub(folder)):
        model = create_model(name).eval()
        assert torch.equal(model(images), source(images)) and class_names(model) == LABELS
        assert (input_spec_of(model).mean, input_spec_of(model).std) == (HALF, HALF)
    path = write(tmp_path / "alone.safetensors", state)
    alone = create_model("vit_base_patch16_224", checkpoint=path, qkv_bias=qkv_bias, **TINY)
    assert torch.equal(alone.eval()(images), source(images)) and alone.num_classes == 5


def test_a_classifier_becomes_a_student_of_other_classes(tmp_path: Path, caplog: Any) -> None:
    folder = written(tmp_path / "vit", hugging_face(tiny(1).state_dict()), **labelled(LABELS))
    student = create_model(str(folder), num_classes=3)
    assert student.head.weight.shape == (3, 24) and class_names(student) is None
    assert "its classifier is of other classes: head.weight, head.bias start fresh" in caplog.text
    assert torch.equal(student.norm.weight, tiny(1).norm.weight)


def test_the_pooler_of_a_vitmodel_is_left_out(tmp_path: Path, caplog: Any) -> None:
    pooler = {"pooler.dense.weight": torch.randn(24, 24), "pooler.dense.bias": torch.randn(24)}
    state = {**hugging_face(encoder_of(tiny()), ""), **pooler}
    assert create_model(str(written(tmp_path / "vit", state, architectures=["ViTModel"])))
    assert "; its pooling layer is not used; its norms" in caplog.text


def test_imagenets_classes_are_known_under_their_descriptions(tmp_path: Path) -> None:
    info = ImageNetInfo()
    words = tuple(info.label_descriptions())
    folder = written(tmp_path / "vit", {}, **labelled((*words[:-1], "paper")))
    assert class_names(create_model(str(folder), pretrained=False)) == tuple(info.label_names())
    turned = written(tmp_path / "turned", {}, **labelled(words[::-1]))
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
    model = create_model(str(written(tmp_path / "vit", {}, **changes)), pretrained=False)
    assert model.num_classes == num_classes and class_names(model) == names


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        ({"do_normalize": False, "image_mean": [0.1] * 3}, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ({"do_resize": True}, HALF, HALF),
    ],
)
def test_the_preprocessor_says_the_normalisation(tmp_path, preprocessor, mean, std):
    folder = written(tmp_path / "vit", {}, "vit", preprocessor)
    spec = input_spec_of(create_model(str(folder), pretrained=False))
    assert (spec.mean, spec.std) == (mean, std)


def test_images_that_are_not_square(tmp_path: Path) -> None:
    source = tiny(1, image_size=(16, 24))
    folder = written(tmp_path / "vit", hugging_face(encoder_of(source)), image_size=[16, 24])
    assert equal(create_model(str(folder)).state_dict(), encoder_of(source))
    assert create_model(str(folder), image_size=(24, 24)).pos_embed.shape == (1, 10, 24)


def of_version_5(state: State) -> State:
    """The same tensors under the names of transformers 5, which saves a decoder under them."""
    names = {
        "attention.attention.query": "attention.q_proj",
        "attention.output.dense": "attention.o_proj",
    }
    names |= {"attention.attention.key": "attention.k_proj", "intermediate.dense": "mlp.fc1"}
    names |= {"attention.attention.value": "attention.v_proj", "output.dense": "mlp.fc2"}
    names |= {"encoder.layer.": "layers."}
    renamed = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("new", ["all", "decoder", "encoder"])
@pytest.mark.parametrize("base", ["vit.", ""])
def test_an_autoencoder_of_transformers_5_is_read(tmp_path, base, new):
    source, model = mae(1), mae(2)
    state = hugging_face(source.state_dict(), base)
    chosen = {
        k: v for k, v in state.items() if new == "all" or ("decoder" in k) == (new == "decoder")
    }
    state = {**{k: v for k, v in state.items() if k not in chosen}, **of_version_5(chosen)}
    load_into(Target(model, "file"), state)
    assert equal(model.state_dict(), source.state_dict())
    teacher = create_model(str(written(tmp_path / "mae", state, "vit_mae")))
    assert equal(teacher.state_dict(), encoder_of(source))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_folder_of_several_shards_is_read(tmp_path, suffix):
    state = hugging_face(tiny(1).state_dict())
    folder = written(tmp_path / "vit", {}, **labelled(LABELS))
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-{i + 1:05d}-of-00003.{suffix}" for i in range(3)]
    place = {key: names[i % 3] for i, key in enumerate(state)}
    for name in names:
        write(folder / name, {key: state[key] for key in state if place[key] == name})
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
    assert equal(create_model(str(folder)).state_dict(), tiny(1).state_dict())
    (folder / names[1]).unlink()
    with pytest.raises(DataError, match=names[1]):
        create_model(str(folder))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 5}}']
)
def test_a_damaged_list_of_shards_is_one_sentence(tmp_path, text):
    folder = written(tmp_path / "vit", {})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json"):
        create_model(str(folder))


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": "wide"}, "makes no sense"),
        ({"hidden_size": 0}, "makes no sense"),
        ({"num_hidden_layers": 10**9}, r"config\.json"),
        ({"num_hidden_layers": 1e9}, r"config\.json"),
        ({"id2label": {"0": "a", "2": "c"}}, "makes no sense"),
        ({"id2label": ["a"]}, "makes no sense"),
    ],
)
def test_other_configurations_are_one_sentence(tmp_path, changes, sentence):
    folder = written(tmp_path / "vit", {}, **{"model_type": "vit", **changes})
    with pytest.raises(DataError, match=sentence) as caught:
        create_model(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"image_mean": 0.5}', '{"image_std": ["a"]}'])
def test_a_damaged_preprocessor_is_one_sentence(tmp_path, text):
    folder = written(tmp_path / "vit", {})
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(DataError, match=r"preprocessor_config\.json"):
        create_model(str(folder))


# -- the hub --------------------------------------------------------------------------------------


def test_a_network_of_the_hub_is_described_with_its_own_arguments(tmp_path: Path, hub: Hub) -> None:
    """The first evaluation of a student from there exports it by what `describe` says: fails where
    the saved arguments are left out.
    """
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
    model = create_model("vit_tiny_patch16_224", num_classes=5, **shape).eval()
    options = {"classes": None, "input_spec": input_spec_of(model), "model_args": shape}
    export_timm(model, tmp_path / "first", architecture="vit_tiny_patch16_224", **options)
    name = hub(tmp_path / "first")
    student = create_model(name, num_classes=3, global_pool="avg")
    architecture, args = describe(name, {"global_pool": "avg"})
    assert architecture == "vit_tiny_patch16_224"
    assert {**shape, "img_size": [32, 32]}.items() <= args.items()
    assert describe(name, {"depth": 1})[1]["depth"] == 1
    options["model_args"] = args
    export_timm(student, tmp_path / "second", architecture=architecture, **options)
    assert equal(create_model(str(tmp_path / "second")).state_dict(), student.state_dict())


def test_what_the_hub_does_not_have_is_one_sentence(tmp_path, hub, monkeypatch):
    (tmp_path / "empty").mkdir()
    name = hub(tmp_path / "empty")
    for ask in (lambda: create_model(name), lambda: describe(name, {})):
        with pytest.raises(ConfigError, match=r"some/vit has no config.json"):
            ask()
    folder = written(tmp_path / "vit", {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"has none of model.safetensors"):
        create_model(hub(folder))

    def offline(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(DataError, match=r"cannot be reached \(not in the cache\): without network"):
        describe(name, {})
