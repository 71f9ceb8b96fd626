"""What goes wrong in the middle of a run costs nothing: it is mended, and the same command goes on
as if it had not happened.
"""

import resource
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import (
    Child,
    in_training,
    records,
    result,
    run,
    steps_saved,
    tree,
    unfinished,
    write_images,
)

from vitdistill import cli
from vitdistill.data.order import epoch_order
from vitdistill.data.sources.open import open_source
from vitdistill.errors import ConfigError, DataError, DiskError, OutOfMemory, Set
from vitdistill.memory import memory_errors
from vitdistill.recipes.convert import replace_fields
from vitdistill.storage import checkpoint

pytestmark = pytest.mark.whole

ACCEPT = {"train.accept_changed_images": True}
ONE_BY_ONE = {"data.in_memory": False, "train.save_every": 100}


def shown(root: Path, step: int, place: int = 3) -> Path:
    """The image at a place of a step's batch; each comes once in the first epoch, of 3 steps."""
    source = open_source(str(root), "train")
    ids, _ = epoch_order(len(source), 0, step // 3)
    return root / "train" / source.key(int(ids[step % 3 * 16 + place]))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("step", "workers", "calls"),
    [(1, 0, 1), (2, 1, 1), (3, 0, 6), (None, 0, 6)],
    ids=["in a window of the log", "in a worker", "at the end of an epoch", "in an evaluation"],
)
def test_a_damaged_image_met_late_is_replaced_and_accepted(tmp_path, taught, step, workers, calls):
    """It is damaged in the ``calls``-th forward pass, of two a step."""
    root, folder, lines = write_images(tmp_path / "images"), tmp_path / "run", []
    recipe = taught(**ONE_BY_ONE, **{"data.dir": str(root), "data.workers": workers})
    path = shown(root, step) if step else root / "val" / "cat" / "05.png"
    with pytest.raises(DataError, match=path.name):
        run(recipe, folder, lines, prepared=in_training(lambda: damage(path), calls))
    saved = step or 3
    assert steps_saved(folder) == [saved] and records(folder, "eval") == []
    assert f"the state of step {saved} of 9 is saved in {folder}" in lines
    Image.effect_noise((16, 16), 90).convert("RGB").save(path)  # whole, of other bytes
    with pytest.raises(DataError) as caught:
        run(recipe, folder)
    assert caught.value.field == ("training images" if step else "validation images")
    assert Set("train.accept_changed_images", True) in caught.value.fixes
    run(replace_fields(recipe, ACCEPT), folder)
    assert steps_saved(folder)[0] == saved
    if step != 3:  # there the first epoch was trained on the other image
        run(recipe, tmp_path / "whole")
        assert result(folder) == result(tmp_path / "whole")


def test_images_that_make_fewer_steps_than_were_taken_are_refused(tmp_path, plain):
    root = write_images(tmp_path / "images")
    recipe = plain(**{"data.dir": str(root), "train.save_every": 1, "train.keep_checkpoints": 9})
    run(recipe, tmp_path / "whole")
    folder = unfinished(tmp_path / "whole", tmp_path / "run", steps_saved(tmp_path / "whole")[-2])
    for path in sorted((root / "train" / "cat").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ConfigError) as caught:
        run(replace_fields(recipe, ACCEPT), folder)
    assert caught.value.field == "data.dir" and Set("train.epochs") in caught.value.fixes


def test_where_saving_fails_too_the_first_error_is_said(tmp_path, plain):
    root, folder = write_images(tmp_path / "images"), tmp_path / "run"
    recipe = plain(**ONE_BY_ONE, **{"data.dir": str(root)})
    path = shown(root, 2)
    damage(path)

    def fill(job):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    error = Child(lambda: run(recipe, folder, prepared=fill)).wait()
    assert isinstance(error, DataError) and path.name in str(error) and steps_saved(folder) == []


def allocate() -> None:
    """More than there is on any machine: refused at once, in the words of torch."""
    torch.empty(2**50)


@pytest.mark.parametrize("fault", ["export", "memory"])
def test_an_evaluation_that_fails_does_not_cost_the_epoch(tmp_path, taught, fault):
    """With the export the scores are there, and are neither logged nor taken for the best."""
    recipe, folder = taught(**{"train.save_every": 100}), tmp_path / "run"
    if fault == "export":
        before = in_training(lambda: (folder / "last").write_text("mine"), 1)
    else:
        before = in_training(allocate, 1, training=False)
    with pytest.raises((DiskError, OutOfMemory), match=r"last cannot be|in an evaluation"):
        run(recipe, folder, prepared=before)
    assert steps_saved(folder) == [3] and records(folder, "eval") == []
    _, state = checkpoint.load(checkpoint.folder_of(folder, 3))
    found = [state[key] for key in ("evaluated_at", "best", "best_step", "scores")]
    assert found == [-1, None, -1, {}]
    (folder / "last").unlink(missing_ok=True)
    run(recipe, folder)
    run(recipe, tmp_path / "whole")
    assert result(folder) == result(tmp_path / "whole")


# -- memory ---------------------------------------------------------------------------------------

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "this machine"),
        (None, "this machine"),
        (CUDA, "the GPU"),
        (CUBLAS, "the GPU"),
    ],
)
def test_memory_that_runs_out_is_a_sentence(error, what):
    with (
        pytest.raises(OutOfMemory, match=f"^the memory of {what} ran out here: do this$"),
        memory_errors("here", "do this"),
    ):
        if error is not None:
            raise error
        allocate()
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), memory_errors("here", "do this"):
        raise RuntimeError("size mismatch")


def test_memory_that_runs_out_in_a_step(tmp_path, plain):
    recipe = plain(**{"train.accumulate": 2})
    with pytest.raises(OutOfMemory, match="in a training step of 8 images at once") as caught:
        run(recipe, tmp_path / "run", prepared=in_training(allocate, 4))
    assert caught.value.exit_code == 71 and steps_saved(tmp_path / "run") == [1]


# -- the folder of a run is a recipe --------------------------------------------------------------


def test_a_run_is_resumed_by_its_folder_and_begun_anew_only_in_another(
    tmp_path, plain, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run(plain(**{"name": "mine"}), Path("whole"))
    folder = unfinished(Path("whole"), Path("elsewhere/mine"), 4)
    before = tree(Path())
    again = ["train", str(folder), "--device", "cpu"]
    assert cli.main([*again, "--lr", "0.004"]) == 78
    assert "(--lr is 0.004 here and 0.002 there)" in capsys.readouterr().err
    assert tree(Path()) == before
    assert cli.main([*again, "--lr", "0.004", "--output", "new"]) == 0
    assert records(Path("new"))[0]["step"] == 2 and steps_saved(folder) == [1, 2, 3, 4]
    capsys.readouterr()
    assert cli.main(again) == 0
    assert f"resuming {folder} at step 4 of 9" in capsys.readouterr().out
    assert result(folder) == result(Path("whole")) and not Path("runs").exists()
    before = tree(Path())
    assert cli.main(again) == 0
    assert "finished already" in capsys.readouterr().out and tree(Path()) == before


def test_a_recipe_of_a_name_is_not_a_folder_of_that_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("alone").mkdir()
    assert cli.main(["train", "alone", "--device", "cpu"]) == 78
    assert "no images are given" in capsys.readouterr().err
