"""Networks of a user's own, and callables, through whole runs: live, stored, resumed, exported."""

from pathlib import Path

import own_nets
import pytest
import torch
from small_runs import ends_alike, losses, ranks, run

from vitdistill.cli import main
from vitdistill.errors import ConfigError
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.label import LabelOptions, label
from vitdistill.weights.create import create_model

pytestmark = pytest.mark.whole

STUDENT = {"student.model": "own_nets:Net", "student.model_args": {"width": 12}}
ALONE = {"selector": None, "optim.layer_decay": None, "student.drop_path": 0.0}
OWN = {**STUDENT, **ALONE, "teachers.teacher.model": "own_nets:colours"}
OWN |= {"teachers.teacher.image_size": 16}


@pytest.fixture
def recipe(taught, monkeypatch) -> Recipe:
    monkeypatch.chdir(Path(own_nets.__file__).parent)
    return taught(**OWN)


def test_a_run_resumes_and_its_student_loads_from_its_folder(tmp_path, recipe, capsys):
    run(recipe, tmp_path / "whole")
    ends_alike(recipe, tmp_path / "whole", tmp_path / "resumed", 4)
    folder = tmp_path / "whole/last"
    assert create_model(str(folder)).net[0].weight.shape == (12, 3, 1, 1)
    data = ["--data-dir", recipe.data.dir, "--device", "cpu"]
    assert (
        main(["eval", str(tmp_path / "whole"), "own_nets:colours", "--img-size", "16", *data]) == 0
    )
    assert "not counted" in capsys.readouterr().out
    output = ["--output", str(tmp_path / "out"), "--onnx", str(tmp_path / "student.onnx")]
    assert main(["export", str(folder), *output]) == 0
    assert main(["eval", str(tmp_path / "out"), *data]) == 0
    assert create_model(str(tmp_path / "student.onnx")).num_classes == 3


def test_other_weights_of_a_teacher_are_refused(tmp_path, recipe):
    files = tmp_path / "a.pth", tmp_path / "b.pth"
    teacher = own_nets.Net()
    with torch.no_grad():
        teacher.net[0].weight.copy_(torch.eye(8, 3)[..., None, None])
        teacher.net[0].bias.fill_(2.0)
        teacher.net[4].weight.copy_(torch.eye(3, 8) * 9)
    for i, file in enumerate(files):
        teacher.net[4].bias.data.fill_(float(i))
        torch.save({f"module.{key}": value for key, value in teacher.state_dict().items()}, file)
    own = {"teachers.teacher.model": "own_nets:Net", "train.epochs": 2}
    recipes = [
        replace_fields(recipe, {**own, "teachers.teacher.checkpoint": str(file)}) for file in files
    ]
    summary = run(recipes[0], tmp_path / "r")
    with pytest.raises(ConfigError, match="another run"):
        run(recipes[1], tmp_path / "r")
    files[1].write_bytes(files[0].read_bytes())
    assert run(recipes[1], tmp_path / "r") == summary


def test_stored_answers_teach_as_live_ones_do(tmp_path, recipe):
    label(recipe, tmp_path / "labels", LabelOptions(encoding="float32"), device="cpu")
    stored = {
        "teachers.teacher.labels": str(tmp_path / "labels/teacher"),
        "teachers.teacher.model": "",
    }
    run(recipe, tmp_path / "live")
    run(replace_fields(recipe, stored), tmp_path / "stored")
    for live, read in zip(*(losses(tmp_path / name) for name in ("live", "stored")), strict=True):
        assert read == pytest.approx(live, rel=1e-4)


def test_two_processes(tmp_path, recipe):
    one, many = tmp_path / "one", tmp_path / "many"
    run(recipe, one)
    ranks(2, lambda rank: run(recipe, many))
    for a, b in zip(losses(one), losses(many), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_explain(recipe, capsys):
    own = ["--model", "own_nets:Reads", "--teacher-model", "own_nets:colours", "--epochs", "2"]
    data = ["--data-dir", recipe.data.dir, "--batch-size", "16", "--warmup-epochs", "0"]
    assert main(["explain", "small_images_kd", *own, *data]) == 0
    assert capsys.readouterr().out.count("not counted") == 3  # together too
