"""Stored answers in the place of teachers: the same training, the same bytes whoever writes them,
and nothing that does not belong.
"""

import json
import re
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vitdistill.data.augment import Augment
from vitdistill.errors import ConfigError, DataError, DiskError, NonFiniteError, Preempted
from vitdistill.labels import identity
from vitdistill.labels.store import LabelStore
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.config import DataConfig
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs import label as labelling
from vitdistill.runs.label import LabelOptions, check, label, logit_encoding
from vitdistill.runs.prepare import prepare
from vitdistill.runs.stored import with_views_of_labels
from vitdistill.vit.network import Network
from vitdistill.world import join_world

pytestmark = pytest.mark.whole

HARD = Augment(crop="rrc", mixup=0.8, cutmix=1.0, reprob=0.5)
EXACT = LabelOptions(encoding="float32", part_size=8)


@pytest.fixture(scope="module")
def odd(tmp_path_factory, tools):
    """45 training images: mixing leaves one over."""
    return tools.write_images(tmp_path_factory.mktemp("odd") / "images", train=15)


@pytest.fixture
def kd(taught, odd):
    """``kd(...)``: plain KD on views that are cropped, erased and mixed, two of each image."""

    def make(**changes):
        recipe = replace_fields(
            taught(**{"train.accumulate": 1, "train.log_every": 1, "train.ema_decay": None}), {}
        )
        data = DataConfig(dir=str(odd), workers=0, augment=HARD, views=2)
        return replace_fields(replace(recipe, selector=None, data=data), changes)

    return make


def written(recipe, folder, options=EXACT):
    """The store of the recipe's one teacher."""
    (store,) = label(recipe, folder, options, device="cpu").stores.values()
    return store


def parts(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.bin"))
    }


def sealed(folder):
    """How many parts are there while others write: their folders are never renamed, unlike the
    teacher's when it is made.
    """
    return len(list((folder / "teacher").glob("view-*/*.bin")))


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- the same training ----------------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "rel"), [("float32", 1e-5), ("float16", 2e-2)])
def test_training_from_labels_is_training_with_the_teacher(kd, tools, tmp_path, encoding, rel):
    """Three epochs on two views, so that one is shown twice; batches are made of other images than
    those that were labelled together.
    """
    recipe = kd()
    tools.run(recipe, tmp_path / "live")
    store = written(recipe, tmp_path / "labels", LabelOptions(encoding=encoding, part_size=8))
    stored = replace_fields(
        kd(**{"teachers.teacher.model": ""}), {"teachers.teacher.labels": str(store.path)}
    )
    tools.run(stored, tmp_path / "stored")
    live, found = records_of(tmp_path / "live"), records_of(tmp_path / "stored")
    assert [line["step"] for line in live] == [line["step"] for line in found]
    for ours, theirs in zip(live, found, strict=True):
        for key in ours.keys() & {"ce", "kd", "loss", "grad_norm", "nll"}:
            assert theirs[key] == pytest.approx(ours[key], rel=rel, abs=rel / 10), (
                key,
                ours["step"],
            )


def test_stored_answers_give_the_very_loss_of_live_ones(kd, tmp_path):
    """Bit for bit, where records are made of the answers to the same batch."""
    recipe = kd()
    with join_world("cpu") as here:
        job = prepare(recipe, here, lambda text: None)
        store = written(recipe, tmp_path / "labels")
        stored = prepare(
            replace_fields(recipe, {"teachers.teacher.labels": str(store.path)}),
            here,
            lambda text: None,
        )
        assert not stored.teachers and stored.plan.stored.keys() == {"teacher"}
        stored.distillation.load_state_dict(job.distillation.state_dict())
        for (batch,), (other,) in zip(
            job.loaders.train.batches(0, 7), stored.loaders.train.batches(0, 7), strict=True
        ):
            assert torch.equal(batch.images, other.images) and torch.equal(batch.ids, other.ids)
            answer = job.teachers["teacher"](batch.images, job.plan.live["teacher"])
            torch.testing.assert_close(
                other.targets["teacher"].logits(), answer.logits, rtol=1e-5, atol=1e-5
            )
            record = store.layout.encode(
                answer.logits,
                {},
                None,
                np.zeros(len(batch.ids), np.uint32),
            )
            other.targets["teacher"] = store.layout.targets(record)
            for one, two in zip(
                job.distillation.eval()(batch, job.teachers).values(),
                stored.distillation.eval()(other, {}).values(),
                strict=True,
            ):
                assert torch.equal(one, two)


