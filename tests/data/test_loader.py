"""The order, the views and the batches: equal for any workers, processes, micro-batches and
starting step.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitdistill.data import loader as loader_module
from vitdistill.data.augment import AUGMENTS, Augment, InputSpec
from vitdistill.data.batch import Batch
from vitdistill.data.loader import EvalLoader, TrainLoader
from vitdistill.data.order import epoch_order, pair_partners
from vitdistill.data.sources.open import open_source
from vitdistill.data.views.single import eval_view, normalize
from vitdistill.errors import ConfigError, DataError, OutOfMemory

SPEC = InputSpec((32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
FULL = replace(AUGMENTS["deit"], repeated_aug=1)


def flat(steps: list[tuple[Batch, ...]]) -> dict[str, torch.Tensor]:
    """All fields of the micro-batches, one after the other."""
    batches = [b for step in steps for b in step]
    fields = ("images", "labels", "ids", "views", "mixed_labels", "lam")
    return {
        f: torch.cat([getattr(b, f) for b in batches])
        for f in fields
        if getattr(batches[0], f) is not None
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether all fields are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[f], b[f]) for f in a)


@pytest.mark.parametrize("in_memory", [True, False])
def test_workers_do_not_change_anything(make_folder, in_memory: bool) -> None:
    source = open_source(str(make_folder()), "train")
    runs = []
    for workers in (0, 1, 2):
        loader = TrainLoader(
            source, FULL, SPEC, batch_size=8, seed=3, workers=workers, in_memory=in_memory
        )
        assert loader.pipeline == ("batched" if in_memory else "per-sample")
        runs.append(flat(list(loader.batches(1, 4))))
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    assert runs[0]["images"].std() > 0.1


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("repeats", [1, 3])
def test_processes_and_micro_batches_share_one_global_batch(
    make_folder, in_memory: bool, repeats: int
) -> None:
    source = open_source(str(make_folder(train=26)), "train")
    augment = replace(FULL, repeated_aug=repeats)
    options = {"batch_size": 12, "seed": 5, "in_memory": in_memory}
    whole = flat(list(TrainLoader(source, augment, SPEC, **options).batches(0, 3)))
    for world, accumulate in ((2, 1), (3, 1), (1, 2), (3, 2)):
        ranks = [
            list(
                TrainLoader(
                    source,
                    augment,
                    SPEC,
                    **options,
                    rank=r,
                    world_size=world,
                    accumulate=accumulate,
                ).batches(0, 3)
            )
            for r in range(world)
        ]
        assert all(len(step) == accumulate for steps in ranks for step in steps)
        rebuilt = flat([step for steps in zip(*ranks, strict=True) for step in steps])
        assert same(whole, rebuilt), (world, accumulate)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_can_be_the_first(make_folder, in_memory: bool, workers: int) -> None:
    source = open_source(str(make_folder()), "train")
    loader = TrainLoader(
        source, FULL, SPEC, batch_size=8, seed=1, workers=workers, in_memory=in_memory
    )
    assert loader.steps_per_epoch == 3
    steps = list(loader.batches(0, 7))
    fresh = TrainLoader(
        source, FULL, SPEC, batch_size=8, seed=1, workers=workers, in_memory=in_memory
    )
    for start in (1, 3, 5):
        assert same(flat(steps[start:]), flat(list(fresh.batches(start, 7 - start))))
    assert [step[0].view for step in steps] == [0, 0, 0, 1, 1, 1, 2]


def test_an_endless_iteration_can_be_left(make_folder) -> None:
    loader = TrainLoader(
        open_source(str(make_folder()), "train"),
        AUGMENTS["small"],
        SPEC,
        batch_size=8,
        seed=1,
        workers=1,
        in_memory=False,
    )
    batches = loader.batches(0, None)
    seen = [next(batches)[0].view for _ in range(5)]
    batches.close()
    assert seen == [0, 0, 0, 1, 1]
    assert not loader_module._RUNNING or all(w.iterator is None for w in loader_module._RUNNING)


def test_epochs_and_seeds_differ_in_order_and_view(make_folder) -> None:
    source = open_source(str(make_folder()), "train")

    def run(seed: int) -> dict[str, torch.Tensor]:
        return flat(
            list(
                TrainLoader(source, AUGMENTS["small"], SPEC, batch_size=8, seed=seed).batches(0, 6)
            )
        )

    first, other = run(0), run(1)
    assert sorted(first["ids"][:24].tolist()) == list(range(24))
    assert first["ids"][:24].tolist() != first["ids"][24:].tolist()
    assert first["ids"].tolist() != other["ids"].tolist()
    a, b = (first["images"][first["ids"] == 5]).unbind(0)
    assert not torch.equal(a, b)


def test_labels_belong_to_the_images(make_folder) -> None:
    source = open_source(str(make_folder(classes=3)), "train")
    augment = AUGMENTS["none"]
    for in_memory in (True, False):
        for (batch,) in TrainLoader(
            source, augment, SPEC, batch_size=8, seed=0, in_memory=in_memory
        ).batches(0, 3):
            assert batch.mixed_labels is None and batch.lam is None
            for image, label, i in zip(batch.images, batch.labels, batch.ids.tolist(), strict=True):
                assert torch.equal(image, normalize(eval_view(source.load(i), SPEC)[None], SPEC)[0])
                assert source.classes[int(label)] == source.key(i).split("/")[0]


@given(
    size=st.integers(2, 60),
    repeats=st.integers(1, 4),
    epoch=st.integers(0, 3),
    seed=st.integers(-(2**70), 2**70),
)
def test_epoch_order(size: int, repeats: int, epoch: int, seed: int) -> None:
    ids, views = epoch_order(size, seed, epoch, repeats)
    assert len(set(zip(ids.tolist(), views.tolist(), strict=True))) == len(ids)
    assert set((views // repeats).tolist()) == {epoch}
    distinct, counts = np.unique(ids, return_counts=True)
    assert (counts == repeats).all()
    assert abs(len(distinct) - -(-size // repeats)) <= 1
    pairs = ids[: len(ids) // 2 * 2].reshape(-1, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    paired_views = views[: len(ids) // 2 * 2].reshape(-1, 2)
    assert (paired_views[:, 0] == paired_views[:, 1]).all()


@given(
    size=st.integers(2, 60),
    num_views=st.integers(1, 4),
    later=st.integers(0, 9),
    seed=st.integers(-(2**70), 2**70),
)
def test_views_come_back_in_the_same_pairs(
    size: int, num_views: int, later: int, seed: int
) -> None:
    def pairs(epoch: int) -> list[list[int]]:
        ids, views = epoch_order(size, seed, epoch, num_views=num_views)
        assert sorted(ids.tolist()) == list(range(size)) and set(views.tolist()) == {
            epoch % num_views
        }
        return ids[: size // 2 * 2].reshape(-1, 2).tolist()

    first = pairs(later % num_views)
    again = pairs(num_views + later)
    assert sorted(again) == sorted(first)
    if len(first) > 20:
        assert again != first


def test_repeats_follow_the_documented_order() -> None:
    ids, views = epoch_order(12, 7, 2, 3)
    p = ids[[0, 1, 6, 7]]
    assert ids.tolist() == [*([p[0], p[1]] * 3), *([p[2], p[3]] * 3)]
    assert views.tolist() == [6, 6, 7, 7, 8, 8] * 2


def test_the_pipeline_depends_on_data_and_options_only(make_folder, monkeypatch) -> None:
    alike = open_source(str(make_folder()), "train")
    various = open_source(str(make_folder(sizes=((32, 32), (40, 36)), name="various")), "train")
    rrc, pad = Augment(), AUGMENTS["small"]

    def pipeline(source, augment, **options) -> str:
        return TrainLoader(source, augment, SPEC, batch_size=4, seed=0, **options).pipeline

    assert pipeline(alike, rrc) == "batched"
    assert pipeline(various, rrc) == "per-sample"
    assert pipeline(various, pad) == "batched"
    assert pipeline(alike, replace(rrc, aa="v0")) == "per-sample"
    assert pipeline(alike, rrc, in_memory=False) == "per-sample"
    monkeypatch.setattr(loader_module, "IN_MEMORY_BYTES", 24 * 32 * 32 * 3)
    assert pipeline(alike, rrc) == "per-sample"
    assert pipeline(alike, pad) == "per-sample"
    assert pipeline(alike, rrc, in_memory=True) == "batched"
    monkeypatch.setattr(loader_module, "IN_MEMORY_BYTES", 24 * 32 * 32 * 3 + 1)
    assert pipeline(alike, rrc) == "batched"


def test_images_kept_decoded_give_the_views_of_the_files(make_folder) -> None:
    source = open_source(str(make_folder(sizes=((32, 32), (50, 20), (20, 47)))), "train")
    runs = [
        flat(
            list(
                TrainLoader(
                    source, Augment(), SPEC, batch_size=8, seed=0, in_memory=m, workers=2
                ).batches(0, 3)
            )
        )
        for m in (False, None)
    ]
    assert same(*runs)


def test_a_damaged_image_is_the_same_sentence_from_any_worker(make_folder) -> None:
    root = make_folder()
    bad = root / "train" / "class1" / "001.png"
    bad.write_bytes(bad.read_bytes()[:-60])
    source = open_source(str(root), "train")
    for in_memory, workers in ((True, 0), (True, 2), (False, 0), (False, 1)):
        options = {"in_memory": in_memory, "workers": workers}
        with pytest.raises(DataError, match=r"001\.png: the image is damaged") as caught:
            list(
                TrainLoader(
                    source, AUGMENTS["small"], SPEC, batch_size=8, seed=0, **options
                ).batches(0, 3)
            )
        assert "\n" not in str(caught.value)
        assert caught.value.image == (None if in_memory else (source.name, "class1/001.png"))


def test_the_image_of_an_evaluation_that_cannot_be_read_is_named(make_folder) -> None:
    root = make_folder()
    (root / "val" / "class2" / "002.png").write_bytes(b"<html>")
    source = open_source(str(root), "val")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"002\.png: not an image") as caught:
            list(EvalLoader(source, SPEC, batch_size=4, workers=workers))
        assert caught.value.image == (source.name, "class2/002.png")


def test_images_that_do_not_fit_memory_are_one_sentence(make_folder) -> None:
    """More than a processor can address, which is refused at once."""
    spec = replace(SPEC, image_size=(2**22, 2**22))
    with pytest.raises(
        OutOfMemory,
        match=(
            r"of this machine ran out while 24 images were decoded into it: read .* --in-memory"
            r" false"
        ),
    ) as caught:
        TrainLoader(
            open_source(str(make_folder()), "train"),
            AUGMENTS["small"],
            spec,
            batch_size=8,
            seed=0,
            in_memory=True,
        )
    assert "\n" not in str(caught.value)


def test_a_killed_worker_is_an_error_and_not_a_hang(make_folder) -> None:
    source = open_source(str(make_folder()), "train")
    loader = TrainLoader(
        source, AUGMENTS["small"], SPEC, batch_size=8, seed=0, workers=1, in_memory=False
    )
    batches = loader.batches(0, None)
    next(batches)
    (running,) = [w for w in loader_module._RUNNING if w.iterator is not None]
    os.kill(running.iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match="worker was killed"):
        for _ in range(100):
            next(batches)


SCRIPT = """
import os, sys, signal, torch
from vitdistill.data.loader import TrainLoader
from vitdistill.data.sources.open import open_source
from vitdistill.data.augment import AUGMENTS, InputSpec
spec = InputSpec((32, 32), (0.5,) * 3, (0.5,) * 3)
source = open_source(sys.argv[1], "train")
loader = TrainLoader(source, AUGMENTS["small"], spec, batch_size=8, seed=0, workers=2, in_memory=False)
steps = loader.batches(0, None)
next(steps)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
for number in (signal.SIGTERM, signal.SIGINT):
    os.killpg(0, number)
    for _ in range(8):
        next(steps)
