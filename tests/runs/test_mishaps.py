"""What goes wrong in the middle of a run costs nothing: it is mended, and the same command goes on
as if it had not happened.
"""

import contextlib
import io
import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitdistill import cli
from vitdistill.data.order import epoch_order
from vitdistill.data.sources.open import open_source
from vitdistill.errors import DataError, DiskError, OutOfMemory, Set, UserError
from vitdistill.memory import memory_errors
from vitdistill.recipes.convert import replace_fields
from vitdistill.storage import checkpoint
from vitdistill.world import join_world

pytestmark = pytest.mark.whole

ACCEPT = {"train.accept_changed_images": True}
ONE_BY_ONE = {"data.in_memory": False, "train.save_every": 100}


def shown(root: Path, step: int, place: int = 3) -> Path:
    """The image at a place of a step's batch; each comes once in the first epoch, which is of 3
    steps.
    """
    source = open_source(str(root), "train")
    ids, _ = epoch_order(len(source), 0, step // 3)
    return root / "train" / source.key(int(ids[step % 3 * 16 + place]))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def another(path: Path) -> None:
    """A whole image of the same name, of other bytes."""
    Image.effect_noise((16, 16), 90).convert("RGB").save(path)


def steps_saved(folder: Path) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir()
    )


def in_training(work, calls):
    """For ``prepared``: do something in the ``calls``-th forward pass of training."""

    def watch(job):
        count = 0

        def hook(module, inputs, output):
            nonlocal count
            count += module.training
            if module.training and count == calls:
                work()

        job.student.norm.register_forward_hook(hook)

    return watch


# -- images that cannot be read -------------------------------------------------------------------


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (2, 1)])
def test_a_damaged_image_met_late_is_replaced_and_accepted(tmp_path, taught, tools, step, workers):
    """Step 1 ends inside a window of the log, with its sums; nothing else had been saved."""
    root, folder, said = tools.write_images(tmp_path / "images"), tmp_path / "run", []
    recipe = taught(**ONE_BY_ONE, **{"data.dir": str(root), "data.workers": workers})
    path = shown(root, step)
    damage(path)
    with pytest.raises(DataError, match=path.name):
        tools.run(recipe, folder, said)
    assert steps_saved(folder) == [step]
    assert f"the state of step {step} of 9 is saved in {folder}" in said
    another(path)
    with pytest.raises(DataError) as caught:
        tools.run(recipe, folder)
    assert caught.value.field == "training images"
    assert Set("train.accept_changed_images", True) in caught.value.fixes
    said.clear()
    tools.run(replace_fields(recipe, ACCEPT), folder, said)
    assert f"resuming {folder} at step {step} of 9" in said
    tools.run(recipe, tmp_path / "whole")
    assert tools.result(folder) == tools.result(tmp_path / "whole")


def test_an_image_that_is_lost_at_the_end_of_an_epoch(tmp_path, plain, tools):
    """The epoch is evaluated by the run that goes on; the image, once read, is restored as it
    was.
    """
    root, folder = tools.write_images(tmp_path / "images"), tmp_path / "run"
    recipe = plain(**ONE_BY_ONE, **{"data.dir": str(root)})
    tools.run(recipe, tmp_path / "whole")
    path = shown(root, 3)
    content = path.read_bytes()
    with pytest.raises(DataError, match=path.name):
        tools.run(recipe, folder, prepared=in_training(lambda: damage(path), 3))
    assert steps_saved(folder) == [3] and '"eval"' not in (folder / "metrics.jsonl").read_text()
    path.write_bytes(content)
    tools.run(recipe, folder)
    assert tools.result(folder) == tools.result(tmp_path / "whole")


def test_a_damaged_validation_image(tmp_path, plain, tools):
    root, folder = tools.write_images(tmp_path / "images"), tmp_path / "run"
    recipe = plain(**ONE_BY_ONE, **{"data.dir": str(root)})
    damage(root / "val" / "cat" / "05.png")
    with pytest.raises(DataError, match=r"cat/05\.png"):
        tools.run(recipe, folder)
    assert steps_saved(folder) == [3] and not (folder / "last").exists()
    another(root / "val" / "cat" / "05.png")
    tools.run(replace_fields(recipe, ACCEPT), folder)
    tools.run(recipe, tmp_path / "whole")
    assert tools.result(folder) == tools.result(tmp_path / "whole")


