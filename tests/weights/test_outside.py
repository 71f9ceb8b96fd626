"""Networks that timm does not build: modules and callables of anybody's own, and files that run."""

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import own_nets
import pytest
import torch
from own_nets import Net

from tests.weights.networks import equal, write
from vitdistill.data.model_input import input_spec_of
from vitdistill.errors import ConfigError, DataError, UserError
from vitdistill.runs.networks import weights_digest
from vitdistill.vit.flops import forward_flops
from vitdistill.vit.needs import Needs
from vitdistill.vit.walk import run_vit
from vitdistill.weights.adopted import Called
from vitdistill.weights.create import class_names, create_model, describe
from vitdistill.weights.export import export_onnx, export_timm

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def exported(model: torch.nn.Module, folder: Path, name: str, **args: Any) -> Path:
    options = {"architecture": name, "model_args": args, "classes": ["a", "b", "c"]}
    return export_timm(model, folder, input_spec=input_spec_of(model), **options)


# -- a factory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_ema"])
def test_weights_come_from_a_file_with_any_wrapper(tmp_path, prefix, wrapper):
    state = {prefix + key: value for key, value in Net(width=6).state_dict().items()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "w.pth")
    model = create_model("own_nets:Net", checkpoint=tmp_path / "w.pth", width=6)
    assert equal(model.state_dict(), {key.removeprefix(prefix): state[key] for key in state})


def test_a_factory_is_told_what_it_can_take() -> None:
    assert create_model("own_nets:Net", num_classes=5).num_classes == 5
    assert create_model("own_nets:Net", image_size=32).pretrained_cfg["input_size"] == (3, 32, 32)
    assert create_model("own_nets:vit", image_size=8).patch_embed.img_size == (8, 8)
    assert create_model("own_nets:three_only", num_classes=3).num_classes == 3
    overlay = {"mean": [0.1] * 3, "label_names": ["x", "y", "z"]}
    model = create_model("own_nets:Net", pretrained_cfg_overlay=overlay)
    assert input_spec_of(model).mean == (0.1,) * 3 and class_names(model) == ("x", "y", "z")
    assert Net.pretrained_cfg == {"input_size": (3, 16, 16), "classifier": "net.4"}


def test_a_student_starts_from_a_file_of_other_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", Net(num_classes=7).state_dict())
    student = create_model("own_nets:Net", num_classes=5, checkpoint=path)
    assert student.net[4].weight.shape == (5, 8)
    assert torch.equal(
        student.net[0].weight, create_model("own_nets:Net", checkpoint=path).net[0].weight
    )


def test_a_vit_of_ones_own_runs_on_a_part_of_its_patches() -> None:
    model = create_model("own_nets:vit", num_classes=5)
    seen = run_vit(model, IMAGES, Needs(logits=True), torch.tensor([[0, 3], [5, 7]]))
    assert seen.network.walks and seen.logits.shape == (2, 5)


@pytest.mark.parametrize("name", ["own_nets:Net", "own_nets:vit"])
def test_an_export_names_the_factory_and_loads_again(tmp_path, monkeypatch, name):
    monkeypatch.chdir(Path(own_nets.__file__).parent)
    model = create_model(name, num_classes=3)
    folder = exported(model, tmp_path / "out", name)
    again = create_model(str(folder))
    assert weights_digest(again) == weights_digest(model) and class_names(again) == ("a", "b", "c")
    assert describe(str(folder), {})[0] == name
    assert create_model(str(folder), num_classes=5).num_classes == 5
    assert export_onnx(model, tmp_path / "x.onnx", input_spec_of(model)) < 1e-4


@pytest.mark.parametrize("name", ["own_nets:Net", "subprocess:call", "own_nets:torch.load"])
def test_a_config_calls_only_code_of_the_current_directory(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path if name == "own_nets:Net" else Path(own_nets.__file__).parent)
    ran = tmp_path / "ran"
    config = {"architecture": name, "model_args": {"args": ["touch", str(ran)]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="asks for"):
        create_model(str(tmp_path), pretrained=False)
    assert not ran.exists()


def test_the_current_directory_is_importable(tmp_path, monkeypatch):
    (tmp_path / "just_written").mkdir()
    (tmp_path / "just_written/nets.py").write_text("from own_nets import Net as make\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert isinstance(create_model("just_written.nets:make"), Net)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("no_such_module:make", {}),
        ("own_nets.inside:make", {}),
        ("own_nets:no_such", {}),
        ("own_nets:five", {}),
        ("own_nets:nothing", {}),
        ("own_nets:unlucky", {}),
        ("own_nets:lost", {}),
        ("own_nets:a_map", {}),
        ("own_nets:one_row", {}),
        ("own_nets:whole_numbers", {}),
        ("own_nets:a_dict", {}),
        ("own_nets:other_count", {}),
        ("own_nets:three_only", {"num_classes": 5}),
        ("own_nets:Net", {"no_such": 1}),
        ("own_nets:Net", {"pretrained_cfg_overlay": {"mean": [0.1]}}),
        ("own_nets:Net", {"pretrained_cfg_overlay": {"std": [0.0] * 3}}),
        ("own_nets:vit", {"image_size": 18}),
    ],
)
def test_what_cannot_be_built_is_one_sentence(name, args):
    with pytest.raises(UserError) as caught:
        create_model(name, **args)
    assert "\n" not in str(caught.value)
    assert any(word in str(caught.value) for word in (name.rpartition(":")[2], "mean", "std"))


