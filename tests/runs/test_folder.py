"""One run, one folder, one process: what is refused, what is taken over, and what is never
touched.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from vitdistill.errors import ConfigError, DiskError, PermissionDenied
from vitdistill.recipes.config import Recipe, dump_recipe, load_recipe
from vitdistill.runs.folder import METRICS, RunFolder, check_folder, finished
from vitdistill.storage import processes
from vitdistill.storage.atomic import _HOST

RECIPE = Recipe()


def test_a_new_folder_is_no_run_and_is_not_made(tmp_path):
    assert not check_folder(tmp_path / "a" / "b", RECIPE)
    assert not check_folder(tmp_path, RECIPE)
    assert finished(tmp_path / "a", RECIPE) is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_recognised_by_its_recipe(tmp_path):
    with RunFolder(tmp_path / "run", RECIPE):
        assert check_folder(tmp_path / "run", RECIPE)
        assert load_recipe(tmp_path / "run" / "recipe.yaml") == RECIPE
    assert check_folder(tmp_path / "run", replace(RECIPE, name="other", description="other"))
    assert finished(tmp_path / "run", RECIPE) is None
    (tmp_path / "run" / "summary.json").write_text('{"steps": 3}')
    assert finished(tmp_path / "run", RECIPE) == {"steps": 3}


def test_other_fields_are_named_and_nothing_changes(tmp_path, tools):
    with RunFolder(tmp_path, RECIPE):
        pass
    other = replace(
        RECIPE,
        train=replace(RECIPE.train, seed=1, epochs=7),
        optim=replace(RECIPE.optim, lr=0.5, opt="sgd"),
    )
    before = tools.tree(tmp_path)
    for attempt in (check_folder, finished, RunFolder):
        with pytest.raises(
            ConfigError,
            match=r"optim\.lr is 0\.5 here and 0\.001 there; optim\.opt is 'sgd' .* and 1 more",
        ):
            attempt(tmp_path, other)
    assert tools.tree(tmp_path) == before


def test_somebody_elses_files_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"is not empty \(thesis\.txt is in it\) and holds no run"
    ):
        check_folder(tmp_path, RECIPE)
    with pytest.raises(ConfigError, match=r"needs a folder where the file .*thesis\.txt is"):
        check_folder(tmp_path / "thesis.txt" / "run", RECIPE)
    with pytest.raises(ConfigError, match=r"needs a folder where the file"):
        check_folder(tmp_path / "thesis.txt", RECIPE)
    with pytest.raises(DiskError, match="file name too long"):
        check_folder(tmp_path / ("x" * 300), RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_permission_is_said(tmp_path, tools):
    tmp_path.chmod(0o555)
    # pytest's own folders above it are closed to other users
    fd = os.open(tmp_path, os.O_RDONLY)

    def attempt():
        os.fchdir(fd)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        from pathlib import Path

        return check_folder(Path("run"), RECIPE)

    error = tools.Child(attempt).wait()
    assert type(error) is PermissionDenied and "no permission" in str(error)


def test_what_a_killed_beginning_leaves_is_no_obstacle(tmp_path, tools):
    """Killed after the claim and before the recipe; and in the middle of writing either."""

    def begin():
        os.mkdir(tmp_path / "run")
        folder = object.__new__(RunFolder)
        folder.path = tmp_path / "run"
        folder._claim()
        for host in (
            _HOST,
            "host.01234567",
        ):  # the other: this host before it was started again, or another
            (tmp_path / "run" / f".tmp-{host}-{os.getpid()}-0123456789ab").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    tools.Child(begin).wait()
    assert (tmp_path / "run" / "in_use.json").exists()
    assert not check_folder(tmp_path / "run", RECIPE)
    with RunFolder(tmp_path / "run", RECIPE):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


def test_hidden_files_of_the_system_make_no_folder_somebodys(tmp_path):
    (tmp_path / ".DS_Store").write_text("finder")
    assert not check_folder(tmp_path, RECIPE)
    with RunFolder(tmp_path, RECIPE):
        pass
    assert (tmp_path / ".DS_Store").read_text() == "finder"


def test_an_export_that_was_replaced_is_cleared_away_once_the_new_one_is_there(tmp_path):
    with RunFolder(tmp_path, RECIPE):
        pass
    for name in ("last", ".replaced-last-01234567", ".replaced-best-89abcdef"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).write_text(name)
    with RunFolder(tmp_path, RECIPE):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {
        "recipe.yaml",
        "last",
        ".replaced-best-89abcdef",
    }


# -- claims ---------------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path, plain, tools):
    ready, go = os.pipe()
    folder = tmp_path / "run"

    def hold():
        with RunFolder(folder, plain()):
            os.write(go, b"x")
            time.sleep(60)

    holder = tools.Child(hold)
    os.read(ready, 1)
    before = tools.tree(folder)
    for _ in range(2):
        with pytest.raises(
            ConfigError,
            match=(
                rf"is in use by process {holder.pid}: wait for it, .*or delete .*in_use\.json if"
                r" that run is dead"
            ),
        ):
            tools.run(plain(), folder)
    assert tools.tree(folder) == before
    holder.kill()
    holder.wait()
    assert (folder / "in_use.json").exists()
    assert tools.run(plain(), folder)["steps"] == 9
    assert not (folder / "in_use.json").exists()


def test_twice_in_one_process_is_refused(tmp_path):
    with (
        RunFolder(tmp_path, RECIPE),
        pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"),
    ):
        RunFolder(tmp_path, RECIPE)


def claim(folder, **owner):
    with RunFolder(folder, RECIPE):
        written = json.loads((folder / "in_use.json").read_text())
    (folder / "in_use.json").write_text(json.dumps({**written, **owner}))
    return written


def test_another_host_is_believed(tmp_path):
    claim(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(ConfigError, match=r"in use by process 1 on elsewhere: .*delete"):
        RunFolder(tmp_path, RECIPE)


def test_a_number_that_was_used_again_is_not_the_owner(tmp_path):
    """A container's processes have the same few numbers after every restart."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        claim(tmp_path, pid=other.pid, started="another boot 123")
        with RunFolder(tmp_path, RECIPE):
            pass
        claim(tmp_path, started="another boot 123")  # our own number
        with RunFolder(tmp_path, RECIPE):
            pass
    finally:
        other.kill()
        other.wait()


