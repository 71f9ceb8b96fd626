"""Networks by name, and the settings they are built with."""

import pytest
import timm
import torch

from tests.weights.networks import NAME, tiny
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import ConfigError, DataError
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
        with pytest.raises(DataError, match="without network, download") as caught:
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
