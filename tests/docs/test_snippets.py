"""Every snippet of the pages runs, and every file they show can be read."""

import re
import shlex
import tomllib
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from doc_pages import PAGES, ROOT, blocks
from small_runs import plain_recipe, ranks, run, taught_recipe, write_images
from torch.utils.data import DataLoader, TensorDataset

from vitdistill import cli
from vitdistill.data.augment import Augment
from vitdistill.methods.base import TeacherObjective
from vitdistill.recipes.convert import replace_fields, to_dict
from vitdistill.recipes.settings import LabelOptions
from vitdistill.recipes.stages import Stages, load
from vitdistill.runs.label import label
from vitdistill.study.plan import jobs_of, load_study
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput

LOOP = ROOT / "docs" / "own_loop.md"
STEM = attrgetter("stem")
BATCH = torch.rand(4, 3, 224, 224), torch.arange(4)
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def execute(code: str, space: dict[str, Any]) -> None:
    """Run a block on small networks, and without a compiler of C."""
    small = "embed_dim=24, depth=2, num_heads=2"
    code = re.sub(r'("(?:deit|vit)_[\w.]+", )(?=num_classes=\d)', rf"\1{small}, ", code)
    code = code.replace("**args", f"**args, {small}").replace("size = {", f"size = {SMALL} | {{")
    code = code.replace("compile(student)", 'compile(student, backend="eager")')
    exec(compile(code, "a page", "exec"), space)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages have made before their snippets: photos, runs, labels and an export."""
    root = tmp_path_factory.mktemp("pages")
    images = write_images(root / "photos")
    run(plain_recipe(images), root / "runs" / "teacher")
    changes = {"student.model": "deit_tiny_patch16_224", "student.model_args": SMALL}
    changes |= {"selector": None, "data.augment": to_dict(Augment()), "train.accumulate": 1}
    recipe = replace_fields(taught_recipe(images, root / "runs" / "teacher"), changes)
    label(recipe, root / "labels", LabelOptions(), device="cpu")
    run_folder = str(root / "runs" / "teacher")
    assert cli.main(["export", run_folder, "--output", str(root / "student")]) == 0
    return root


@pytest.mark.whole
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=STEM)
def test_every_snippet_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    space: dict[str, Any] = {"__name__": "page"}
    for code in blocks(page, "python") if page != LOOP else []:
        execute(code, space)
    if page.stem == "own_network":
        both = space["ensemble"](("student", "student"))
        assert both(torch.rand(2, 3, 16, 16)).shape == (2, 3)
    if page.stem == "api":
        assert space["out"].hidden[0].shape[1] == 99


def test_the_method_of_the_guide_works() -> None:
    (code,) = blocks(ROOT / "docs" / "add_a_method.md", "python")
    space: dict[str, object] = {"__name__": "guide"}
    exec(compile(code, "docs/add_a_method.md", "exec"), space)
    method = space["LastBlockCosine"]
    assert isinstance(method, type) and issubclass(method, TeacherObjective)
    objective = method(weight=0.5)
    student = Network("student", "a", (8, 8), depth=2, dim=4, num_classes=3, num_parameters=0)
    teacher = Network("teacher", "b", (8, 8), depth=3, dim=6, num_classes=3, num_parameters=0)
    adapter = objective.adapter(student, teacher)
    ours = ViTOutput(hidden={1: torch.randn(2, 5, 4)}, network=Network(depth=2))
    loss = objective.loss(
        ours, ViTOutput(hidden={2: torch.randn(2, 5, 6)}, network=Network(depth=3)), None, adapter
    )  # type: ignore[arg-type]
    assert 0 <= loss.item() <= 2 and loss.requires_grad
    assert objective.student_needs(student).resolve(2).hidden == {1}


@pytest.mark.whole
def test_the_first_loop_learns() -> None:
    space: dict[str, Any] = {"loader": [BATCH] * 3}
    code = blocks(LOOP, "python")[0]
    assert len(code.strip().splitlines()) < 15
    execute(code, space)
    assert {"ce", "kd", "loss"} <= set(space["losses"])
    again = space["distiller"](*BATCH)["loss"]
    assert again.isfinite() and again < space["losses"]["loss"]


def loops() -> dict[str, str]:
    """The blocks of the page on loops by their heading."""
    parts = LOOP.read_text().split("\n## ")[1:]
    return {part.partition("\n")[0]: part.split("```python\n")[1].split("```")[0] for part in parts}


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")  # of Lightning's and Accelerate's own
@pytest.mark.parametrize("heading", loops())
def test_loops_of_ones_own_run(heading: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if heading in ("Lightning", "Accelerate"):
        pytest.importorskip(heading.lower())
    space: dict[str, Any] = {"loader": DataLoader(TensorDataset(*BATCH), 1)}
    execute(blocks(LOOP, "python")[0], space)
    if heading.startswith("Kept"):
        execute(loops()["Images of 32 x 32 pixels"], space)
    if heading == "Stored labels":
        space["student"] = timm.create_model("deit_tiny_patch16_224", num_classes=3, **SMALL)
    before = [p.detach().clone() for p in space["student"].parameters()]

    def work(_: int = 0) -> bool:
        execute(loops()[heading], space)
        after = [*space["student"].parameters()]
        if heading.startswith("Images"):  # it makes a student of its own
            return all(p.grad is not None for p in after)
        if heading.startswith("Kept"):
            commands = blocks(LOOP, "bash")[0].replace("--onnx own.onnx", "--output again")
            first, second, _ = commands.splitlines()
            assert not any(cli.main(shlex.split(line)[1:]) for line in (first, second))
        return any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))

    alone = heading != "Several processes"
    changed = [work()] if alone else ranks(2, work)
    assert all(changed) or heading.startswith(("Saved", "Stored", "The four", "Kept"))


def test_every_file_that_is_shown_can_be_read(tmp_path: Path) -> None:
    for page in PAGES:
        for text in blocks(page, "toml"):
            tomllib.loads(text)
        for text in blocks(page, "yaml"):
            (tmp_path / "file.yaml").write_text(text)
            if "rows:" in text:
                assert jobs_of(load_study(tmp_path / "file.yaml"))
            else:
                recipe = load(tmp_path / "file.yaml")
                assert isinstance(recipe, Stages) == ("stages:" in text)


def test_the_supported_pythons_are_the_tested_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: 3."
    minors = sorted(
        int(name.removeprefix(prefix)) for name in project["classifiers"] if name.startswith(prefix)
    )
    start = (ROOT / "docs" / "quickstart.md").read_text()
    assert f"Python 3.{minors[0]} to 3.{minors[-1]};" in start
    assert project["requires-python"] == f">=3.{minors[0]}"
    floors = dict(need.split(">=") for need in project["dependencies"])
    assert f"torch {floors['torch']} and timm {floors['timm']} or newer" in start