def test_hidden_states_and_features_are_stored_where_the_plan_reads_them(kd, tools, tmp_path):
    recipe = kd()
    recipe = replace(recipe, objectives={"vitkd": ViTKD(low_blocks=(0,), reduction="mean")})
    store = written(recipe, tmp_path / "labels", LabelOptions(hidden_dtype="float32"))
    assert (
        [block for block, _, _ in store.layout.hidden] == [0]
        and store.layout.features == (17, 24)
        and store.layout.logits is None
    )
    tools.run(recipe, tmp_path / "live")
    tools.run(
        replace_fields(recipe, {"teachers.teacher.labels": str(store.path)}), tmp_path / "stored"
    )
    for ours, theirs in zip(
        records_of(tmp_path / "live"), records_of(tmp_path / "stored"), strict=True
    ):
        assert theirs["kind"] == ours["kind"]
        if ours["kind"] == "train":
            assert theirs["vitkd"] == pytest.approx(ours["vitkd"], rel=1e-4)


def test_every_record_is_of_the_view_that_training_shows(kd, tmp_path):
    """Odd counts under mixing: all but the one image without a partner are trained on, and all are
    there.
    """
    recipe = kd(**{"train.epochs": 6, "data.views": 5})
    store = written(recipe, tmp_path / "labels")
    assert store.status().records == 45 * 5
    with join_world("cpu") as here:
        job = prepare(
            replace_fields(recipe, {"teachers.teacher.labels": str(store.path)}),
            here,
            lambda text: None,
        )
        seen = set()
        for (batch,) in job.loaders.train.batches(
            0, 12
        ):  # every step compares the views' checksums
            seen |= set(zip(batch.views.tolist(), batch.ids.tolist(), strict=True))
        assert {view for view, _ in seen} == set(range(5))
        # The sixth epoch shows the first view again, in another order and with the same pairs.
        assert job.loaders.train.steps_per_epoch == 2


# -- the same bytes -------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_workers_or_processes(kd, tools, tmp_path):
    recipe = kd(
        **{"data.in_memory": False}
    )  # views are made one by one, in worker processes if there are any
    written(recipe, tmp_path / "0")
    expected = parts(tmp_path / "0")
    assert len(expected) == 2 * 6
    for workers in (1, 4):
        written(replace_fields(recipe, {"data.workers": workers}), tmp_path / f"w{workers}")
        assert parts(tmp_path / f"w{workers}") == expected
    for count in (2, 3):
        done = tools.ranks(
            count,
            lambda rank, name=f"p{count}": (
                label(recipe, tmp_path / name, EXACT, device="cpu").parts
            ),
        )
        assert sum(done) == 12 and parts(tmp_path / f"p{count}") == expected
    # Without torchrun too: separate commands on one folder.
    children = [
        tools.Child(lambda: label(recipe, tmp_path / "c", EXACT, device="cpu").parts)
        for _ in range(3)
    ]
    assert sum(child.wait() for child in children) == 12 and parts(tmp_path / "c") == expected


def test_bytes_do_not_depend_on_being_killed(kd, tools, tmp_path):
    recipe = kd(**{"train.eval_batch_size": 2})
    options = replace(EXACT, part_size=4)
    written(recipe, tmp_path / "whole", options)
    expected = parts(tmp_path / "whole")
    folder, random = tmp_path / "killed", np.random.default_rng(0)
    killed = 0

    def work():
        seal, left = LabelStore.seal, iter(range(4))

        def seal_some(*args):
            if next(left, None) is None:
                time.sleep(60)  # to be killed, however late: it may not write all there is
            return seal(*args)

        LabelStore.seal = seal_some
        return label(recipe, folder, options, device="cpu").parts

    while (before := sealed(folder)) < len(expected):
        enough = min(before + int(random.integers(1, 3)), len(expected))
        child = tools.Child(work)
        tools.until(lambda enough=enough: sealed(folder) >= enough)
        time.sleep(0.02 * random.random())  # anywhere in the next part
        child.kill()
        child.wait()
        killed += child.code == -signal.SIGKILL
        assert parts(folder).items() <= expected.items()
    written(recipe, folder, options)
    assert killed >= 5 and parts(folder) == expected
    assert not [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".bin", ".json")
    ]