def test_an_image_that_one_of_two_processes_meets(tmp_path, taught, tools):
    root, folder = tools.write_images(tmp_path / "images"), tmp_path / "run"
    recipe = taught(**ONE_BY_ONE, **{"data.dir": str(root)})
    path = shown(root, 1, 13)  # in the second half of the batch
    damage(path)
    errors = tools.ranks(2, lambda rank: tools.run(recipe, folder))
    assert [type(error) for error in errors] == [DataError] * 2
    assert str(errors[0]) == str(errors[1]) and path.name in str(errors[0])
    assert steps_saved(folder) == [1]


def test_where_saving_fails_too_the_first_error_is_said(tmp_path, plain, tools):
    root, folder = tools.write_images(tmp_path / "images"), tmp_path / "run"
    recipe = plain(**ONE_BY_ONE, **{"data.dir": str(root)})
    path = shown(root, 2)
    damage(path)

    def work():
        return tools.run(
            recipe,
            folder,
            prepared=lambda job: resource.setrlimit(
                resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY)
            ),
        )

    error = tools.Child(work).wait()
    assert type(error) is DataError and path.name in str(error) and steps_saved(folder) == []


# -- evaluation and export ------------------------------------------------------------------------


def test_an_export_that_fails_does_not_cost_the_epoch(tmp_path, taught, tools):
    """The scores are there by then, and are neither logged nor taken for the best."""
    recipe, folder = taught(**{"train.save_every": 100}), tmp_path / "run"
    with pytest.raises(DiskError, match="last cannot be"):
        tools.run(
            recipe, folder, prepared=in_training(lambda: (folder / "last").write_text("mine"), 1)
        )
    assert steps_saved(folder) == [3] and '"eval"' not in (folder / "metrics.jsonl").read_text()
    _, state = checkpoint.load(checkpoint.folder_of(folder, 3))
    assert (state["evaluated_at"], state["best"], state["best_step"], state["scores"]) == (
        -1,
        None,
        -1,
        {},
    )
    (folder / "last").unlink()
    tools.run(recipe, folder)
    tools.run(recipe, tmp_path / "whole")
    assert tools.result(folder) == tools.result(tmp_path / "whole")


def test_hidden_files_of_the_system_in_an_export_are_no_obstacle(tmp_path, plain, tools):
    folder = tmp_path / "run"

    def browse(job):
        """As Finder does between two evaluations."""

        def hook(module, inputs, output):
            if module.training and (folder / "last").is_dir():
                (folder / "last" / ".DS_Store").write_text("finder")

        job.student.norm.register_forward_hook(hook)

    assert tools.run(plain(), folder, prepared=browse)["steps"] == 9
    assert (folder / "last" / ".DS_Store").read_text() == "finder" and not list(folder.glob(".*"))


# -- memory ---------------------------------------------------------------------------------------


def allocate() -> None:
    """More than there is on any machine: refused at once, in the words of torch."""
    torch.empty(2**50)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "this machine"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "the GPU"),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            "the GPU",
        ),
    ],
)
def test_memory_that_runs_out_is_a_sentence(error, what):
    with (
        pytest.raises(OutOfMemory, match=f"^the memory of {what} ran out here: do this$"),
        memory_errors("here", "do this"),
    ):
        raise error
    with (
        pytest.raises(OutOfMemory, match=r"^the memory of this machine ran out here: do this$"),
        memory_errors("here", "do this"),
    ):
        allocate()
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), memory_errors("here", "do this"):
        raise RuntimeError("size mismatch")


def test_memory_that_runs_out_in_a_step(tmp_path, plain, tools):
    recipe = plain(**{"train.accumulate": 2})
    with pytest.raises(OutOfMemory, match="in a training step of 8 images at once") as caught:
        tools.run(recipe, tmp_path / "run", prepared=in_training(allocate, 4))
    assert caught.value.exit_code == 71 and steps_saved(tmp_path / "run") == [1]


