"""Recipe files: YAML 1.2, read strictly, and what is written is read back."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.recipes.strategies import PLAIN, RECIPES, WORDS
from vitdistill.errors import ConfigError
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import flatten
from vitdistill.recipes.yaml import dump_recipe, dump_yaml, load_recipe, parse_yaml


def read(tmp_path: Path, text: str | bytes) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path)


@given(data=PLAIN, key=WORDS)
def test_any_plain_data_is_read_back(data: Any, key: str) -> None:
    assert parse_yaml(dump_yaml({key: [data]}), "x") == {key: [data]}


@given(recipe=RECIPES)
def test_any_recipe_is_read_back(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("optim: {lr: 1e-3}", "optim.lr", 0.001),
        ("optim: {lr: '1e-3'}", "optim.lr", 0.001),
        ("train: {epochs: 10.0}", "train.epochs", 10),
        ("train: {epochs: 010}", "train.epochs", 10),
        ("optim: {opt: no}", "optim.opt", "no"),
        ("name: 2026-11-21", "name", "2026-11-21"),
        ("name: 0x10", "name", "0x10"),
        ("optim: {opt_args: {eps: 1e-8}}", "optim.opt_args.eps", 1e-8),
        ("optim: {opt_args: {eps: '1e-8'}}", "optim.opt_args.eps", "1e-8"),
        ("optim: {sched: none, warmup_epochs: 0}", "optim.sched", "none"),
        ("data: {augment: {scale: [0.5, 1]}}", "data.augment.scale", [0.5, 1.0]),
        (b"\xef\xbb\xbfname: caf\xc3\xa9", "name", "café"),
    ],
)
def test_words_mean_what_they_look_like(
    text: str | bytes, field: str, value: Any, tmp_path: Path
) -> None:
    found = flatten(read(tmp_path, text))[field]
    assert found == value and type(found) is type(value)


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    """As PyYAML wrote it: unquoted dates and hexadecimals that are text, 1.0e-06, folded lines."""
    text = (
        "name: 2026-11-21\ndescription: 'distillation from the top class of --teacher-model (give a"
        " student with a\n  distillation token)'\nstudent:\n  model: 0x10\n  checkpoint: null\n"
        "  model_args: {}\noptim:\n  warmup_lr: 1.0e-06\n  opt_args:\n    betas:\n    - 0.9\n"
        "    - 0.95\ndata:\n  dir: ''\n"
    )
    recipe = read(tmp_path, text)
    assert (recipe.name, recipe.student.model, recipe.data.dir) == ("2026-11-21", "0x10", "")
    assert recipe.description.endswith("(give a student with a distillation token)")
    assert recipe.optim.warmup_lr == 1e-6 and recipe.optim.opt_args == {"betas": [0.9, 0.95]}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: {lr: 0.1}\noptim: {lr: 0.2}", 2),
        ("name: !!python/object/apply:os.getcwd []", 1),
        (b"name: caf\xe9", None),
        ("name: \x00", None),
        ("name: [", 1),
        ("a: b: c", 1),
        ("--- 1\n--- 2", 2),
        ("", None),
        ("[1, 2]", None),
        ("5: x", None),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(
    text: str | bytes, line: int | None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    sentence = str(caught.value)
    assert "mine.yaml" in sentence and "\n" not in sentence and len(sentence) < 500
    assert line is None or f"line {line} " in sentence


def test_a_canary_in_a_tag_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError):
        read(tmp_path, f"name: !!python/object/apply:pathlib.Path.touch ['{canary}']")
    assert not canary.exists()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_numbers_to_readers_of_yaml_1_1(value):
    """They take a float without a dot, such as 1e-06, for text."""
    assert "." in dump_yaml({"lr": value}).partition("lr: ")[2]