def test_labelling_stops_when_asked_and_goes_on(kd, tools, tmp_path):
    recipe = kd(**{"train.eval_batch_size": 1, "data.views": 8, "train.epochs": 8})
    options = replace(EXACT, part_size=4)
    child = tools.Child(lambda: label(recipe, tmp_path / "labels", options, device="cpu").parts)
    tools.until(lambda: sealed(tmp_path / "labels") > 2)
    child.kill(signal.SIGTERM)
    stopped = child.wait()
    assert isinstance(stopped, Preempted) and child.code == 75, stopped
    assert "stopped by SIGTERM" in str(stopped)
    before = parts(tmp_path / "labels")
    done = label(recipe, tmp_path / "labels", options, device="cpu")
    assert (
        done.parts == 8 * 12 - len(before) and before.items() <= parts(tmp_path / "labels").items()
    )


MANY = {"data.views": 24, "train.epochs": 24}


def test_what_one_process_cannot_do_stops_all(kd, tools, tmp_path):
    """Its files may not be larger than a lease; without being told, the other would write every
    part before it asks.
    """
    recipe, options = kd(**MANY), LabelOptions(encoding="float32", part_size=45)
    few = written(replace_fields(recipe, {"data.views": 1}), tmp_path / "labels", options)
    LabelStore.create(few.path, replace(few.manifest, num_views=24))

    def work(rank):
        if rank == 1:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
        return label(recipe, tmp_path / "labels", options, device="cpu").parts

    errors = tools.ranks(2, work)
    assert [type(error) for error in errors] == [DiskError] * 2 and str(errors[0]) == str(errors[1])
    assert "/view-000" in str(errors[0]) and "\n" not in str(errors[0])
    there = parts(tmp_path / "labels")
    assert 0 < len(there) < 24
    assert not [
        path
        for path in (tmp_path / "labels").rglob("*")
        if path.name.startswith(".") or path.suffix == ".lease"
    ]
    written(recipe, tmp_path / "labels", options)
    assert (
        there.items() < parts(tmp_path / "labels").items() and len(parts(tmp_path / "labels")) == 24
    )


def test_a_damaged_image_makes_other_labels(kd, tools, tmp_path):
    root = tools.write_images(tmp_path / "images", train=15)
    path = root / "train" / "cat" / "14.png"
    path.write_bytes(path.read_bytes()[:-40])
    calm = {
        "data.augment.mixup": 0.0,
        "data.augment.cutmix": 0.0,
        "data.dir": str(root),
        "data.in_memory": False,
    }
    with pytest.raises(DataError, match=r"cat/14.png: the image is damaged"):
        written(kd(**calm), tmp_path / "labels")
    shutil.copy(root / "train" / "cat" / "13.png", path)
    with pytest.raises(DataError, match="give the very files that were labelled"):
        written(kd(**calm), tmp_path / "labels")
    assert written(kd(**calm), tmp_path / "other").status().records == 45 * 2


def test_a_signal_to_one_process_stops_all(kd, tools, tmp_path):
    recipe = kd(**MANY, **{"train.eval_batch_size": 1})
    children = tools.start_ranks(
        2, lambda rank: label(recipe, tmp_path / "labels", EXACT, device="cpu").parts
    )
    tools.until(lambda: sealed(tmp_path / "labels") > 2)
    children[1].kill(signal.SIGTERM)
    errors = [child.wait() for child in children]
    assert [type(error) for error in errors] == [Preempted] * 2 and len(
        parts(tmp_path / "labels")
    ) < 24 * 6
    assert all("stopped by SIGTERM; what is written in" in str(error) for error in errors)


def test_views_can_be_added_later(kd, tmp_path):
    few = written(kd(), tmp_path / "labels")
    before = parts(few.path)
    more = written(kd(**{"data.views": 3}), tmp_path / "labels")
    assert more.manifest.num_views == 3 and more.digest == few.digest
    assert before.items() < parts(few.path).items() and len(parts(few.path)) == 3 * 6


# -- nothing that does not belong -----------------------------------------------------------------


