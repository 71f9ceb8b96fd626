"""Batches: equal for any workers, processes, micro-batches and starting step."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from vitdistill.data.augment import AUGMENTS, Augment, InputSpec
from vitdistill.data.batch import Batch
from vitdistill.data.decoded import check_images
from vitdistill.data.loader import EvalLoader, Loading, TrainLoader
from vitdistill.data.sources.base import ImageSource
from vitdistill.data.sources.open import open_source
from vitdistill.data.views.single import eval_view, normalize
from vitdistill.errors import ConfigError, DataError, OutOfMemory, Set, UserError
from vitdistill.world import World

SPEC = InputSpec((32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
FULL = replace(AUGMENTS["deit"], repeated_aug=1)
both_pipelines = pytest.mark.parametrize("in_memory", [True, False])


def rank(number: int, size: int) -> World:
    return World(number, size, torch.device("cpu"))


def load(
    source: ImageSource, augment: Augment, start: int, count: int, **settings: Any
) -> list[tuple[Batch, ...]]:
    loader = TrainLoader(source, augment, SPEC, Loading(**{"batch_size": 8, "seed": 3, **settings}))
    return list(loader.batches(start, count))


def flat(steps: list[tuple[Batch, ...]]) -> dict[str, torch.Tensor]:
    """Join all fields of the micro-batches, one after the other."""
    batches = [b for step in steps for b in step]
    fields = ("images", "labels", "ids", "views", "mixed_labels", "lam")
    return {
        f: torch.cat([getattr(b, f) for b in batches])
        for f in fields
        if getattr(batches[0], f) is not None
    }


def same(a: list[tuple[Batch, ...]], b: list[tuple[Batch, ...]]) -> bool:
    """Whether all fields are equal bit for bit."""
    first, second = flat(a), flat(b)
    return first.keys() == second.keys() and all(torch.equal(first[f], second[f]) for f in first)


def seen(source: ImageSource, i: int) -> torch.Tensor:
    """What an evaluation sees of an image."""
    return normalize(eval_view(source.load(i), SPEC)[None], SPEC)[0]


@both_pipelines
@pytest.mark.parametrize("sizes", [((32, 32),), ((32, 32), (50, 20))])
def test_workers_and_the_first_step_do_not_change_anything(make_folder, in_memory, sizes) -> None:
    source = open_source(str(make_folder(sizes=sizes)), "train")
    steps = load(source, FULL, 0, 4, in_memory=in_memory)
    assert [step[0].view for step in steps] == [0, 0, 0, 1] and flat(steps)["images"].std() > 0.1
    assert same(steps[1:], load(source, FULL, 1, 3, in_memory=in_memory, workers=2))
    if len(sizes) > 1:  # kept decoded, they give the views of the files
        assert same(steps, load(source, FULL, 0, 4, in_memory=not in_memory))


@both_pipelines
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (3, 2)])
def test_processes_and_micro_batches_share_one_global_batch(
    make_folder, in_memory, repeats, size, accumulate
):
    source = open_source(str(make_folder(train=26)), "train")
    augment = replace(FULL, repeated_aug=repeats)
    options = {"batch_size": 12, "in_memory": in_memory}
    ranks = [
        load(source, augment, 0, 3, **options, world=rank(r, size), accumulate=accumulate)
        for r in range(size)
    ]
    assert all(len(step) == accumulate for steps in ranks for step in steps)
    rebuilt = [step for steps in zip(*ranks, strict=True) for step in steps]
    assert same(load(source, augment, 0, 3, **options), rebuilt)


def test_epochs_and_seeds_differ_in_order_and_view(make_folder) -> None:
    source = open_source(str(make_folder()), "train")
    first, other = (flat(load(source, AUGMENTS["small"], 0, 6, seed=seed)) for seed in (0, 1))
    assert sorted(first["ids"][:24].tolist()) == list(range(24))
    assert first["ids"][:24].tolist() != first["ids"][24:].tolist()
    assert first["ids"].tolist() != other["ids"].tolist()
    a, b = (first["images"][first["ids"] == 5]).unbind(0)
    assert not torch.equal(a, b)


@both_pipelines
def test_labels_belong_to_the_images(make_folder, in_memory: bool) -> None:
    source = open_source(str(make_folder(classes=3)), "train")
    for (batch,) in load(source, AUGMENTS["none"], 0, 3, in_memory=in_memory):
        assert batch.mixed_labels is None and batch.lam is None
        for image, label, i in zip(batch.images, batch.labels, batch.ids.tolist(), strict=True):
            assert torch.equal(image, seen(source, i))
            assert source.classes[int(label)] == source.key(i).split("/")[0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augment", [FULL, AUGMENTS["small"]])
def test_a_damaged_image_is_named_by_any_process(make_folder, augment, workers: int) -> None:
    root = make_folder()
    for path in (root / "train" / "class1" / "001.png", root / "val" / "class2" / "002.png"):
        path.write_bytes(path.read_bytes()[:-60])
    for in_memory in (True, False):
        with pytest.raises(DataError, match=r"001\.png: the image is damaged"):
            source = open_source(str(root), "train")
            load(source, augment, 0, 3, workers=workers, in_memory=in_memory)
    with pytest.raises(DataError, match=r"002\.png: the image is damaged"):
        list(EvalLoader(open_source(str(root), "val"), SPEC, batch_size=4, workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("sizes", [((32, 32),), ((32, 32), (50, 20))])
def test_all_damaged_images_are_named_or_left_out(make_folder, sizes, workers: int) -> None:
    root = make_folder(sizes=sizes)
    names = ["class0/003.png", "class1/010.png", "class2/002.png", "class2/005.png"]
    for split in ("train", "val"):
        for name, content in zip(names, (b"", b"text", None, None), strict=True):
            if (path := root / split / name).exists():
                path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    train, val = open_source(str(root), "train"), open_source(str(root), "val")
    everything = r"4 of 24 images .*" + ".*".join(names)
    for in_memory in (True, False):
        with pytest.raises(DataError, match=everything) as caught:
            load(train, FULL, 0, 3, workers=workers, in_memory=in_memory)
        assert Set("data.skip_damaged", True) in caught.value.fixes
    with pytest.raises(DataError, match=r"3 of 6 images"):
        list(EvalLoader(val, SPEC, batch_size=4, workers=workers))
    with pytest.raises(DataError, match=everything):  # an empty file is known without decoding
        check_images(train, False, workers)
    kept = check_images(train, True, workers)
    assert [kept.key(i) for i in range(20)] == [
        k for k in map(train.key, range(24)) if k not in names
    ]
    (note,) = kept.notes
    assert all(repr(name) in note for name in names)
    load(kept, FULL, 0, 2, workers=workers)


def test_images_that_do_not_fit_memory_are_one_sentence(make_folder) -> None:
    """More than a processor can address, which is refused at once."""
    source, spec = open_source(str(make_folder()), "train"), replace(SPEC, image_size=(2**22,) * 2)
    with pytest.raises(OutOfMemory, match=r"data\.in_memory=False"):
        TrainLoader(source, AUGMENTS["small"], spec, Loading(8, 0, in_memory=True))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 26}, DataError),
        ({"batch_size": 9, "world": rank(0, 2)}, ConfigError),
        ({"batch_size": 6, "world": rank(0, 2)}, ConfigError),  # three images are no pairs
        ({"batch_size": 8, "accumulate": 3}, ConfigError),
    ],
)
def test_impossible_sizes_are_refused(make_folder, options, error: type[UserError]) -> None:
    with pytest.raises(error) as caught:
        load(open_source(str(make_folder()), "train"), FULL, 0, 1, **options)
    assert caught.value.field == "train.batch_size"


@pytest.mark.parametrize("mixes", [{"mixup": 0.8, "cutmix": 1.0}, {}])
@both_pipelines
def test_a_teacher_sees_the_views_of_training(make_folder, mixes: dict, in_memory: bool) -> None:
    source = open_source(str(make_folder(train=25)), "train")
    augment = replace(AUGMENTS["small"], reprob=0.5, **mixes)
    read: list[tuple[Any, ...]] = []
    loading = Loading(8, 5, in_memory=in_memory)
    loader = TrainLoader(source, augment, SPEC, loading, {"t": lambda *them: read.append(them)})
    shown: dict[int, torch.Tensor] = {}
    sums: dict[int, int] = {}
    for batch in loader.teacher_batches(1, 0, 25, 7):
        for i, image, checksum in zip(batch.ids, batch.images, batch.checksums, strict=True):
            shown[int(i)], sums[int(i)] = image, int(checksum)
    assert list(shown) == list(range(25))
    for (batch,) in loader.batches(3, 3):  # epoch 1
        for i, image in zip(batch.ids.tolist(), batch.images, strict=True):
            assert torch.equal(image, shown[i])
    assert len(read) == 3
    for views, ids, checksums, device in read:
        assert (views == 1).all() and device.type == "cpu"
        assert checksums.tolist() == [sums[i] for i in ids.tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once(make_folder, workers: int) -> None:
    source = open_source(str(make_folder(val=11, sizes=((32, 32), (48, 40)))), "val")
    found: dict[int, torch.Tensor] = {}
    for r in range(3):
        loader = EvalLoader(source, SPEC, batch_size=2, workers=workers, world=rank(r, 3))
        next(iter(loader))  # a pass that is broken off is not taken for the whole
        passes = list(loader), list(loader)  # the second from memory
        assert len(loader) == len(passes[0])
        for first, second in zip(*passes, strict=True):
            assert torch.equal(first.images, second.images)
            assert first.labels.tolist() == source.labels[first.ids.numpy()].tolist()
            assert not set(first.ids.tolist()) & set(found)
            found |= dict(zip(first.ids.tolist(), first.images, strict=True))
    assert sorted(found) == list(range(11))
    assert all(torch.equal(image, seen(source, i)) for i, image in found.items())


def test_kept_images_hold_no_shared_memory_and_no_files(make_folder) -> None:
    """Each tensor of a worker does: as many as batches, until a limit is reached."""
    source = open_source(str(make_folder(val=40)), "val")
    loader = EvalLoader(source, SPEC, batch_size=1, workers=1)
    opened = len(os.listdir("/proc/self/fd"))
    assert len(list(loader)) == 40 and not any(kept.is_shared() for kept in loader._kept)
    assert len(os.listdir("/proc/self/fd")) < opened + 20


def test_a_limit_is_a_fixed_sample_over_all_classes(make_folder) -> None:
    source = open_source(str(make_folder(val=30)), "val")

    def ids(world: World) -> list[int]:
        loader = EvalLoader(source, SPEC, batch_size=4, limit=12, world=world)
        return [i for b in loader for i in b.ids.tolist()]

    whole = ids(rank(0, 1))
    assert len(set(whole)) == 12 and set(source.labels[whole].tolist()) == {0, 1, 2}
    assert sorted(ids(rank(0, 2)) + ids(rank(1, 2))) == sorted(whole)
