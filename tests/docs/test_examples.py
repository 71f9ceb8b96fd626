"""The examples: a method from outside the package, installed beside it, explained and trained like
its own; and a notebook, run from top to bottom.
"""

import importlib.util
import json
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

ROOT = Path(__file__).parents[2]
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
    command = [sys.executable, "-m", "vitdistill", *words]
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
    words += ["--set", f"objectives.{NAME}.weight=0.1"]
    printed = vitdistill(tmp_path, "explain", *words)
    assert f"0.1 x {NAME}: |student - teacher|^2 of the logits" in printed
    vitdistill(tmp_path, "train", *words, "--device", "cpu", "--output", "run")
    written = read_mapping(tmp_path / "run" / "recipe.yaml")["objectives"][NAME]
    assert (written["method"], written["weight"], written["centred"]) == (NAME, 0.1, False)
    losses = [line[NAME] for line in records(tmp_path / "run", "train")]
    assert len(losses) == 9 and all(math.isfinite(loss) and loss > 0 for loss in losses)


def loss(student, teacher, **settings):
    numbers = torch.arange(len(student))
    batch = Batch(torch.zeros(len(student), 3, 4, 4), numbers, numbers, numbers, 0)
    outputs = ViTOutput(logits=student), ViTOutput(logits=teacher)
    return METHOD(**settings).loss(*outputs, batch, None)


LOGITS = st.lists(st.floats(-20, 20), min_size=12, max_size=12)


@given(LOGITS, LOGITS, st.booleans())
def test_the_loss_is_a_mean_of_squares(ours, theirs, centred):
    student, teacher = torch.tensor(ours).view(3, 4), torch.tensor(theirs).view(3, 4)
    rows = (student - teacher).tolist()
    errors = [x - centred * sum(row) / 4 for row in rows for x in row]
    expected = sum(x**2 for x in errors) / 12
    assert loss(student, teacher, centred=centred).item() == pytest.approx(expected, abs=1e-3)


def test_large_temperatures_give_the_centred_form():
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    expected = 2 * kd_loss(student.double(), teacher.double(), 100.0).item()
    assert loss(student, teacher, centred=True).item() == pytest.approx(expected, rel=0.1)


def test_other_classes_are_refused():
    three = Network("student", "a", (8, 8), depth=2, dim=4, num_classes=3, num_parameters=0)
    METHOD().check(three, three)
    with pytest.raises(ConfigError):
        METHOD().check(three, replace(three, num_classes=4))


@pytest.mark.whole
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Its code cells, as a kernel runs them: in one namespace, in order."""
    cells = json.loads((ROOT / "examples" / "own_loop.ipynb").read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in codes)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for i, cell in enumerate(codes):
        exec(compile("".join(cell["source"]), f"own_loop.ipynb[{i}]", "exec"), names)
    first, last = sum(names["history"][:20]), sum(names["history"][-20:])
    assert last < 0.8 * first
    student, loaded = names["accuracy"](names["student"]), names["accuracy"](names["loaded"])
    assert student == loaded > 0.3 and names["teacher_accuracy"] > 0.3  # chance: 0.1