def refused(recipe, tools, folder, sentence):
    with pytest.raises((ConfigError, DataError), match=sentence):
        tools.run(recipe, folder)
    assert not folder.exists()


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return tmp_path_factory.mktemp("labels")


@pytest.fixture
def stored(kd, labels):
    """The recipe with labels of its two views."""
    path = written(kd(), labels / "all").path
    return lambda **changes: kd(**{"teachers.teacher.labels": str(path), **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.seed": 3}, r"view.seed is 0 in the labels and 3 here"),
        ({"data.augment.reprob": 0.25}, r"view.augment.reprob is 0.5 in the labels and 0.25 here"),
        (
            {"data.augment.mixup": 0.0, "data.augment.cutmix": 0.0},
            r"view.augment.mixup is 0.8 in the labels and 0.0 here",
        ),
        ({"data.augment.hflip": 0.0}, r"view.augment.hflip is 0.5 in the labels and 0.0 here"),
        (
            {"student.model_args.img_size": 8},
            r"view.image_size is \[16, 16\] in the labels and \[8, 8\] here",
        ),
        (
            {"data.in_memory": False},
            r'view.pipeline is "batched" in the labels and "per-sample" here',
        ),
        (
            {"data.views": 3},
            (
                r"shows 3 views of each image \(data.views\), and the labels of the teacher are of"
                r" 2: set --views 2"
            ),
        ),
    ],
)
def test_labels_of_other_views_are_refused_by_name(stored, tools, tmp_path, changes, sentence):
    refused(stored(**changes), tools, tmp_path / "run", sentence)


def test_labels_of_other_images_or_classes_are_refused(stored, tools, odd, tmp_path):
    other = tools.write_images(tmp_path / "images", train=15)
    (other / "train" / "bee" / "14.png").rename(other / "train" / "bee" / "99.png")
    refused(
        stored(**{"data.dir": str(other)}),
        tools,
        tmp_path / "run",
        r"images.fingerprint is .* in the labels and .* here",
    )
    (other / "train" / "bee" / "99.png").unlink()
    refused(
        stored(**{"data.dir": str(other)}),
        tools,
        tmp_path / "run",
        r"images.count is 45 in the labels and 44 here",
    )
    renamed = tools.write_images(tmp_path / "renamed", train=15)
    for split in ("train", "val"):
        (renamed / split / "cat").rename(renamed / split / "cow")
    recipe = stored(**{"data.dir": str(renamed), "teachers.teacher.model": ""})
    refused(
        recipe,
        tools,
        tmp_path / "run",
        r'classes.names is \["ant", "bee", "cat"\] in the labels and \["ant", "bee", "cow"\] here',
    )


def test_labels_of_other_weights_are_refused(stored, kd, plain, tools, labels, tmp_path):
    """Also when labelling is to go on."""
    tools.run(plain(**{"train.epochs": 8, "optim.lr": 5e-3, "train.seed": 6}), tmp_path / "other")
    changes = {"teachers.teacher.model": str(tmp_path / "other" / "last")}
    refused(
        stored(**changes),
        tools,
        tmp_path / "run",
        r'teacher.weights is "\w+" in the labels and "\w+" here',
    )
    with pytest.raises(DataError, match=r'teacher.weights is "\w+" in the store and "\w+" here'):
        written(kd(**changes), labels / "all")


def test_a_view_of_other_pixels_is_an_error_and_not_noise(kd, tools, tmp_path, monkeypatch):
    """As when another version of a library decodes or resamples: names, sizes and settings are all
    the same.
    """
    root = tools.write_images(tmp_path / "images", train=15)
    for path in root.rglob("*.png"):  # all of one size in bytes
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    recipe = kd(**{"data.dir": str(root)})
    store = written(recipe, tmp_path / "labels")
    changed = root / "train" / "bee" / "03.bmp"
    pixels = np.asarray(Image.open(changed)).copy()
    pixels[4:12, 4:12] ^= 1
    Image.fromarray(pixels).save(changed)
    stored = replace_fields(recipe, {"teachers.teacher.labels": str(store.path)})
    with pytest.raises(
        DataError, match=r"view \d of sample 18 is not the one that the teacher labelled"
    ):
        tools.run(stored, tmp_path / "run")
    monkeypatch.setattr(identity, "versions", lambda: {"Pillow": "99.0"})
    with pytest.raises(DataError, match=r"a library has changed \(Pillow .* then, 99.0 now\)"):
        tools.run(stored, tmp_path / "again")