def test_memory_that_runs_out_in_an_evaluation(tmp_path, plain, tools):
    recipe, folder = plain(**{"train.save_every": 100}), tmp_path / "run"

    def watch(job):
        job.student.norm.register_forward_hook(
            lambda module, inputs, output: None if module.training else allocate()
        )

    with pytest.raises(OutOfMemory, match="in an evaluation"):
        tools.run(recipe, folder, prepared=watch)
    assert steps_saved(folder) == [3]
    tools.run(recipe, folder)
    tools.run(recipe, tmp_path / "whole")
    assert tools.result(folder) == tools.result(tmp_path / "whole")


def test_memory_that_runs_out_on_one_of_two_processes(tmp_path, plain, tools):
    def work(rank):
        return tools.run(
            plain(), tmp_path / "run", prepared=None if rank else in_training(allocate, 5)
        )

    errors = tools.ranks(2, work)
    assert type(errors[0]) is OutOfMemory and not errors[0].agreed
    assert "another process of this run died" in str(errors[1])


# -- who says it ----------------------------------------------------------------------------------


def command(words):
    """A command under torchrun: what fails is its word."""
    (word,) = words
    with join_world("cpu") as here:
        if word == "together":
            with here.together():
                if here.rank == 1:
                    raise DataError("cat/05.png is damaged")
        if word == "alone" and here.rank == 1:
            raise UserError("mine alone")
        here.gather(word)
    return 0


@pytest.mark.parametrize(
    ("word", "first", "second"),
    [
        ("together", "vitdistill: cat/05.png is damaged\n", ""),
        (
            "alone",
            "vitdistill: another process of this run died or does not answer .*\n",
            r"vitdistill \(process 1\): mine alone" + "\n",
        ),
    ],
)
def test_an_error_is_said_once_by_who_met_it(tools, word, first, second):
    def work(rank):
        cli._run = lambda name, words, prog: command(words)  # of this process, a fork
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = cli.main(["fail", word])
        return code, said.getvalue()

    (first_code, first_said), (second_code, second_said) = tools.ranks(2, work)
    assert re.fullmatch(first, first_said) and re.fullmatch(second, second_said)
    assert (first_code, second_code) == ((65, 65) if word == "together" else (70, 64))


# -- the folder of a run is a recipe --------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path, plain, tools, monkeypatch) -> Path:
    """A run that was killed after step 4, in ``runs`` of the current folder, and beside it
    ``whole``, which was not.
    """
    monkeypatch.chdir(tmp_path)
    tools.run(plain(**{"name": "mine"}), Path("whole"))
    folder = Path("elsewhere/mine")
    shutil.copytree("whole", folder)
    (folder / "summary.json").unlink()
    for step in range(5, 10):
        shutil.rmtree(checkpoint.folder_of(folder, step))
    return folder


def test_a_run_is_resumed_by_its_folder(stopped, tools, capsys):
    assert cli.main(["train", str(stopped), "--device", "cpu"]) == 0
    assert f"resuming {stopped} at step 4 of 9" in capsys.readouterr().out
    assert tools.result(stopped) == tools.result(Path("whole")) and not Path("runs").exists()
    before = tools.tree(Path())
    assert cli.main(["train", str(stopped), "--device", "cpu"]) == 0
    assert "finished already" in capsys.readouterr().out and tools.tree(Path()) == before


def test_a_run_begins_anew_from_a_runs_folder_only_in_another(stopped, tools, capsys):
    before = tools.tree(Path())
    assert cli.main(["train", str(stopped), "--device", "cpu", "--lr", "0.004"]) == 78
    assert "optim.lr is 0.004 here and 0.002 there" in capsys.readouterr().err
    assert tools.tree(Path()) == before
    assert (
        cli.main(["train", str(stopped), "--device", "cpu", "--lr", "0.004", "--output", "new"])
        == 0
    )
    records = [json.loads(line) for line in Path("new/metrics.jsonl").read_text().splitlines()]
    assert records[0]["step"] == 2 and tools.tree(stopped) == {
        name.removeprefix(f"{stopped}/"): digest
        for name, digest in before.items()
        if name.startswith(f"{stopped}/")
    }


def test_a_recipe_of_a_name_is_not_a_folder_of_that_name(stopped, capsys):
    """In ``runs``, where the folder of the run ``alone`` lies."""
    stopped.rename("alone")
    assert cli.main(["train", "alone", "--device", "cpu"]) == 78
    assert "no images are named" in capsys.readouterr().err