def test_another_container_of_this_host_is_believed(tmp_path):
    """Its number, 1 for instance, means nothing here: two containers under one name would write one
    run.
    """
    claim(tmp_path, space="another boot pid:[17]", pid=2**22 + 1)
    before = (tmp_path / "in_use.json").read_bytes()
    with pytest.raises(
        ConfigError,
        match=(
            r"in use by process 4194305 of another container: .*or delete .*in_use\.json if that"
            r" run is dead"
        ),
    ):
        RunFolder(tmp_path, RECIPE)
    assert (tmp_path / "in_use.json").read_bytes() == before


OTHER_CONTAINER = """
import pathlib, socket, sys, time
from vitdistill import processes
from vitdistill.recipes.config import Recipe
boot = processes.space().partition(" ")[0]
processes.space = lambda: f"{boot} pid:[17]"
socket.gethostname = lambda: sys.argv[2]
from vitdistill.runs.folder import RunFolder
with RunFolder(pathlib.Path(sys.argv[1]), Recipe()):
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(
    processes.space() == "",
    reason="this system does not say which boot and container a process is in",
)
@pytest.mark.parametrize("host", [socket.gethostname(), "pod-1"])
def test_a_container_of_this_machine_that_is_gone(tmp_path, host):
    """It was killed and started anew, as another one or under its name; its number says nothing,
    its lock does.
    """
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_CONTAINER, str(tmp_path), host],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ConfigError, match="in use by process"):
            RunFolder(tmp_path, RECIPE)
    finally:
        other.kill()
        other.communicate()
    left = (tmp_path / "in_use.json").read_text()
    (tmp_path / "in_use.json").write_text(json.dumps({**json.loads(left), "device": -1}))
    with pytest.raises(
        ConfigError, match="in use by process"
    ):  # of a mount of its own, whose locks are not seen here
        RunFolder(tmp_path, RECIPE)
    (tmp_path / "in_use.json").write_text(left)
    with RunFolder(tmp_path, RECIPE):
        assert json.loads((tmp_path / "in_use.json").read_text())["pid"] == os.getpid()


def test_a_claim_of_an_earlier_version(tmp_path):
    written = claim(tmp_path)
    old = {key: written[key] for key in ("host", "pid", "token")} | {
        "started": f"{written['space'].partition(' ')[0]} {written['started']}"
    }
    (tmp_path / "in_use.json").write_text(json.dumps(old))
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}: "):
        RunFolder(tmp_path, RECIPE)
    (tmp_path / "in_use.json").write_text(json.dumps({**old, "pid": 2**22 + 1}))
    with RunFolder(tmp_path, RECIPE):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": "x"}'])
def test_a_claim_that_cannot_be_read_is_left_alone(tmp_path, content):
    with RunFolder(tmp_path, RECIPE):
        pass
    (tmp_path / "in_use.json").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"in_use\.json is not a claim this program wrote: delete it"
    ):
        RunFolder(tmp_path, RECIPE)
    assert (tmp_path / "in_use.json").read_bytes() == content


def test_of_many_that_take_a_dead_claim_over_one_wins(tmp_path, tools, monkeypatch):
    look = RunFolder._refuse_if_alive

    def slow_look(folder, path):
        look(folder, path)
        time.sleep(
            0.02 * random.Random(os.getpid()).random()
        )  # the claim found dead is removed later: by then it may be another's

    monkeypatch.setattr(RunFolder, "_refuse_if_alive", slow_look)
    attempts = 6
    dead = tools.Child(lambda: None)
    dead.wait()
    (tmp_path / "recipe.yaml").write_text(dump_recipe(RECIPE))
    (tmp_path / "in_use.json").write_text(
        json.dumps({"host": socket.gethostname(), "pid": dead.pid, "started": "x"})
    )
    (begin, start), (tries, tried), (all_tried, tell) = os.pipe(), os.pipe(), os.pipe()

    def attempt():
        os.read(begin, 1)
        try:
            RunFolder(tmp_path, RECIPE)
        except ConfigError:
            return 0
        finally:
            os.write(tried, b".")
        os.read(
            all_tried, 1
        )  # who wins holds the folder until all have tried, however late they started
        return 1

    children = [tools.Child(attempt) for _ in range(attempts)]
    os.write(start, b"." * attempts)
    for _ in children:
        assert os.read(tries, 1)
    os.write(tell, b"." * attempts)
    assert sum(child.wait() for child in children) == 1
    for end in (begin, start, tries, tried, all_tried, tell):
        os.close(end)


def test_only_ones_own_claim_is_released(tmp_path):
    with RunFolder(tmp_path, RECIPE):
        (tmp_path / "in_use.json").write_text("somebody else's by now")
    assert (tmp_path / "in_use.json").exists()


# -- logs and environment -------------------------------------------------------------------------


def test_logs_are_cut_back_to_the_checkpoint(tmp_path):
    with RunFolder(tmp_path, RECIPE) as folder:
        folder.open_logs({})
        folder.log(METRICS, {"step": 1})
        offsets = folder.offsets()
        folder.log(METRICS, {"step": 2})
    with RunFolder(tmp_path, RECIPE) as folder:
        folder.open_logs(offsets)
        folder.log(METRICS, {"step": 3})
    assert (tmp_path / METRICS).read_text() == '{"step": 1}\n{"step": 3}\n'


def test_the_environment_is_kept_by_step_and_its_changes_are_said(tmp_path):
    with RunFolder(tmp_path, RECIPE) as folder:
        assert folder.record_environment(0, 1) == []
        assert folder.record_environment(7, 1) == []
        assert folder.record_environment(9, 2) == ["processes 1 before, 2 now"]
    known = json.loads((tmp_path / "environment.json").read_text())
    assert list(known) == ["0", "9"] and known["0"]["torch"] == known["9"]["torch"]
    known["9"]["torch"] = "1.0"
    (tmp_path / "environment.json").write_text(json.dumps(known))
    with RunFolder(tmp_path, RECIPE) as folder:
        (line,) = folder.record_environment(9, 2)
    assert line.startswith("torch 1.0 before, ")
