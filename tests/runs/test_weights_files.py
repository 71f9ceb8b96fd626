"""The weights files a run began from: known by their content, wherever they are when it goes on."""

import shutil

import pytest

from vitdistill.errors import ConfigError, DataError, Preempted
from vitdistill.recipes.convert import replace_fields

pytestmark = pytest.mark.whole

STUDENT, TEACHER = "student.checkpoint", "teachers.teacher.checkpoint"


@pytest.mark.parametrize("field", [STUDENT, TEACHER])
def test_a_run_goes_on_with_its_weights_file_in_another_place(
    field, tmp_path, taught, teacher, tools, interrupt
):
    first, second, third = (
        tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")
    )
    shutil.copy(teacher / "last" / "model.safetensors", first)
    other = (
        {"teachers.teacher.model": "vit_tiny_patch16_224", "teachers.teacher.model_args": tools.VIT}
        if field == TEACHER
        else {}
    )
    recipe, run = taught(**other, **{field: str(first)}), tmp_path / "run"
    with pytest.raises(Preempted):
        tools.run(recipe, run, prepared=interrupt(recipe.name, 9))
    first.rename(second)
    with pytest.raises(DataError, match=r"there is no weights file .*a\.safetensors"):
        tools.run(recipe, run)
    moved = replace_fields(recipe, {field: str(second)})
    tools.run(moved, run)
    tools.run(moved, tmp_path / "whole")
    assert tools.result(run) == tools.result(tmp_path / "whole")
    before = tools.tree(run)
    second.rename(third)
    said: list[str] = []
    tools.run(replace_fields(recipe, {field: str(third)}), run, said)
    assert said == [f"{run} is finished already: nothing to do"]
    shutil.copy(tmp_path / "whole" / "last" / "model.safetensors", first)
    with pytest.raises(
        ConfigError,
        match=(
            rf"holds another run \({field} is '.*a\.safetensors' here and"
            r" '.*a\.safetensors' there"
        ),
    ):
        tools.run(replace_fields(recipe, {field: f"{tmp_path}/./a.safetensors"}), run)
    assert tools.tree(run) == before


def test_a_stopped_run_is_not_continued_with_other_weights_under_the_old_name(
    tmp_path, taught, teacher, tools, interrupt
):
    file = tmp_path / "a.safetensors"
    shutil.copy(teacher / "last" / "model.safetensors", file)
    changes = {
        "teachers.teacher.model": "vit_tiny_patch16_224",
        "teachers.teacher.model_args": tools.VIT,
        TEACHER: str(file),
    }
    recipe = taught(**changes)
    with pytest.raises(Preempted):
        tools.run(recipe, tmp_path / "run", prepared=interrupt(recipe.name, 9))
    tools.run(taught(), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "last" / "model.safetensors", file)
    with pytest.raises(ConfigError, match="checkpoint has other weights") as caught:
        tools.run(recipe, tmp_path / "run")
    assert caught.value.field == "output"
