"""A method from outside the package: installed beside it, explained and trained like its own."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitdistill.cli import main
from vitdistill.data.batch import Batch
from vitdistill.errors import ConfigError
from vitdistill.methods.kd import kd_loss
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "own_method"
PROJECT = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
((NAME, TARGET),) = PROJECT["project"]["entry-points"]["vitdistill.methods"].items()
VIT = "{img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}"
SHORT = [
    "--epochs",
    "2",
    "--warmup-epochs",
    "0",
    "-b",
    "12",
    "--device",
    "cpu",
    "--set",
    f"student.model_args={VIT}",
]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "logit_standardisation", EXAMPLE / "logit_standardisation.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


EXAMPLE_MODULE = load()


def install(site: Path) -> None:
    """What ``pip install`` would write of the example, by hand: no network, no build."""
    project = PROJECT["project"]
    for name in PROJECT["tool"]["setuptools"]["py-modules"]:
        (site / f"{name}.py").write_text((EXAMPLE / f"{name}.py").read_text())
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (info / "entry_points.txt").write_text(f"[vitdistill.methods]\n{NAME} = {TARGET}\n")


def vitdistill(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, in which the example is installed: entry points are
    read once a process.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    command = [sys.executable, "-m", "vitdistill.cli", *words]
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example installed, images of three colours, and a teacher trained on
    them.
    """
    site = tmp_path_factory.mktemp("site")
    install(site)
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 20)):
        for i, colour in enumerate(("blue", "green", "red")):
            folder = site / "photos" / split / colour
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = np.clip(
                    np.eye(3)[2 - i] * 255 + generator.normal(0, 40, (16, 16, 3)), 0, 255
                )
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{k:02d}.png")
    assert (
        main(
            [
                "train",
                "small_images_alone",
                "--data-dir",
                str(site / "photos"),
                "--output",
                str(site / "teacher"),
                *SHORT,
            ]
        )
        == 0
    )
    return site


def test_the_whole_method_takes_less_than_seventy_lines() -> None:
    module, _, cls = TARGET.partition(":")
    assert len((EXAMPLE / f"{module}.py").read_text().splitlines()) < 70
    assert hasattr(EXAMPLE_MODULE, cls) and f"--with {NAME} " in (EXAMPLE / "README.md").read_text()


@pytest.mark.whole
def test_it_is_explained_like_any_other(site: Path) -> None:
    done = vitdistill(
        site,
        "explain",
        "kd",
        "--without",
        "kd",
        "--with",
        NAME,
        "--teacher-model",
        "deit_small_patch16_224",
    )
    assert done.returncode == 0, done.stderr
    assert f"1 x {NAME}: T^2 KL(teacher || student) of standardised logits" in done.stdout


@pytest.mark.whole
def test_it_trains_and_its_recipe_names_it(site: Path) -> None:
    words = [
        "train",
        "small_images_kd",
        "--data-dir",
        "photos",
        "--teacher-model",
        "teacher",
        "--without",
        "kd",
        "--with",
        NAME,
    ]
    done = vitdistill(
        site,
        *words,
        *SHORT,
        "--set",
        f"objectives.{NAME}.weight=9",
        "--log-every",
        "1",
        "--output",
        "run",
    )
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load((site / "run" / "recipe.yaml").read_text())
    written = recipe["objectives"][NAME]
    assert (written["method"], written["weight"], written["temperature"]) == (NAME, 9.0, 2.0)
    lines = [json.loads(line) for line in (site / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [value for line in lines for key, value in line.items() if NAME in key]
    assert len(losses) == 6 and all(math.isfinite(loss) and loss > 0 for loss in losses)


def loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    method = EXAMPLE_MODULE.LogitStandardisation(temperature=temperature)
    numbers = torch.arange(len(student))
    batch = Batch(torch.zeros(len(student), 3, 4, 4), numbers, numbers, numbers, 0)
    found: torch.Tensor = method.loss(
        ViTOutput(logits=student), ViTOutput(logits=teacher), batch, None
    )
    return found


LOGITS = st.lists(st.floats(-20, 20), min_size=12, max_size=12)


@given(LOGITS, LOGITS, st.floats(0.25, 8), st.floats(-30, 30))
def test_the_loss_does_not_see_scale_and_shift(
    ours: list[float], theirs: list[float], scale: float, shift: float
) -> None:
    student, teacher = torch.tensor(ours).view(3, 4), torch.tensor(theirs).view(3, 4)
    for logits in (student, teacher):
        logits += torch.tensor(
            [0.0, 2.0, 4.0, 8.0]
        )  # rows that are (nearly) constant have no scale
        if (logits.std(-1) < 1).any():
            return
    expected = pytest.approx(loss(student, teacher).item(), rel=1e-3, abs=1e-4)
    assert loss(student, teacher).item() >= -1e-6
    assert loss(student * scale + shift, teacher).item() == expected
    assert loss(student, teacher * scale + shift).item() == expected
    assert loss(teacher * scale + shift, teacher).item() == pytest.approx(0, abs=1e-4)


def test_the_loss_by_hand() -> None:
    student, teacher = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[10.0, 20.0, 60.0]])
    z = [(row - row.mean()) / row.std(correction=0) for row in (student, teacher)]
    expected = kd_loss(z[0], z[1], 4.0)
    torch.testing.assert_close(loss(student, teacher, 4.0), expected, rtol=1e-4, atol=1e-5)


def test_a_student_that_answers_nothing_yet_gets_a_finite_gradient() -> None:
    student = torch.zeros(2, 5, requires_grad=True)
    loss(student, torch.randn(2, 5)).backward()
    assert student.grad is not None and student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e3


def test_what_it_cannot_compare_is_refused() -> None:
    method = EXAMPLE_MODULE.LogitStandardisation()
    student = Network("student", "a", (8, 8), depth=2, dim=4, num_classes=3, num_parameters=0)
    method.check(student, replace(student, name="teacher"))
    with pytest.raises(ConfigError, match="class by class"):
        method.check(student, replace(student, name="teacher", num_classes=4))
    two = replace(student, num_classes=2)
    with pytest.raises(ConfigError, match="standardised logits of 2 classes"):
        method.check(two, replace(two, name="teacher"))
    with pytest.raises(ConfigError, match="temperature"):
        EXAMPLE_MODULE.LogitStandardisation(temperature=0.0)