def test_a_missing_record_is_an_error_or_the_teachers_own_answer(
    stored, kd, tools, labels, tmp_path
):
    store = written(kd(), tmp_path / "labels")
    store.part_path(1, 2).unlink()
    broken = {"teachers.teacher.labels": str(store.path)}
    refused(
        stored(**broken),
        tools,
        tmp_path / "run",
        r"1 of 12 parts of the labels of the teacher is not written yet .* view 1, part 2",
    )
    refused(stored(**broken, **{"data.views": 2}), tools, tmp_path / "run", "missing=online")
    tools.run(stored(**broken, **{"data.views": 1}), tmp_path / "one_view")  # that view is whole
    tools.run(stored(**broken, **{"teachers.teacher.missing": "online"}), tmp_path / "online")
    tools.run(stored(), tmp_path / "whole")
    more = {
        "teachers.teacher.missing": "online",
        "data.views": 3,
    }  # the third view has no labels at all
    tools.run(stored(**more), tmp_path / "more")
    tools.run(kd(**{"data.views": 3}), tmp_path / "live")
    assert records_of(tmp_path / "more")[-2]["loss"] == pytest.approx(
        records_of(tmp_path / "live")[-2]["loss"], rel=1e-4
    )
    for ours, theirs in zip(
        records_of(tmp_path / "whole"), records_of(tmp_path / "online"), strict=True
    ):
        assert theirs["loss" if "loss" in ours else "nll"] == pytest.approx(
            ours["loss" if "loss" in ours else "nll"], rel=1e-5
        )


def test_damage_is_an_error_when_it_is_read(stored, kd, tools, tmp_path):
    store = written(kd(), tmp_path / "labels")
    path = store.part_path(0, 1)
    data = bytearray(path.read_bytes())
    data[5] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"part-00001\.bin"):
        tools.run(stored(**{"teachers.teacher.labels": str(store.path)}), tmp_path / "run")


def test_what_cannot_be_stored_or_read_is_refused(kd, stored, taught, tools, tmp_path):
    with pytest.raises(
        ConfigError, match=r"MaskedKD chooses a teacher's patches anew .* \(--without selector\)"
    ):
        label(taught(), tmp_path / "labels", EXACT, device="cpu")
    with pytest.raises(ConfigError, match="k cannot take effect with the encoding float16"):
        LabelOptions(encoding="float16", k=3)
    with pytest.raises(ConfigError, match="the recipe has no teacher to label with"):
        label(
            replace(kd(), teachers={}, objectives={"ce": kd().objectives["ce"]}),
            tmp_path / "labels",
            EXACT,
            device="cpu",
        )
    recipe = replace(kd(), objectives={"nkd": NKD(temperature=2.0)})
    sparse = written(kd(), tmp_path / "sparse", LabelOptions(encoding="topk", k=2))
    assert sparse.layout.logits.temperatures == (2.0,)
    changes = {"teachers.teacher.labels": str(sparse.path)}
    refused(
        replace_fields(recipe, changes),
        tools,
        tmp_path / "run",
        "nkd reads logits at temperatures 1 and 2 together",
    )
    other = replace_fields(replace(kd(), objectives={"kd": SoftKD(temperature=3.0)}), changes)
    refused(
        other,
        tools,
        tmp_path / "run",
        r"at temperature 3, and .* right at 2 only: set that \(--set objectives.kd.temperature=2\)",
    )
    features = replace_fields(replace(kd(), objectives={"vitkd": ViTKD(low_blocks=(0,))}), changes)
    refused(
        features,
        tools,
        tmp_path / "run",
        "do not hold its hidden states after block 0 and features after the final norm: label"
        " again",
    )
    refused(
        replace_fields(taught(), changes),
        tools,
        tmp_path / "run",
        "MaskedKD chooses the patches .* no teacher runs",
    )
    assert not (tmp_path / "labels").exists()


