"""What the documents say runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from vitdistill import cli, methods
from vitdistill.method import Network, TeacherObjective
from vitdistill.vit import ViTOutput

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
    ours = ViTOutput(hidden={1: torch.randn(2, 5, 4)}, depth=2)
    loss = objective.loss(ours, ViTOutput(hidden={2: torch.randn(2, 5, 6)}, depth=3), None, adapter)  # type: ignore[arg-type]
    assert 0 <= loss.item() <= 2 and loss.requires_grad
    assert objective.student_needs(student).resolve(2).hidden == {1}


def test_the_explain_command_of_the_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in _blocks("README.md", "") for line in block.splitlines() if line.startswith("vitdistill explain")]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        words = [word for word in words if word not in ("--data-dir", "photos")]
        assert cli.main(words) == 0
        assert "98 of 196 patches" in capsys.readouterr().out


def test_the_readme_names_every_method_and_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    for name in methods.METHODS:
        assert f"`{name}`" in text
    assert "make demo" in text and "make test" in text


def test_links_between_the_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
