"""An exported network answers what the trained one answers, in timm and in onnxruntime."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from vitdistill.data.augment import InputSpec
from vitdistill.errors import ConfigError, DataError, DiskError, UserError
from vitdistill.storage.atomic import settle_asides
from vitdistill.weights import export
from vitdistill.weights.create import class_names, create_model
from vitdistill.weights.export import export_onnx, export_timm


def spec_of(image_size=(32, 32), **changes) -> InputSpec:
    fields = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear"}
    return InputSpec(image_size, **{**fields, "crop_pct": 1.0, **changes})


SMALL = {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 2}
VIT = "vit_tiny_patch16_224"
CASES = {
    "plain": (VIT, {"patch_size": 8, **SMALL}, spec_of()),
    "tagged": (f"{VIT}.augreg_in21k", SMALL, spec_of()),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL, spec_of()),
    "no-position-on-class": ("deit3_small_patch16_224", SMALL, spec_of()),
    "registers": ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 28}, spec_of((28, 28))),
    "average": (
        VIT,
        {"global_pool": "avg", "class_token": False, **SMALL},
        spec_of(crop_mode="squash"),
    ),
    "attention-pool": (VIT, {"global_pool": "map", **SMALL}, spec_of()),
    "dynamic": (VIT, {"patch_size": 8, "dynamic_img_size": True, **SMALL}, spec_of((40, 24))),
    "not-square": (VIT, {**SMALL, "img_size": (32, 48)}, spec_of((32, 48))),
    "convolutional": ("resnet10t", {}, spec_of((48, 48))),
}
NAMES = tuple(["seven", "different", "class", "names", "for", "it", "ä"])


def make(case: str, seed: int = 0, **extra) -> tuple[torch.nn.Module, dict]:
    name, args, spec = CASES[case]
    torch.manual_seed(seed)
    model = create_model(name, num_classes=7, drop_path=0.1, **args, **extra).eval()
    return model, {"architecture": name, "model_args": args, "classes": NAMES, "input_spec": spec}


def images(case: str) -> torch.Tensor:
    spec = CASES[case][2]
    return torch.randn(3, 3, *spec.image_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_network_built_for_an_image_size_without_patches_keeps_it(tmp_path):
    model = create_model("efficientvit_m0", num_classes=7, img_size=64).eval()
    about = {"architecture": "efficientvit_m0", "model_args": {"img_size": 64}, "classes": None}
    folder = export_timm(model, tmp_path / "out", **about, input_spec=spec_of((64, 64)))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    batch = torch.randn(2, 3, 64, 64)
    assert torch.equal(theirs(batch), model(batch))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_timm_gives_the_same_answers_bit_for_bit(tmp_path, case):
    model, options = make(case)
    batch = images(case)
    expected = model(batch)
    folder = export_timm(model, tmp_path / "out", **options)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(theirs(batch), expected)
    for name in (str(folder), f"local-dir:{folder}"):
        ours = create_model(name).eval()
        assert torch.equal(ours(batch), expected) and class_names(ours) == NAMES
    spec = options["input_spec"]
    data = timm.data.resolve_model_data_config(theirs)
    assert tuple(data["input_size"]) == (batch.shape[1], *spec.image_size)
    for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
        found = tuple(data[key]) if isinstance(data[key], list) else data[key]
        assert found == getattr(spec, key)
    assert theirs.pretrained_cfg["label_names"] == list(NAMES)


def test_the_network_is_left_as_it_was_and_wrappers_leave_no_trace(tmp_path):
    model, options = make("plain")
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_timm(torch.compile(model), tmp_path / "out", **options)
    assert model.training
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    export_timm(model.eval(), tmp_path / "out", **options)
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == before.keys()
    assert all(torch.equal(stored[key], before[key]) for key in before)
    text = (tmp_path / "out" / "config.json").read_text()
    assert str(tmp_path) not in text and "drop_path_rate" not in text
    assert set(json.loads(text)["vitdistill"]) == {"version", "weights_sha256"}
    other = create_model(str(tmp_path / "out"), num_classes=3)
    assert other.num_classes == 3 and class_names(other) is None
    assert torch.equal(other.cls_token, before["cls_token"])
    fresh = create_model(str(tmp_path / "out"), pretrained=False)
    assert fresh.patch_embed.patch_size == (8, 8)
    assert not torch.equal(fresh.cls_token, before["cls_token"])


def test_exporting_again_replaces_and_anything_else_is_refused(tmp_path, tree):
    model, options = make("plain")
    export_timm(model, tmp_path / "out", **options)
    second, _ = make("plain", seed=5)
    export_timm(second, tmp_path / "out", **options)
    assert torch.equal(create_model(str(tmp_path / "out")).head.weight, second.head.weight)
    for hidden in (".DS_Store", ".ipynb_checkpoints/work"):  # Finder's, an editor's
        (tmp_path / "out" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / hidden).write_text("keep")
    export_timm(model, tmp_path / "out", **options)
    for hidden in (".DS_Store", ".ipynb_checkpoints/work"):
        assert (tmp_path / "out" / hidden).read_text() == "keep"
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"architecture": "resnet18"}')
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    for name, sentence in (("out", "notes.txt"), ("foreign", "did not export"), ("file", "file")):
        with pytest.raises(UserError, match=sentence):
            export_timm(model, tmp_path / name, **options)
    assert tree(tmp_path) == before


def test_an_export_killed_half_way_is_settled(tmp_path, monkeypatch):
    model, options = make("plain")
    folder = export_timm(model, tmp_path / "best-of", **options, prove=False)
    rename = os.rename

    def die(source, target):
        if Path(target) == folder:  # between the old one's leaving and the new one's arrival
            os._exit(9)
        rename(source, target)

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(os, "rename", die)
        export_timm(model, folder, **options, prove=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9 and not folder.exists()
    settle_asides(tmp_path, export.FILES)
    assert (folder / "config.json").is_file() and not list(tmp_path.glob(".replaced-*"))
    shutil.copytree(folder, tmp_path / ".replaced-best-of-01234567")
    settle_asides(tmp_path, export.FILES)
    assert folder.is_dir() and not list(tmp_path.glob(".replaced-*"))


def test_what_would_not_load_the_same_is_refused_before_anything_is_written(tmp_path):
    model, options = make("plain")
    args = options["model_args"]
    wrong = [
        ({"architecture": "nosuch"}, ConfigError, "nosuch"),
        ({"model_args": {}}, ConfigError, "every argument that the network was built with"),
        ({"classes": ["one"]}, ConfigError, "1 classes are named"),
        ({"model_args": {**args, "num_heads": 3}}, ConfigError, "answers differently"),
    ]
    for change, kind, sentence in wrong:
        with pytest.raises(kind, match=sentence):
            export_timm(model, tmp_path / "out", **{**options, **change})
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="float32"):
        export_timm(model.bfloat16(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_damage_after_export_is_found(tmp_path):
    model, options = make("plain")
    folder = export_timm(model, tmp_path / "out", **options)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"model\.safetensors is damaged"):
        create_model(str(folder))
    path.unlink()
    with pytest.raises(DataError, match="none of model"):
        create_model(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(DataError, match="no configuration"):
        create_model(str(folder))
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        create_model(str(folder))


def test_a_later_export_is_not_built_again_and_still_read_back(tmp_path, monkeypatch):
    model, options = make("plain")
    monkeypatch.setattr(export, "_check_reload", lambda *_: pytest.fail("proved again"))
    folder = export_timm(model, tmp_path / "out", **options, prove=False)
    assert torch.equal(create_model(str(folder)).head.weight, model.head.weight)
    monkeypatch.setattr(export, "sha256_file", lambda path: "another")
    with pytest.raises(DiskError, match="reads back changed"):
        export_timm(make("plain", seed=5)[0], tmp_path / "out", **options, prove=False)
    assert torch.equal(create_model(str(folder)).head.weight, model.head.weight)


# -- onnx -----------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["plain", "distilled"])
def test_onnx_answers_the_same_for_any_batch(tmp_path, case):
    import onnxruntime

    model, options = make(case)
    off = export_onnx(model, tmp_path / "net.onnx", options["input_spec"], NAMES)
    assert 0 <= off < 1e-5 and os.listdir(tmp_path) == ["net.onnx"]
    session = onnxruntime.InferenceSession(
        tmp_path / "net.onnx", providers=["CPUExecutionProvider"]
    )
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(NAMES)
    assert tuple(json.loads(about["mean"])) == options["input_spec"].mean
    for size in (1, 2, 5):
        batch = torch.randn(size, 3, 32, 32)
        found = torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])
        with torch.no_grad():
            assert torch.allclose(found, model(batch), atol=1e-5)


@pytest.mark.whole
def test_a_network_that_answers_nan_is_not_exported_to_onnx(tmp_path):
    model, options = make("plain")
    with torch.no_grad():
        model.head.bias[1] = torch.nan
    with pytest.raises(DataError, match=r"net.onnx holds numbers that are not finite"):
        export_onnx(model, tmp_path / "net.onnx", options["input_spec"])
    with pytest.raises(DataError, match=r"out holds numbers that are not finite"):
        export_timm(model, tmp_path / "out", **options, prove=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
def test_a_network_onnx_cannot_hold_is_one_sentence(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, images):
            return torch.linalg.eigvals(images[:, 0]).real

    with pytest.raises(ConfigError, match="cannot be exported to ONNX") as caught:
        export_onnx(Odd(), tmp_path / "net.onnx", spec_of())
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
