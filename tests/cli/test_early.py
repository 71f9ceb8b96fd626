"""What the command line reads of any text, and what it answers before torch is imported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.home import run
from vitdistill.cli import COMMANDS, read_arguments
from vitdistill.cli.arguments import groups_of
from vitdistill.cli.recipe import resolve_recipe
from vitdistill.errors import ConfigError, UserError
from vitdistill.messages import printable_lines
from vitdistill.option import convert_scalar
from vitdistill.recipes.convert import flatten, from_dict

TEXT_FLAGS = [
    (command, flag)
    for command, (_, kind) in COMMANDS.items()
    for flags in groups_of(kind).values()
    for flag in flags
    if flag.value_kind is str
]
REQUIRED = {
    "eval": ["--data-dir=x", "MODEL"],
    "export": ["RUN"],
    "report": ["PATH"],
    "study": ["FILE"],
    "show": ["RUN", "IMAGE"],
    "label merge": ["TARGET", "--from=x"],
    "label prune": ["FOLDER", "--to=x"],
    "label export": ["FOLDER", "--to=x"],
}


def value_of(command: str, flag: Any, word: str) -> Any:
    """What a command reads of ``word`` for one of its flags."""
    others = [w for w in REQUIRED.get(command, ["FOLDER"] if "label " in command else []) if w]
    others = [w for w in others if w.partition("=")[0] != flag.name]
    words = [word, *others] if flag.positional else [f"{flag.name}={word}", *others]
    if flag.name == "IMAGE":  # the second of its kind
        words = [*others, word]
    found = read_arguments(command, words)
    value = {**vars(found), **getattr(found, "settings", {})}[flag.dest]
    return value[0] if isinstance(value, tuple | list) else value


@pytest.mark.parametrize(("command", "flag"), TEXT_FLAGS, ids=lambda of: getattr(of, "name", of))
def test_a_home_is_expanded_and_a_control_character_refused_in_every_text(
    command: str, flag: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert value_of(command, flag, "~/photos") == "/home/me/photos"
    assert value_of(command, flag, "a~/b") == "a~/b"
    for raw in ("\x1b[31mred", "right\u202eleft", "latin\udce9", "nul\0", "\x9b1m"):
        with pytest.raises(UserError) as caught:
            value_of(command, flag, raw)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", ["data.dir", "student.checkpoint", "student.model"])
def test_homes_in_recipes_and_assignments(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    part, _, name = path.partition(".")
    assert flatten(from_dict({part: {name: "~/x"}}))[path] == "/home/me/x"
    words = ["alone", "--set", f"{path}=~/x"]
    assert flatten(resolve_recipe(read_arguments("train", words)))[path] == "/home/me/x"  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        from_dict({part: {name: "\x1b[2J"}})


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("~", "~"),
        ("~/a", "/home/me/a"),
        ("torchvision/CIFAR10?root=~/data", "torchvision/CIFAR10?root=/home/me/data"),
        ("local-dir:x~/y", "local-dir:x~/y"),
        ("日本/é", "日本/é"),
        ("a\u200db\u00a0c", "a\u200db\u00a0c"),
    ],
)
def test_other_text_is_left_alone(text: str, read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert convert_scalar(text, str, "x") == read


@given(text=st.text(max_size=20))
def test_whatever_is_said_is_fit_for_a_terminal(text: str) -> None:
    assert all(line.isprintable() for line in printable_lines(text).split("\n"))


LONG = "x" * 256


@pytest.mark.parametrize(
    "command",
    [
        f"train small_images_alone --data-dir . --output {LONG}",
        f"train {LONG}",
        f"train {LONG}.yaml",
        f"train alone --data-dir {LONG}",
        f"eval {LONG} --data-dir .",
        f"export {LONG} --output x",
        f"label status {LONG}",
        f"label small_images_kd --data-dir . --teacher-model x --output {LONG}",
        f"explain alone --model ./{LONG}",
    ],
)
def test_a_name_that_no_disk_takes_is_one_sentence(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(command) in range(64, 79)
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("vitdistill ") and list(tmp_path.iterdir()) == []


MISTAKES = [
    ["trian"],
    ["train", "--help"],
    ["train", "kd", "--help"],
    ["label", "prune", "--help"],
    ["train", "--lrr", "1"],
    ["train", "--teacher", "x"],
    ["train", "kd", "--lr", "fast"],
    ["train", "kd", "--sched", "cosin"],
    ["train", "maskdkd"],
    ["train", "nowhere.yaml"],
    ["label", "kdd"],
    ["explain", "kd", "--with", "kdd"],
    ["explain", "small_images_mae_finetuned", "--with", "finetune.kdd"],
    ["train", "kd", "--set", "optim.lrr=1"],
    ["train", "kd", "--set", "teachers.teacher.modle=x"],
    ["train", "kd", "--set", "data.augment.mixupp=1"],
    ["train", "kd", "--epochs", "0"],
    ["train", "kd", "--mixup", "-1"],
    ["train", "kd", "--data-dir", "nowhere"],
    ["train", "kd", "--data-dir", ".", "--model-path", "nowhere.pth"],
    ["label", "kd", "--data-dir", ".", "--teacher-path", "nowhere.pth"],
    ["eval", "x", "--data-dir", "nowhere"],
    ["eval", "x", "--data-dir", ".", "--knn", "0"],
    ["label", "status", "nowhere"],
]


def test_words_are_answered_without_torch() -> None:
    script = (
        "import sys; from vitdistill.cli import main\n"
        f"for words in {MISTAKES!r}:\n"
        "    code = main(words)\n"
        "    assert (code == 0) == ('--help' in words), words\n"
        "    late = {'torch', 'timm', 'jaxtyping', 'ruamel.yaml', 'rich'} & sys.modules.keys()\n"
        "    assert not late, (words, late)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("\n") == sum("--help" not in words for words in MISTAKES)


@pytest.mark.parametrize("words", [["explain", "alone"], ["eval", "x", "--json"]])
def test_the_first_word_comes_before_torch_beside_the_results(words: list[str]) -> None:
    script = (
        "import sys; sys.modules['torch'] = None; del sys.modules['torch']\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': sys.exit(0)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"from vitdistill.cli import main; main({words!r})"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (found.stdout, found.stderr) == (
        "",
        f"vitdistill {words[0]}: loading PyTorch and timm\n",
    )


@pytest.mark.parametrize("module", ["vitdistill", "vitdistill.cli"])
def test_python_runs_it_as_a_module(module: str) -> None:
    found = subprocess.run([sys.executable, "-m", module, "trian"], capture_output=True, text=True)
    assert (found.returncode, found.stderr.count("did you mean 'train'?")) == (64, 1)
