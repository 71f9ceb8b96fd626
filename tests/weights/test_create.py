"""Networks by name, and the settings they are built with."""

import json

import pytest
import timm
import torch

from tests.weights.networks import NAME, TINY, equal, hugging_face, tiny, without, write
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import ConfigError, DataError, UserError
from vitdistill.weights.create import class_names, create_model
from vitdistill.weights.export import export_timm


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("vit_tinny_patch16_224", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("qqqqqqqqqq", {}, "list_models"),
        (NAME + ".nosuch", {}, "'nosuch': choose from augreg_in21k_ft_in1k"),
        (NAME, {"fooo": 1}, "takes no argument 'fooo'"),
        (NAME, {"embed_dim": 193}, "cannot be built with embed_dim=193"),
        (NAME, {"image_size": 30}, "16 x 16, which do not fill 30 x 30"),
        (NAME, {"drop_path": 0.1, "drop_path_rate": 0.2}, "given twice"),
        (NAME, {"pretrained": True, "checkpoint": "x.pth"}, "both pretrained"),
        ("no/such/folder", {}, "hf-hub:no/such/folder"),
        ("local-dir:/no/such/folder", {}, "no folder /no/such/folder"),
    ],
)
def test_wrong_names_and_arguments_are_one_sentence(name, options, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        create_model(name, **options)
    assert "\n" not in str(caught.value)


def test_settings_reach_the_network():
    model = tiny(drop_path=0.2, in_chans=1)
    assert model.num_classes == 5 and model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert model.pretrained_cfg["input_size"] == (1, 32, 32)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
    assert create_model("resnet18", image_size=(64, 32)).pretrained_cfg["input_size"] == (3, 64, 32)
    assert NAME in timm.list_models() and tiny(image_size=(16, 24)).patch_embed.grid_size == (2, 3)


def test_a_timm_name_wins_over_a_folder_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert type(create_model("resnet18", num_classes=2)).__name__ == "ResNet"


def test_without_network_pretrained_is_one_sentence(monkeypatch):
    for name, options in ((NAME, {"pretrained": True}), ("hf-hub:timm/" + NAME, {})):
        with pytest.raises(
            DataError, match=r"without network, download|set pretrained=False"
        ) as caught:
            create_model(name, **options)
        assert "\n" not in str(caught.value)


def test_convolutional_folders_without_classes_get_a_head_from_timm(tmp_path):
    model = create_model("resnet18", num_classes=0).eval()
    options = {"architecture": "resnet18", "model_args": {}, "classes": None}
    folder = export_timm(model, tmp_path / "cnn", input_spec=input_spec_of(model), **options)
    student = create_model(str(folder), num_classes=3)
    assert student.fc.weight.shape == (3, 512)
    assert torch.equal(student.conv1.weight, model.conv1.weight)


def test_class_names():
    assert class_names(create_model(NAME))[:2] == ("n01440764", "n01443537")
    assert class_names(tiny()) is None
    assert class_names(create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=1000)) is None
    named = tiny()
    named.pretrained_cfg["label_names"] = list("abcde")
    assert class_names(named) == tuple("abcde")
    named.pretrained_cfg["label_names"] = list("abc")
    assert class_names(named) is None
    assert class_names(torch.nn.Linear(2, 2)) is None


# -- a file of other classes ----------------------------------------------------------------------

NETWORKS = {
    "vit": (NAME, TINY),
    "hf": (NAME, TINY),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "mean": (NAME, {**TINY, "global_pool": "avg"}),
    "attention-pool": (NAME, {**TINY, "global_pool": "map"}),
    "resnet": ("test_resnet", {}),
    "convnext": ("test_convnext", {}),
    "efficientnet": ("test_efficientnet", {}),
    "mobilenet": ("mobilenetv3_small_050", {}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    ),
    "involution": ("rednet26", {}),
}


@pytest.mark.parametrize("num_classes", [3, 0])
@pytest.mark.parametrize("kind", NETWORKS)
def test_all_but_the_head_of_other_classes_is_taken(tmp_path, caplog, kind, num_classes):
    name, args = NETWORKS[kind]
    source = create_model(name, num_classes=7, **args).state_dict()
    path = write(tmp_path / "w.safetensors", hugging_face(source) if kind == "hf" else source)
    student = create_model(name, num_classes=num_classes, checkpoint=path, **args)
    state = student.state_dict()
    heads = {k for k in source if k not in state or source[k].shape != state[k].shape}
    assert heads and all("head" in key or "classifier" in key or "fc" in key for key in heads)
    assert equal(without(state, *heads), without(source, *heads))
    said = "its classifier is of other classes" if num_classes else "its classifier is not used"
    assert said in caplog.text and student.num_classes == num_classes
    assert create_model(name, checkpoint=path, **args).num_classes == 7  # a teacher's, as it is


def test_a_file_of_another_network_is_not_made_to_fit(tmp_path):
    path = write(tmp_path / "w.safetensors", create_model("test_resnet").state_dict())
    for name, args in (("test_convnext", {}), (NAME, TINY)):
        with pytest.raises(DataError):
            create_model(name, num_classes=3, checkpoint=path, **args)


# -- what a config.json may say -------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"pretrained_cfg": {"mean": "0.5"}},
        {"pretrained_cfg": {"mean": ["a", "b", "c"]}},
        {"pretrained_cfg": {"mean": [0.5, 0.5]}},
        {"pretrained_cfg": {"std": 0.5}},
        {"pretrained_cfg": {"std": [0.5, float("nan"), 0.5]}},
        {"pretrained_cfg": {"input_size": "3x224x224"}},
        {"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}},
        {"pretrained_cfg": {"crop_pct": "most"}},
        {"pretrained_cfg": {"label_names": [1, 2]}},
        {"pretrained_cfg": "timm"},
        {"num_classes": "ten"},
        {"num_classes": 10**12},
        {"model_args": {"depth": 10**9}},
        {"model_args": {"embed_dim": 10**9}},
        {"model_args": "depth=2"},
        {"architecture": 5},
    ],
)
def test_a_config_that_makes_no_sense_is_one_sentence(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME, **change}))
    with pytest.raises(UserError, match=r"config\.json") as caught:
        create_model(str(tmp_path), pretrained=False)
    assert "\n" not in str(caught.value)


def test_a_config_of_any_size_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**33)
    with pytest.raises(DataError, match="larger"):
        create_model(str(tmp_path))


def test_a_runs_folder_leads_to_its_networks(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a run") as caught:
        create_model(str(tmp_path))
    assert caught.value.fixes == (f"name {tmp_path / 'best'}",)