def test_sparse_labels_train(kd, tools, tmp_path):
    """Two classes of three and the mass of the third say everything."""
    tools.run(kd(), tmp_path / "live")
    store = written(kd(), tmp_path / "labels", LabelOptions(encoding="topk", k=2))
    tools.run(kd(**{"teachers.teacher.labels": str(store.path)}), tmp_path / "run")
    live, stored = records_of(tmp_path / "live"), records_of(tmp_path / "run")
    assert stored[0]["kd"] == pytest.approx(live[0]["kd"], rel=1e-2)


def test_answers_that_are_not_finite_are_not_stored(kd, teacher, tools, tmp_path):
    recipe = kd()
    with join_world("cpu") as here:
        job = prepare(recipe, here, lambda text: None)
        work = labelling._Work(job, EXACT)
        next(job.teachers["teacher"].model.parameters()).data.fill_(float("nan"))
        batch, answers = next(work.answers(0, 8, 16))
        with pytest.raises(
            NonFiniteError,
            match=(
                r"the answer of the teacher to view 0 of sample 8 \(ant/08.png\) cannot be stored"
            ),
        ):
            work.records("teacher", 0, batch, answers["teacher"])


def test_check_finds_the_answers_again_and_a_teacher_that_changed(kd, plain, tools, tmp_path):
    for encoding in ("float32", "topk"):
        store = written(kd(), tmp_path / encoding, LabelOptions(encoding=encoding, part_size=8))
        found = check(store, "teacher", 40, device="cpu")
        assert found.as_stored and found.count == found.views == 40 and found.agreement == 1.0
    assert not replace(found, views=found.views - 1).as_stored
    empty = LabelStore.create(tmp_path / "empty", store.manifest)
    with pytest.raises(DataError, match="has no records yet"):
        check(empty, "teacher", 4, device="cpu")
    tools.run(plain(**{"train.epochs": 2, "train.seed": 6}), tmp_path / "other")
    with pytest.raises(
        DataError,
        match=(
            r'what made the labels in .* has changed: teacher.weights is "\w+" in the labels and'
            r' "\w+" here'
        ),
    ):
        check(store, "teacher", 4, model=str(tmp_path / "other" / "last"), device="cpu")


def test_which_of_a_teachers_classes_are_labelled_is_part_of_what_labels_are(kd, tools, tmp_path):
    found = []
    for gone in (None, "bee", "cat"):
        root = tools.write_images(tmp_path / str(gone))
        for split in ("train", "val") if gone else ():
            shutil.rmtree(root / split / gone)
        found.append(
            written(kd(**{"data.dir": str(root)}), tmp_path / f"labels_{gone}").manifest.identity[
                "teacher.classes_taken"
            ]
        )
    assert found == [None, [0, 2], [0, 1]]


# -- what is chosen -------------------------------------------------------------------------------


def test_the_encoding_follows_classes_and_objectives(kd):
    recipe, auto = kd(), LabelOptions()

    def chosen(recipe, num_classes=1000):
        return logit_encoding(
            recipe,
            Network(
                "teacher", "a", (8, 8), depth=2, dim=4, num_classes=num_classes, num_parameters=0
            ),
            auto,
        )

    assert chosen(recipe, 256).kind == "float16"
    assert (chosen(recipe).kind, chosen(recipe).k, chosen(recipe).temperatures) == (
        "topk",
        10,
        (2.0,),
    )
    both = replace(
        recipe,
        objectives={"a": SoftKD(temperature=1.0), "b": SoftKD(temperature=4.0), "c": HardKD()},
    )
    assert chosen(both).temperatures == (1.0, 4.0)
    assert chosen(replace(recipe, objectives={"nkd": NKD(temperature=3.0)})).kind == "float16"
    assert chosen(replace(recipe, objectives={"hard": HardKD()})).temperatures == (1.0,)
    features = replace(
        recipe, objectives={**recipe.objectives, "vitkd": ViTKD()}
    )  # which reads no logits
    assert chosen(features).kind == "topk"


def test_views_come_from_the_labels_where_the_recipe_does_not_say(stored):
    assert with_views_of_labels(stored(**{"data.views": None})).data.views == 2
    assert (
        with_views_of_labels(stored(**{"data.views": None, "train.epochs": 2})).data.views is None
    )
    assert with_views_of_labels(stored(**{"data.views": 1})).data.views == 1


