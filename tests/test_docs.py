"""What the documents say runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_runs import plain_recipe, ranks, run, taught_recipe, write_images
from torch.utils.data import DataLoader, TensorDataset

from vitdistill import cli, methods
from vitdistill.data.augment import Augment
from vitdistill.methods.base import TeacherObjective
from vitdistill.recipes import RECIPES
from vitdistill.recipes.convert import replace_fields, to_dict
from vitdistill.recipes.settings import LabelOptions
from vitdistill.runs.label import label
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput

ROOT = Path(__file__).parents[1]


def _blocks(path: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_the_method_of_the_guide_works() -> None:
    (code,) = _blocks("docs/add_a_method.md", "python")
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


COMMANDS = ("train", "explain", "label", "eval", "export", "report", "study", "show")


def _commands() -> list[list[str]]:
    """Every command of the documents, in a block or in a line."""
    found = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text().replace("\\\n", " ")
        fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
        lines = [
            line for kind, block in fence.findall(text) if not kind for line in block.split("\n")
        ]
        inline = re.findall(r"`([^`]+)`", fence.sub("", text))
        lines += [part for part in inline if "--data-dir " in part]
        found += [shlex.split(line, comments=True) for line in lines if line[:11] == "vitdistill "]
    return [words[1:] for words in found]


def test_the_commands_of_the_documents_have_flags_that_exist() -> None:
    # Not `label status` and the like.
    checked = [words for words in _commands() if words[0] != "label" or words[1] in RECIPES]
    assert {words[0] for words in checked} == set(COMMANDS)
    assert ["train", "mae_base"] in [words[:2] for words in checked]
    for command, *words in checked:
        cli.read_arguments(command, words)


BATCH = torch.rand(4, 3, 224, 224), torch.arange(4)


def _run(code: str, space: dict[str, Any]) -> None:
    """Run a block on small networks, and without a compiler of C."""
    code = code.replace("num_classes=10", "embed_dim=24, depth=2, num_heads=2, num_classes=10")
    code = code.replace("compile(student)", 'compile(student, backend="eager")')
    exec(compile(code, "a document", "exec"), space)


@pytest.mark.whole
def test_the_loop_of_the_readme_runs() -> None:
    (code,) = [block for block in _blocks("README.md", "python") if "Distiller" in block]
    assert len(code.strip().splitlines()) < 15
    assert code == _blocks("docs/own_loop.md", "python")[0]
    space: dict[str, Any] = {"loader": [BATCH] * 3}
    _run(code, space)
    assert {"ce", "kd", "loss"} <= set(space["losses"])
    again = space["distiller"](*BATCH)["loss"]
    assert again.isfinite() and again < space["losses"]["loss"]


def _loops() -> dict[str, str]:
    """The blocks of the page on loops by their heading."""
    parts = (ROOT / "docs" / "own_loop.md").read_text().split("\n## ")[1:]
    return {part.partition("\n")[0]: part.split("```python\n")[1].split("```")[0] for part in parts}


def _labelled(folder: Path) -> torch.nn.Module:
    """Store the answers of a teacher of photos; return a student for them."""
    images = write_images(folder / "photos")
    run(plain_recipe(images), folder / "teacher")
    network = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    changes = {"student.model": "deit_tiny_patch16_224", "student.model_args": network}
    changes |= {"selector": None, "data.augment": to_dict(Augment()), "train.accumulate": 1}
    recipe = replace_fields(taught_recipe(images, folder / "teacher"), changes)
    label(recipe, folder / "labels", LabelOptions(), device="cpu")
    return timm.create_model("deit_tiny_patch16_224", num_classes=3, **network)


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")  # of Lightning's and Accelerate's own
@pytest.mark.parametrize("heading", _loops())
def test_loops_of_ones_own_run(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if heading in ("Lightning", "Accelerate"):
        pytest.importorskip(heading.lower())
    space: dict[str, Any] = {"loader": DataLoader(TensorDataset(*BATCH), 1)}
    _run(_blocks("docs/own_loop.md", "python")[0], space)
    if heading == "Stored labels":
        space["student"] = _labelled(tmp_path)
    before = [p.detach().clone() for p in space["student"].parameters()]

    def work(_: int = 0) -> bool:
        _run(_loops()[heading], space)
        after = space["distiller"].student.parameters()
        return any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))

    alone = heading != "Several processes"
    changed = [work()] if alone else ranks(2, work)
    assert all(changed) or heading.startswith(("Saved", "Stored"))


@pytest.mark.whole
def test_the_explain_command_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in _blocks("README.md", "") if "vitdistill explain" in line]
    (line,) = [line for block in lines for line in block.splitlines() if "explain" in line]
    words = shlex.split(line.replace("--data-dir photos", ""), comments=True)[1:]
    assert cli.main(words) == 0
    assert "98 of 196 patches" in capsys.readouterr().out


def test_the_readme_names_every_method_and_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    for name in methods.METHODS:
        assert f"`{name}`" in text
    assert "make demo" in text and "make test" in text


def test_links_between_the_documents_lead_somewhere() -> None:
    for page in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.whole
def test_the_sizes_of_the_readme_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    for words in ("--img-size 96", "--set student.model_args.img_size=[96,160]"):
        assert f"`{words}`" in text
    assert cli.main(["explain", "alone", "--img-size", "96"]) == 0
    square = capsys.readouterr().out
    assert cli.main(["explain", "alone", "--set", "student.model_args.img_size=[96,160]"]) == 0
    assert "36 patches" in square and "60 patches" in capsys.readouterr().out


def test_the_supported_pythons_are_the_tested_ones() -> None:
    readme, project = (ROOT / "README.md").read_text(), (ROOT / "pyproject.toml").read_text()
    minors = sorted(int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", project))
    assert f"Python 3.{minors[0]} to 3.{minors[-1]};" in readme
    assert f'requires-python = ">=3.{minors[0]}"' in project
