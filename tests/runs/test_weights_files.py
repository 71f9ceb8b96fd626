"""The weights files a run began from: known by their content, wherever they are when it goes on."""

import shutil

import pytest
from small_runs import VIT, in_training, result, run, said, send, tree

from vitdistill.errors import ConfigError, DataError, Preempted
from vitdistill.recipes.convert import replace_fields

pytestmark = pytest.mark.whole

STUDENT, TEACHER = "student.checkpoint", "teachers.teacher.checkpoint"
VIT_TEACHER = {
    "teachers.teacher.model": "vit_tiny_patch16_224",
    "teachers.teacher.model_args": VIT,
}


@pytest.mark.parametrize("field", [STUDENT, TEACHER])
def test_a_run_goes_on_with_its_weights_file_in_another_place(
    field, tmp_path, taught, teacher, whole
):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    shutil.copy(teacher / "last" / "model.safetensors", first)
    recipe = taught(**(VIT_TEACHER if field == TEACHER else {}), **{field: str(first)})
    folder = tmp_path / "run"
    with pytest.raises(Preempted):
        run(recipe, folder, prepared=in_training(send(2), 9))
    first.rename(second)
    with pytest.raises(DataError, match=r"there is no weights file .*a\.safetensors"):
        run(recipe, folder)
    shutil.copy(whole / "last" / "model.safetensors", first)
    with pytest.raises(ConfigError, match="checkpoint has other weights") as caught:
        run(recipe, folder)
    assert caught.value.field == "output"
    moved = replace_fields(recipe, {field: str(second)})
    run(moved, folder)
    run(moved, tmp_path / "whole")
    assert result(folder) == result(tmp_path / "whole")
    before, third = tree(folder), second.rename(tmp_path / "c.safetensors")
    again = said(replace_fields(recipe, {field: str(third)}), folder)
    assert again == [f"{folder} is finished already: nothing to do"]
    with pytest.raises(ConfigError, match=rf"holds another run \({field} is "):
        run(replace_fields(recipe, {field: f"{tmp_path}/./a.safetensors"}), folder)
    assert tree(folder) == before
