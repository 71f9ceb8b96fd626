"""What is said of a finished run, and the command that is printed: it runs."""

from pathlib import Path
from typing import Any

import pytest

from vitdistill.cli.train import _done_text
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.yaml import dump_recipe

TOP1 = {"best_top1": 0.9, "best_epoch": 2.0, "scores": {"top1": 0.85}}
KNN = {"best_top1": None, "best_epoch": None, "scores": {"knn_top1": 0.6}}
NONE: dict[str, Any] = {"best_top1": None, "best_epoch": None, "scores": {}}


@pytest.mark.parametrize(
    ("summary", "words", "following"),
    [
        (
            TOP1,
            ["top-1 85.00%", "best 90.00%", "1 min 15 s"],
            "eval {run}",
        ),
        (
            {**TOP1, "teachers": {"teacher": 0.95}},
            ["5.0 points below teacher (95.00% of 512 images)"],
            "eval {run}",
        ),
        (
            {**TOP1, "teachers": {"a": 0.5, "b": 0.9}},
            ["40.0 points above a (", "0.0 points above b ("],
            "",
        ),
        (KNN, ["nearest neighbours 60.00%"], "eval {run} --knn"),
        (NONE, ["done: 1 min 15 s", "weights: {run}/last"], "export {run} --output student"),
    ],
)
def test_a_finished_run_says_what_it_came_to_and_what_to_do_next(
    tmp_path: Path, summary: dict[str, Any], words: list[str], following: str
) -> None:
    recipe = replace_fields(Recipe(), {"data.dir": "my photos"})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    *about, command = _done_text({**summary, "seconds": 75.0}, tmp_path).splitlines()
    for word in words:
        assert word.format(run=tmp_path) in "\n".join(about)
    assert command.startswith(f"next: vitdistill {following.format(run=tmp_path)}")
