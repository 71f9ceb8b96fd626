"""Who reads what a command prints, or whether anybody does, changes nothing of what it does."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import Child, plain_recipe, result, run, write_images

from vitdistill.cli import main
from vitdistill.cli.console import say
from vitdistill.labels.store import LabelStore
from vitdistill.methods.kd import SoftKD
from vitdistill.recipes.settings import TeacherConfig
from vitdistill.recipes.yaml import dump_recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a recipe, its finished run ``whole``, and ``kd.yaml`` with that for a teacher."""
    home = tmp_path_factory.mktemp("home")
    plain = plain_recipe(write_images(home / "images"), **{"train.log_every": 1})
    (home / "plain.yaml").write_text(dump_recipe(plain))
    run(plain, home / "whole")
    taught = {"teacher": TeacherConfig(model=str(home / "whole"))}
    kd = replace(plain, teachers=taught, objectives={"kd": SoftKD()})
    (home / "kd.yaml").write_text(dump_recipe(kd))
    return home


def nobody() -> int:
    """A pipe whose reader has gone, as after ``| head -3``."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


COMMANDS = {
    "--help": 0,
    "recipes": 0,
    "nonsense": 64,
    "train plain.yaml --output run --device cpu": 0,
    "label kd.yaml --output labels --device cpu": 0,
    "eval whole --data-dir images --device cpu": 0,
    "export whole --output export": 0,
    "explain plain.yaml": 0,
}


@pytest.mark.whole
@pytest.mark.parametrize("sink", [nobody, full])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_console_that_fails_stops_no_command(
    home: Path, tmp_path: Path, command: str, sink: Callable[[], int]
) -> None:
    def work() -> int:
        os.chdir(tmp_path)
        for name in ("images", "whole", "plain.yaml", "kd.yaml"):
            Path(name).symlink_to(home / name)
        for descriptor in (1, 2):
            os.dup2(sink(), descriptor)
        with open(1, "w") as sys.stdout, open(2, "w") as sys.stderr:  # flushed at the end
            return main(command.split())

    assert Child(work).wait() == COMMANDS[command]
    if command.startswith("train"):
        assert result(tmp_path / "run") == result(home / "whole")
    elif command.startswith("label"):
        assert LabelStore.open(tmp_path / "labels" / "teacher").verify() == []
    elif command.startswith("export"):
        assert (tmp_path / "export" / "model.safetensors").is_file()


def test_a_closed_console_is_one_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--help"]) == 0


@pytest.mark.parametrize("terminal", [True, False])
def test_prose_breaks_between_words_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    text = "what a run says of itself, and of its teachers, in one long sentence of many words"
    say(text, fold=True)
    say(text)
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop() == text, "what may be copied stays whole"
    assert " ".join(lines) == text and (max(map(len, lines)) <= 50) == terminal
