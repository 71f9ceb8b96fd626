"""A checkpoint that can be seen is whole; kills, full disks and damage cost nothing but the work
since.
"""

import os
import random
import select
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitdistill.errors import DataError, DiskError
from vitdistill.storage import checkpoint
from vitdistill.storage.manifest import MANIFEST


def state_of(step: int, size: int = 300) -> tuple[dict[str, torch.Tensor], dict]:
    """A state that follows from its step: half of one and half of another cannot pass."""
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model.weight": torch.randn(size, generator=generator),
        "ema.weight": torch.randn(3, 5, generator=generator).bfloat16(),
        "count": torch.tensor(step),
    }
    return tensors, {"step": step, "rng": list(range(step, step + 50)), "best": None}


def same(folder: Path, step: int, size: int = 300) -> bool:
    tensors, state = checkpoint.load(folder)
    expected, expected_state = state_of(step, size)
    return (state, tensors.keys()) == (expected_state, expected.keys()) and all(
        tensors[k].dtype == v.dtype and torch.equal(tensors[k], v) for k, v in expected.items()
    )


def latest(run: Path, warn=lambda text: None) -> Path | None:
    checkpoint.settle(run)
    found = checkpoint.load_latest(run, warn)
    return None if found is None else found[0]


def steps_in(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def test_round_trip_and_pruning(tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "no") is None
    assert list(tmp_path.iterdir()) == []
    for step in (1, 2, 30, 400):
        folder = checkpoint.save(tmp_path, step, *state_of(step))
        assert folder == latest(tmp_path) == checkpoint.folder_of(tmp_path, step)
        assert same(folder, step)
    assert steps_in(tmp_path) == ["step-00000030", "step-00000400"]
    assert sorted(os.listdir(folder)) == ["manifest.json", "state.json", "state.safetensors"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_state_comes_back_exactly(tmp_path_factory, value):
    run = tmp_path_factory.mktemp("run")
    _, state = checkpoint.load(checkpoint.save(run, 0, {}, {"value": value}))
    assert repr(state["value"]) == repr(value)


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, {"a": [{"b": {3}}]}, torch.ones(1), b"x"])
def test_what_json_would_change_is_refused(tmp_path, value):
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 0, {}, {"x": value})
    assert list(tmp_path.iterdir()) == []


# -- damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    checkpoint.save(run, 1, *state_of(1))
    checkpoint.save(run, 2, *state_of(2))
    return run


@pytest.mark.parametrize("name", sorted(checkpoint.FILES))
def test_every_flipped_bit_and_cut_is_found_and_the_one_before_used(two, name):
    rng = random.Random(name)
    path = checkpoint.folder_of(two, 2) / name
    data = path.read_bytes()
    bad = []
    for _ in range(30):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        bad.append(bytes(flipped))
    for cut in {0, 1, 7, 8, 9, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))}:
        bad += [data[:cut], data[:cut] + bytes(len(data) - cut + 1)]
    for content in bad:
        path.write_bytes(content)
        said: list[str] = []
        assert latest(two, said.append) == checkpoint.folder_of(two, 1)
        assert len(said) == 1 and str(path.parent) in said[0]
    path.write_bytes(data)


def test_missing_swapped_and_renamed_files_are_found(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, *state_of(step))
    one, newest = checkpoint.folder_of(tmp_path, 1), checkpoint.folder_of(tmp_path, 2)
    for name in checkpoint.FILES - {MANIFEST}:
        good = (newest / name).read_bytes()
        shutil.copy(one / name, newest / name)
        assert latest(tmp_path) == one
        (newest / name).unlink()
        assert latest(tmp_path) == one
        (newest / name).write_bytes(good)
    assert latest(tmp_path, pytest.fail) == newest
    os.rename(one, checkpoint.folder_of(tmp_path, 9))
    for folder in (checkpoint.folder_of(tmp_path, 9), tmp_path / "nothing"):
        with pytest.raises(DataError):
            checkpoint.load(folder)
    (newest / checkpoint.STATE).write_bytes(b"{}")
    with pytest.raises(DataError, match="none of the checkpoints"):
        latest(tmp_path)