def test_one_set_of_labels_serves_students_of_any_seed(stored, tools, tmp_path):
    """Their views are those of the labels; their weights are not."""
    other = with_views_of_labels(stored(**{"train.seed": 4}))
    assert other.data.seed == 0 and with_views_of_labels(stored()).data.seed is None
    tools.run(stored(), tmp_path / "one")
    tools.run(stored(**{"train.seed": 4}), tmp_path / "two")
    assert records_of(tmp_path / "one")[0]["ce"] != records_of(tmp_path / "two")[0]["ce"]


def test_the_same_command_resumes_whatever_was_labelled_since(kd, tools, tmp_path):
    store = written(kd(), tmp_path / "labels")
    recipe = kd(**{"data.views": None, "teachers.teacher.labels": str(store.path)})
    tools.run(recipe, tmp_path / "run")
    written(kd(**{"data.views": 3}), tmp_path / "labels")
    assert re.search("finished already", "\n".join(tools.said(recipe, tmp_path / "run")))
    assert with_views_of_labels(recipe).data.views is None  # of a new run


def test_other_labels_do_not_continue_a_run(stored, kd, tools, tmp_path):
    recipe = stored(**{"train.save_every": 1})
    tools.run(recipe, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    other = written(kd(), tmp_path / "other", LabelOptions(encoding="float16"))
    with pytest.raises(DataError, match="the labels of the teacher of this run have changed"):
        tools.run(kd(**{"teachers.teacher.labels": str(other.path)}), tmp_path / "run")


def test_training_from_labels_needs_no_teacher_even_where_the_recipe_names_it(
    kd, plain, tools, tmp_path
):
    tools.run(plain(**{"train.epochs": 6, "optim.lr": 5e-3, "train.seed": 6}), tmp_path / "teacher")
    named = {"teachers.teacher.model": str(tmp_path / "teacher" / "last")}
    store = written(kd(**named), tmp_path / "labels")
    (tmp_path / "teacher").rename(tmp_path / "gone")
    tools.run(kd(**named, **{"teachers.teacher.labels": str(store.path)}), tmp_path / "run")
    # Another one that is named is looked for, and compared.
    moved = {
        "teachers.teacher.model": str(tmp_path / "gone" / "last"),
        "teachers.teacher.labels": str(store.path),
    }
    tools.run(kd(**moved), tmp_path / "moved")
    assert records_of(tmp_path / "moved") == records_of(tmp_path / "run")


def test_two_processes_read_the_labels_of_one(stored, tools):
    """Odd counts, mixing, and every view compared with its checksum on whichever process shows
    it.
    """

    def read(count):
        with join_world("cpu") as here:
            job = prepare(stored(), here, lambda text: None)
            batches = [batch for step in job.loaders.train.batches(0, 4) for batch in step]
        return [
            (batch.ids.tolist(), batch.targets["teacher"].logits().tolist()) for batch in batches
        ]

    one, two = read(1), tools.ranks(2, read)
    for step in range(4):
        assert (
            one[step][0] == two[0][step][0] + two[1][step][0]
            and one[step][1] == two[0][step][1] + two[1][step][1]
        )


def test_labels_of_several_teachers_are_written_and_checked_together(kd, teacher, tools, tmp_path):
    recipe = kd()
    heads = {"base": "vit_tiny_patch16_224", "teachers": ["a", "b"], **tools.VIT}
    taught = {name: replace(recipe.teachers["teacher"]) for name in ("a", "b")}
    objectives = {
        "ce": recipe.objectives["ce"],
        "kd_a": SoftKD(teacher="a"),
        "kd_b": SoftKD(teacher="b"),
    }
    student = replace(recipe.student, model="advised_vit", model_args=heads)
    recipe = replace(recipe, student=student, teachers=taught, objectives=objectives)
    stores = label(recipe, tmp_path / "labels", EXACT, device="cpu").stores
    assert parts(stores["a"].path).keys() == parts(stores["b"].path).keys()
    for name, store in stores.items():
        assert check(store, name, 20, device="cpu").as_stored
    changes = {f"teachers.{name}.labels": str(store.path) for name, store in stores.items()}
    tools.run(replace_fields(recipe, changes), tmp_path / "run")
    assert {"kd_a", "kd_b"} <= records_of(tmp_path / "run")[0].keys()
