"""What a staged recipe is: earlier stages named by later ones, and the same through YAML."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.recipes.strategies import three
from vitdistill.errors import ConfigError, DataError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.named import find_recipe
from vitdistill.recipes.settings import StudentConfig, TeacherConfig
from vitdistill.recipes.stages import (
    STAGES,
    Stages,
    foreseen,
    in_stage,
    load,
    refuse_sources,
    sources,
)
from vitdistill.recipes.yaml import dump_recipe, load_recipe

graphs = st.lists(
    st.tuples(st.none() | st.integers(0, 4), st.sets(st.integers(0, 4), max_size=2)),
    min_size=2,
    max_size=4,
)


@settings(max_examples=60)
@given(graph=graphs)
def test_a_stage_builds_on_earlier_ones_and_none_is_for_nothing(
    graph: list[tuple[int | None, set[int]]],
) -> None:
    """Any graph of students and teachers, against the rule as one line."""
    recipes = {}
    for i, (student, teachers) in enumerate(graph):
        model = "deit_tiny_patch16_224" if student is None else f"stage:s{student}"
        objectives = {"ce": CrossEntropy(), **{f"kd{t}": SoftKD(teacher=f"t{t}") for t in teachers}}
        configs = {f"t{t}": TeacherConfig(model=f"stage:s{t}") for t in teachers}
        recipes[f"s{i}"] = Recipe(
            student=StudentConfig(model=model), teachers=configs, objectives=objectives
        )
    used = [{s for s in (student, *teachers) if s is not None} for student, teachers in graph]
    valid = all(s < i for i, of in enumerate(used) for s in of) and set().union(*used) >= set(
        range(len(graph) - 1)
    )
    if not valid:
        with pytest.raises(ConfigError):
            Stages(name="any", stages=recipes)
        return
    stages = Stages(name="any", stages=recipes)
    assert [recipe.name for recipe in stages.stages.values()] == [*recipes]
    for i, recipe in enumerate(stages.stages.values()):
        assert set(sources(recipe).values()) == {f"s{s}" for s in used[i]}


def test_a_staged_recipe_survives_yaml(tmp_path: Path) -> None:
    stages = replace(three(), description="no: yes")
    (tmp_path / "a.yaml").write_text(dump_recipe(stages))
    assert load(tmp_path / "a.yaml") == stages == find_recipe(str(tmp_path / "a.yaml"))
    with pytest.raises(ConfigError):
        load_recipe(tmp_path / "a.yaml")


def test_a_network_is_foreseen_through_the_stages_before_it() -> None:
    """Its architecture is handed on with what makes it, not with how it was trained."""
    student = foreseen(three(), "finetune").student
    assert (student.model, student.image_size) == ("deit_tiny_patch16_224", 256)
    assert (student.drop_path, student.model_args) == (0.0, {"depth": 6})
    teacher = foreseen(three(), "distill").teachers["teacher"]
    assert (teacher.model, teacher.image_size) == ("deit_tiny_patch16_224", None)
    assert teacher.model_args == {"img_size": 256, "depth": 6}


@pytest.mark.parametrize(
    ("stage", "field", "value", "wrong"),
    [
        ("finetune", "student.model", "stage:pretrian", ("finetune", "student.model")),
        ("pretrain", "student.model", "stage:distill", ("pretrain", "student.model")),
        ("distill", "teachers.teacher.model", "deit_tiny_patch16_224", ("", "stages")),
        ("finetune", "student.checkpoint", "a.pth", ("finetune", "student.checkpoint")),
        ("finetune", "name", "pretrain", ("finetune", "name")),
        ("finetune", "name", STAGES, ("finetune", "name")),
    ],
)
def test_stages_that_cannot_be(stage: str, field: str, value: Any, wrong: tuple[str, str]) -> None:
    stages = three().stages
    with pytest.raises(ConfigError) as caught:
        Stages(stages={**stages, stage: replace_fields(stages[stage], {field: value})})
    assert (caught.value.stage, caught.value.field) == wrong


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: {a: {}}", "two stages"),
        ("stages: [a, b]", "mapping"),
        ("stages: {a-b: {}, c: {student: {model: 'stage:a-b'}}}", "'a-b'"),
        ("stages: {a: {}, a: {}}", '"a"'),
        ("nam: x\nstages: {a: {}, b: {}}", "'name'"),
        ("optim: {}\nstages: {a: {}, b: {}}", "'optim'"),
        ("name: 5\nstages: {a: {}, b: {student: {model: 'stage:a'}}}", "name"),
        ("name: a/b\nstages: {a: {}, b: {student: {model: 'stage:a'}}}", "'a/b'"),
        ("stages: {a: {}, b: {optim: {lr: fast}}}", r"stage 'b'.*optim\.lr"),
        ("stages: {a: {}, b: {train: {epochs: 0}}}", r"stage 'b'.*train\.epochs"),
        ("stages: {a: {}, b: 3}", "stages.b"),
        ("stages:\n  a: {}\n  b: [", "line 3"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load(tmp_path / "mine.yaml")
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_of_one_run_names_no_stage() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_sources(three().stages["finetune"])
    assert caught.value.field == "student.model"


def test_an_error_in_a_stage_stays_what_it_is_and_says_which() -> None:
    error = DataError("this is wrong")
    with pytest.raises(DataError) as caught, in_stage("outer"), in_stage("s"):
        raise error
    assert caught.value is error and str(error) == "in the stage 's', this is wrong"


def test_the_recipe_of_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "stages.md").read_text()
    (code,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(code)
    stages = load(tmp_path / "mine.yaml")
    assert isinstance(stages, Stages) and [*stages.stages] == ["pretrain", "finetune", "distill"]
