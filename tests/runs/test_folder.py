"""One run, one folder, one process: what is refused, what is taken over, and what is never
touched.
"""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import Child, tree

from vitdistill.errors import ConfigError, DataError, DiskError, PermissionDenied
from vitdistill.recipes.config import Recipe
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.yaml import load_recipe
from vitdistill.runs.folder import METRICS, RunFolder, check_folder, finished
from vitdistill.storage.atomic import write_atomic
from vitdistill.world import World

RECIPE = Recipe()


def test_a_new_folder_is_no_run_and_is_not_made(tmp_path):
    assert not check_folder(tmp_path / "a" / "b", RECIPE)
    assert not check_folder(tmp_path, RECIPE)
    assert finished(tmp_path / "a", RECIPE) is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_recognised_by_its_recipe(tmp_path):
    with RunFolder(tmp_path / "run", RECIPE, {}):
        assert check_folder(tmp_path / "run", RECIPE)
        assert load_recipe(tmp_path / "run" / "recipe.yaml") == RECIPE
    assert check_folder(tmp_path / "run", replace(RECIPE, name="other", description="other"))
    assert finished(tmp_path / "run", RECIPE) is None
    summary = {"scores": {}, "best_top1": None, "best_epoch": None, "seconds": 1.5}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match="weights in last are gone"):
        finished(tmp_path / "run", RECIPE)
    write_atomic(tmp_path / "run" / "last" / "model.safetensors", b"")
    assert finished(tmp_path / "run", RECIPE) == summary


def test_other_fields_are_named_and_nothing_changes(tmp_path):
    with RunFolder(tmp_path, RECIPE, {}):
        pass
    fields = {"train.seed": 1, "train.epochs": 7, "optim.lr": 0.5, "optim.opt": "sgd"}
    other = replace_fields(RECIPE, fields)
    before = tree(tmp_path)
    for attempt in (check_folder, finished, partial(RunFolder, identity={})):
        with pytest.raises(ConfigError, match=r"optim\.lr is 0\.5 here and 0\.001 there; .*more"):
            attempt(tmp_path, other)
    assert tree(tmp_path) == before


def test_somebody_elses_files_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "thesis.txt", tmp_path / "thesis.txt" / "run"):
        with pytest.raises(ConfigError) as caught:
            check_folder(place, RECIPE)
        assert caught.value.field == "output"
    with pytest.raises(DiskError, match="file name too long"):
        check_folder(tmp_path / ("x" * 300), RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_permission_is_said(tmp_path):
    tmp_path.chmod(0o555)
    # pytest's own folders above it are closed to other users
    fd = os.open(tmp_path, os.O_RDONLY)

    def attempt():
        os.fchdir(fd)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return check_folder(Path("run"), RECIPE)

    error = Child(attempt).wait()
    assert isinstance(error, ConfigError | PermissionDenied)


def test_what_a_killed_beginning_leaves_is_no_obstacle(tmp_path, monkeypatch):
    """Killed after the folder is locked, in the middle of writing the recipe."""
    run = tmp_path / "run"

    def begin():
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        RunFolder(run, RECIPE, {})

    Child(begin).wait()
    assert len(list(run.iterdir())) == 2
    assert not check_folder(run, RECIPE)
    with RunFolder(run, RECIPE, {}):
        pass
    assert {path.name for path in run.iterdir()} == {"recipe.yaml", "identity.json"}


# -- locks ----------------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    ready, go = os.pipe()

    def hold():
        with RunFolder(tmp_path, RECIPE, {}):
            os.write(go, b"x")
            time.sleep(60)

    holder = Child(hold)
    os.read(ready, 1)
    before = tree(tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"is in use by process {holder.pid} "):
            RunFolder(tmp_path, RECIPE, {})
    assert tree(tmp_path) == before
    holder.kill()
    holder.wait()
    for _ in range(2):
        with RunFolder(tmp_path, RECIPE, {}):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "identity.json"}


def test_twice_in_one_process_is_refused(tmp_path):
    with RunFolder(tmp_path, RECIPE, {}), pytest.raises(ConfigError, match="in use"):
        RunFolder(tmp_path, RECIPE, {})


# -- logs and environment -------------------------------------------------------------------------


def test_logs_are_cut_back_to_the_checkpoint(tmp_path):
    with RunFolder(tmp_path, RECIPE, {}) as folder:
        folder.open_logs({})
        folder.log(METRICS, {"step": 1})
        offsets = folder.offsets()
        folder.log(METRICS, {"step": 2})
    with RunFolder(tmp_path, RECIPE, {}) as folder:
        folder.open_logs(offsets)
        folder.log(METRICS, {"step": 3})
    assert (tmp_path / METRICS).read_text() == '{"step": 1}\n{"step": 3}\n'


def test_the_environment_is_kept_by_step(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/.venv/bin/vitdistill", "train", "kd"])
    with RunFolder(tmp_path, RECIPE, {}) as folder:
        for step, processes in ((0, 1), (7, 1), (9, 2), (11, 3), (9, 2)):
            folder.record_environment(step, World(0, processes, torch.device("cpu")))
    known = json.loads((tmp_path / "environment.json").read_text())
    assert {step: found["processes"] for step, found in known.items()} == {"0": 1, "9": 2}
    assert known["0"]["torch"] == known["9"]["torch"]
    assert known["0"]["command"] == ["vitdistill", "train", "kd"]  # nobody else has that place