def test_a_module_that_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for i, text in enumerate(("import no_such_thing", "1 / 0", "def f(:", "raise SystemError")):
        (tmp_path / f"odd_{i}.py").write_text(text)
        with pytest.raises(ConfigError, match=f"odd_{i}") as caught:
            create_model(f"odd_{i}:make")
        assert "\n" not in str(caught.value)


# -- a callable -----------------------------------------------------------------------------------


def test_a_callable_answers_as_a_network_does() -> None:
    model = create_model("own_nets:colours", image_size=16, scale=2.0)
    assert isinstance(model, Called) and model.num_classes == 3
    output = run_vit(model, IMAGES, Needs(logits=True))
    assert torch.allclose(output.logits, IMAGES.mean((2, 3)) * 2)
    assert forward_flops(model, (16, 16)) == 0 and not [*model.parameters()]
    assert copy.deepcopy(model)(IMAGES.half()).dtype == torch.float32
    assert torch.equal(
        torch.compile(run_vit)(model, IMAGES, Needs(logits=True)).logits, output.logits
    )


def test_a_callable_that_fails_is_one_sentence() -> None:
    model = create_model("own_nets:colours", image_size=16)
    for call in (lambda images: 1 / 0, lambda images: None, lambda images: [[1.0]] * 5):
        model.call = call
        with pytest.raises(DataError, match="own_nets:colours"):
            model(IMAGES)


def test_the_cost_of_what_reads_its_tensors_is_not_counted() -> None:
    assert forward_flops(create_model("own_nets:Reads"), (16, 16)) == 0
    assert forward_flops(create_model("own_nets:Net"), (16, 16)) > 0


# -- files that run -------------------------------------------------------------------------------


def program(kind: str, path: Path) -> tuple[torch.nn.Module, Path]:
    """A network, and a file that computes what it does."""
    torch.manual_seed(0)
    model, file = create_model("own_nets:Net"), path / f"net{kind}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == ".onnx":
            export_onnx(model, file, input_spec_of(model), ["a", "b", "c"])
        elif kind == ".pt2":
            batch = {0: torch.export.Dim("batch")}
            torch.export.save(torch.export.export(model, (IMAGES,), dynamic_shapes=(batch,)), file)
        else:
            torch.jit.trace(model, IMAGES).save(str(file))
    return model, file


@pytest.mark.parametrize("kind", [".onnx", ".pt2", ".pt", ".torchscript"])
def test_a_file_that_runs_answers_as_its_network(tmp_path, kind):
    model, file = program(kind, tmp_path)
    opened = create_model(str(file), image_size=16)
    images = torch.randn(5, 3, 16, 16)
    assert (opened(images) - model(images)).abs().max() < 1e-5 and opened.num_classes == 3
    digests = {weights_digest(opened)}
    file.rename(tmp_path / f"moved{kind}")
    digests.add(weights_digest(create_model(str(tmp_path / f"moved{kind}"), image_size=16)))
    assert len(digests) == 1
    if kind == ".onnx":
        own = create_model(str(tmp_path / "moved.onnx"))
        assert class_names(own) == ("a", "b", "c") and input_spec_of(own) == input_spec_of(model)


def test_an_onnx_file_of_one_image_at_a_time(tmp_path: Path) -> None:
    model = create_model("own_nets:Net").eval()
    program = torch.onnx.export(model, (IMAGES[:1],), dynamo=True, verbose=False)
    program.save(str(tmp_path / "one.onnx"))
    opened = create_model(str(tmp_path / "one.onnx"))
    assert (opened(IMAGES) - model(IMAGES)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["w.pth", "w.onnx", "w.pt2", "absent.onnx", "absent.pt"])
def test_a_file_that_does_not_run_is_one_sentence(tmp_path, name):
    if name.startswith("w"):
        torch.save(Net().state_dict(), tmp_path / name)
    with pytest.raises(DataError) as caught:
        create_model(str(tmp_path / name))
    assert "\n" not in str(caught.value) and name in str(caught.value)
