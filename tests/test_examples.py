"""A method from outside the package: installed beside it, explained and trained like its own."""

import importlib.util
import math
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import plain_recipe, records, run, write_images

from vitdistill.data.batch import Batch
from vitdistill.errors import ConfigError
from vitdistill.methods.kd import kd_loss
from vitdistill.recipes.yaml import dump_recipe, read_mapping
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "own_method"
PROJECT = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
((NAME, TARGET),) = PROJECT["project"]["entry-points"]["vitdistill.methods"].items()
FILE, _, CLASS = TARGET.partition(":")


def load():
    spec = importlib.util.spec_from_file_location(FILE, EXAMPLE / f"{FILE}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return getattr(module, CLASS)


METHOD = load()


def install(site):
    """What ``pip install`` would write of the example, by hand: no network, no build."""
    project = PROJECT["project"]
    (site / f"{FILE}.py").write_text((EXAMPLE / f"{FILE}.py").read_text())
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    head = f"Name: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\n{head}")
    (info / "entry_points.txt").write_text(f"[vitdistill.methods]\n{NAME} = {TARGET}\n")


def vitdistill(site, *words):
    """The command line in a process of its own, in which the example is installed: entry points are
    read once a process.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    command = [sys.executable, "-m", "vitdistill.cli", *words]
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_whole_method_takes_less_than_seventy_lines():
    assert len((EXAMPLE / f"{FILE}.py").read_text().splitlines()) < 70
    assert f"--with {NAME} " in (EXAMPLE / "README.md").read_text()


@pytest.mark.whole
def test_it_is_explained_and_trained_and_its_recipe_names_it(tmp_path):
    install(tmp_path)
    plain = plain_recipe(write_images(tmp_path / "photos"), **{"train.log_every": 1})
    run(plain, tmp_path / "teacher")
    (tmp_path / "plain.yaml").write_text(dump_recipe(plain))
    words = ["plain.yaml", "--with", NAME, "--teacher-model", "teacher"]
    words += ["--set", f"objectives.{NAME}.weight=9"]
    printed = vitdistill(tmp_path, "explain", *words)
    assert f"9 x {NAME}: T^2 KL(teacher || student) of standardised logits" in printed
    vitdistill(tmp_path, "train", *words, "--device", "cpu", "--output", "run")
    written = read_mapping(tmp_path / "run" / "recipe.yaml")["objectives"][NAME]
    assert (written["method"], written["weight"], written["temperature"]) == (NAME, 9.0, 2.0)
    losses = [line[NAME] for line in records(tmp_path / "run", "train")]
    assert len(losses) == 9 and all(math.isfinite(loss) and loss > 0 for loss in losses)


def loss(student, teacher, temperature=2.0):
    numbers = torch.arange(len(student))
    batch = Batch(torch.zeros(len(student), 3, 4, 4), numbers, numbers, numbers, 0)
    outputs = ViTOutput(logits=student), ViTOutput(logits=teacher)
    return METHOD(temperature=temperature).loss(*outputs, batch, None)


LOGITS = st.lists(st.floats(-20, 20), min_size=12, max_size=12)


@given(LOGITS, LOGITS, st.floats(0.25, 8), st.floats(-30, 30))
def test_the_loss_does_not_see_scale_and_shift(ours, theirs, scale, shift):
    student, teacher = torch.tensor(ours).view(3, 4), torch.tensor(theirs).view(3, 4)
    for logits in (student, teacher):
        logits += torch.tensor([0.0, 2.0, 4.0, 8.0])  # rows that are nearly constant have no scale
        if (logits.std(-1) < 1).any():
            return
    expected = pytest.approx(loss(student, teacher).item(), rel=1e-3, abs=1e-4)
    assert loss(student, teacher).item() >= -1e-6
    assert loss(student * scale + shift, teacher).item() == expected
    assert loss(student, teacher * scale + shift).item() == expected
    assert loss(teacher * scale + shift, teacher).item() == pytest.approx(0, abs=1e-4)


def test_the_loss_by_hand():
    student, teacher = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[10.0, 20.0, 60.0]])
    z = [(row - row.mean()) / row.std(correction=0) for row in (student, teacher)]
    expected = kd_loss(z[0], z[1], 4.0)
    torch.testing.assert_close(loss(student, teacher, 4.0), expected, rtol=1e-4, atol=1e-5)


def test_a_student_that_answers_nothing_yet_gets_a_finite_gradient():
    student = torch.zeros(2, 5, requires_grad=True)
    loss(student, torch.randn(2, 5)).backward()
    assert student.grad is not None and student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e3


@pytest.mark.parametrize("classes", [(3, 4), (2, 2)])
def test_what_it_cannot_compare_is_refused(classes):
    three = Network("student", "a", (8, 8), depth=2, dim=4, num_classes=3, num_parameters=0)
    METHOD().check(three, three)
    with pytest.raises(ConfigError):
        METHOD().check(*(replace(three, num_classes=count) for count in classes))
    with pytest.raises(ConfigError, match="temperature"):
        METHOD(temperature=0.0)