print("alive", flush=True)
sys.exit(75)
"""


def test_workers_outlive_signals_and_end_with_the_process(make_folder) -> None:
    """A signal to the group leaves the workers running; leaving with the iterator open does not
    hang.
    """
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(make_folder())],
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.stdout, done.returncode) == ("alive\n", 75), done.stderr
    assert time.monotonic() - started < 60


def test_unlabelled_images_have_label_minus_one(make_folder) -> None:
    folder = make_folder(classes=1) / "train" / "class0"
    loader = TrainLoader(
        open_source(str(folder), "train"), AUGMENTS["small"], SPEC, batch_size=8, seed=0
    )
    assert flat(list(loader.batches(0, 3)))["labels"].unique().tolist() == [-1]


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"batch_size": 25}, DataError, "24 images, fewer than one batch of 25"),
        ({"batch_size": 9, "world_size": 2}, ConfigError, "does not divide"),
        ({"batch_size": 6, "world_size": 2}, ConfigError, "even number"),
        ({"batch_size": 0}, ConfigError, "1 or more"),
        ({"batch_size": 8, "rank": 2, "world_size": 2}, ConfigError, "rank 2"),
        ({"batch_size": 8, "workers": -1}, ConfigError, "workers"),
    ],
)
def test_impossible_sizes_are_refused(make_folder, options, error, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        TrainLoader(open_source(str(make_folder()), "train"), FULL, SPEC, seed=0, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once(make_folder, workers: int) -> None:
    source = open_source(str(make_folder(val=11, sizes=((32, 32), (48, 40)))), "val")
    seen: dict[int, torch.Tensor] = {}
    for rank in range(3):
        loader = EvalLoader(source, SPEC, batch_size=2, workers=workers, rank=rank, world_size=3)
        for first, second in zip(list(loader), list(loader), strict=True):
            assert torch.equal(first.images, second.images)
            assert first.labels.tolist() == source.labels[first.ids.numpy()].tolist()
            for i, image in zip(first.ids.tolist(), first.images, strict=True):
                assert i not in seen
                seen[i] = image
        assert len(loader) == len(list(loader))
    assert sorted(seen) == list(range(11))
    for i, image in seen.items():
        assert torch.equal(image, normalize(eval_view(source.load(i), SPEC)[None], SPEC)[0])


def test_a_pass_that_is_broken_off_is_not_taken_for_the_whole(make_folder) -> None:
    loader = EvalLoader(open_source(str(make_folder(val=8)), "val"), SPEC, batch_size=2)
    next(iter(loader))
    assert sum(len(b.ids) for b in loader) == 8


def test_a_limit_is_a_fixed_sample_over_all_classes(make_folder) -> None:
    source = open_source(str(make_folder(val=30)), "val")
    ids = [
        [i for b in EvalLoader(source, SPEC, batch_size=4, limit=12) for i in b.ids.tolist()]
        for _ in range(2)
    ]
    assert ids[0] == ids[1] and len(set(ids[0])) == 12
    assert set(source.labels[ids[0]].tolist()) == {0, 1, 2}
    split = [
        i
        for r in range(2)
        for b in EvalLoader(source, SPEC, batch_size=4, limit=12, rank=r, world_size=2)
        for i in b.ids.tolist()
    ]
    assert sorted(split) == sorted(ids[0])
    with pytest.raises(ConfigError, match="limit"):
        EvalLoader(source, SPEC, batch_size=4, limit=0)


@pytest.mark.parametrize("mixes", [{"mixup": 0.8}, {"cutmix": 1.0}, {}])
def test_what_makes_up_the_most_of_a_mixed_view(make_folder, mixes: dict[str, float]) -> None:
    """Judged by the pixels: of the two unmixed views, the one that more places of the mixed view
    are nearer to.
    """
    source = open_source(str(make_folder()), "train")
    plain = replace(AUGMENTS["small"], mixup=0.0, cutmix=0.0, reprob=0.0)
    ids = np.arange(len(source), dtype=np.int64)
    for view in range(3):
        alone, mixed = (
            next(
                TrainLoader(source, augment, SPEC, batch_size=2, seed=5).labelling(
                    view, 0, len(ids), len(ids)
                )
            ).images
            for augment in (plain, replace(plain, **mixes))
        )
        most = TrainLoader(source, replace(plain, **mixes), SPEC, batch_size=2, seed=5).most_of(
            view, ids
        )
        partners = pair_partners(len(ids), 5, view)
        own, other = ((mixed - views).abs().sum(1) for views in (alone, alone[partners]))
        lead = ((own < other).sum((1, 2)) - (other < own).sum((1, 2))).numpy()
        clear = np.abs(lead) > 64  # of 1024; in padding both are alike
        assert not mixes or clear.mean() > 0.5
        assert most[clear].tolist() == np.where(lead > 0, ids, partners)[clear].tolist()
        assert bool(mixes) == (most.tolist() != ids.tolist())