def test_pruning_keeps_a_good_one_when_the_newer_is_damaged(tmp_path):
    checkpoint.save(tmp_path, 1, *state_of(1))
    damaged = checkpoint.save(tmp_path, 2, *state_of(2))
    (damaged / checkpoint.STATE).write_bytes(b"{}")
    checkpoint.save(tmp_path, 3, *state_of(3))
    assert steps_in(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    checkpoint.save(tmp_path, 4, *state_of(4))
    assert steps_in(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_step_is_saved_again_and_a_later_one_stays(tmp_path):
    for step in (10, 20):
        checkpoint.save(tmp_path, step, *state_of(step))
    (checkpoint.folder_of(tmp_path, 20) / checkpoint.TENSORS).write_bytes(b"damaged")
    for content in (8, 20):
        assert same(checkpoint.save(tmp_path, 20, *state_of(content)), content)
    assert same(checkpoint.save(tmp_path, 5, *state_of(5), keep=1), 5)
    assert steps_in(tmp_path) == ["step-00000005", "step-00000010", "step-00000020"]
    newest = checkpoint.folder_of(tmp_path, 20)
    newest.rename(newest.with_name(f".replaced-{newest.name}-01234567"))  # killed half way
    assert latest(tmp_path) == newest and same(newest, 20)


def test_foreign_files_are_never_deleted(tmp_path):
    first = checkpoint.save(tmp_path, 1, *state_of(1))
    (first / "notes.txt").write_text("mine")
    (first.parent / "step-best").mkdir()
    for step in (2, 3, 4):
        checkpoint.save(tmp_path, step, *state_of(step), keep=1)
    assert steps_in(tmp_path) == ["step-00000001", "step-00000004", "step-best"]
    assert (first / "notes.txt").exists() and same(first, 1)


# -- kills and full disks -------------------------------------------------------------------------


@pytest.mark.whole
def test_kill_9_at_random_moments_never_loses_or_halves_a_checkpoint(tmp_path, fork):
    size = 50_000
    rng = random.Random(5)
    reader, writer = os.pipe()

    def save_for_ever(start: int) -> None:
        for step in range(start, start + 10_000):
            checkpoint.save(tmp_path, step, *state_of(step, size))
            os.write(writer, step.to_bytes(4, "little"))

    done, leftovers = 0, 0
    for _ in range(15):
        pid = fork(lambda start=done + 1: save_for_ever(start))
        # However busy the machine: one save is done and the next begun when the clock starts.
        returned = int.from_bytes(os.read(reader, 4), "little")
        time.sleep(rng.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while select.select([reader], [], [], 0)[0]:
            returned = int.from_bytes(os.read(reader, 4), "little")
        leftovers += any(name.startswith(".tmp-") for name in os.listdir(tmp_path / "checkpoints"))
        newest = latest(tmp_path, pytest.fail)
        assert newest is not None
        done = int(newest.name.removeprefix("step-"))
        assert done in (returned, returned + 1) and same(newest, done, size)
    assert done >= 15 and leftovers > 0, "some kills hit a save"
    checkpoint.save(tmp_path, done + 1, *state_of(done + 1))
    assert steps_in(tmp_path) == [f"step-{done:08d}", f"step-{done + 1:08d}"]
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("name", ["open", "mkdir", "write", "fsync", "rename"])
def test_a_failing_system_call_costs_no_checkpoint(tmp_path, monkeypatch, name):
    checkpoint.save(tmp_path, 1, *state_of(1))
    checkpoint.save(tmp_path, 2, *state_of(2))
    real = getattr(os, name)
    step, failed = 3, 0
    for nth in range(1, 12):
        calls = 0

        def fail(*args, nth=nth, **kw):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(28, os.strerror(28))
            return real(*args, **kw)

        monkeypatch.setattr(os, name, fail)
        try:
            checkpoint.save(tmp_path, step, *state_of(step))
        except DiskError as error:
            failed += 1
            assert "disk is full" in str(error)
        monkeypatch.setattr(os, name, real)
        newest = latest(tmp_path, pytest.fail)
        assert newest is not None and same(newest, int(newest.name.removeprefix("step-")))
        assert newest.name in (f"step-{step:08d}", f"step-{step - 1:08d}")
        checkpoint.save(tmp_path, step, *state_of(step))
        assert len(steps_in(tmp_path)) == 2
        step += 1
    assert failed


def test_a_disk_that_writes_something_else_costs_no_checkpoint(tmp_path, monkeypatch):
    """Fails where a save does not read back what it wrote."""
    checkpoint.save(tmp_path, 1, *state_of(1))
    write = os.write

    def flip(fd, data):
        return write(fd, bytes([data[0] ^ 1, *data[1:]]) if len(data) > 1000 else data)

    monkeypatch.setattr(os, "write", flip)
    with pytest.raises(DiskError, match="reads back changed"):
        checkpoint.save(tmp_path, 2, *state_of(2), keep=1)
    assert steps_in(tmp_path) == ["step-00000001"]
