"""Training from stored answers is training with the teacher, and nothing else is read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import ranks, run, said, write_images

from vitdistill.errors import ConfigError, DataError
from vitdistill.labels import identity
from vitdistill.labels.store import LabelStore
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.label import LabelOptions, label
from vitdistill.runs.prepare import prepare
from vitdistill.runs.stored import with_views_of_labels
from vitdistill.world import join_world

pytestmark = pytest.mark.whole

EXACT = LabelOptions(encoding="float32", part_size=8)


def written(recipe, folder, options=EXACT):
    """The store of the recipe's one teacher."""
    (store,) = label(recipe, folder, options, device="cpu").stores.values()
    return store


def from_labels(recipe, store):
    return replace_fields(recipe, {"teachers.teacher.labels": str(store.path)})


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return tmp_path_factory.mktemp("labels")


@pytest.fixture
def stored(kd, labels):
    """``stored(...)``: the recipe with labels of its two views."""
    path = written(kd(), labels / "all").path
    return lambda **changes: kd(**{"teachers.teacher.labels": str(path), **changes})


# -- the same training ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rel"),
    [
        (EXACT, 1e-5),
        (LabelOptions(encoding="float16", part_size=8), 2e-2),
        # Two classes of three and the mass of the third say everything.
        (LabelOptions(encoding="topk", k=2), 2e-2),
    ],
    ids=lambda options: getattr(options, "encoding", ""),
)
def test_training_from_labels_is_training_with_the_teacher(kd, tmp_path, options, rel):
    """Three epochs on two views, so that one is shown twice; batches are made of other images than
    those that were labelled together.
    """
    run(kd(), tmp_path / "live")
    store = written(kd(), tmp_path / "labels", options)
    run(from_labels(kd(**{"teachers.teacher.model": ""}), store), tmp_path / "stored")
    live, found = metrics(tmp_path / "live"), metrics(tmp_path / "stored")
    assert [line["step"] for line in live] == [line["step"] for line in found]
    for ours, theirs in zip(live, found, strict=True):
        for key in ours.keys() & {"ce", "kd", "loss", "grad_norm", "nll"}:
            assert theirs[key] == pytest.approx(ours[key], rel=rel, abs=rel / 10), key


def test_stored_answers_give_the_very_loss_of_live_ones(kd, tmp_path):
    """Bit for bit, where records are made of the answers to the same batch."""
    with join_world("cpu") as world:
        store = written(kd(), tmp_path / "labels")
        live = prepare(kd(), world, lambda text: None)
        stored = prepare(from_labels(kd(), store), world, lambda text: None)
        assert not stored.teachers and stored.plan.stored.keys() == {"teacher"}
        stored.distillation.load_state_dict(live.distillation.state_dict())
        for (batch,), (other,) in zip(
            live.loaders.train.batches(0, 7), stored.loaders.train.batches(0, 7), strict=True
        ):
            assert torch.equal(batch.images, other.images) and torch.equal(batch.ids, other.ids)
            answer = live.teachers["teacher"](batch.images, live.plan.live["teacher"]).logits
            torch.testing.assert_close(
                other.targets["teacher"].logits(), answer, rtol=1e-5, atol=1e-5
            )
            pixels = np.zeros(len(batch.ids), np.uint32)
            record = store.layout.encode(answer, {}, None, pixels)
            other.targets["teacher"] = store.layout.targets(record)
            ours = live.distillation.eval()(batch, live.teachers)
            theirs = stored.distillation.eval()(other, {})
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_hidden_states_and_features_are_stored_where_the_plan_reads_them(kd, tmp_path):
    vitkd = {"vitkd": ViTKD(low_blocks=(0,), reduction="mean")}
    recipe = replace(kd(), objectives=vitkd)
    store = written(recipe, tmp_path / "labels", LabelOptions(hidden_dtype="float32"))
    assert [block for block, _, _ in store.layout.hidden] == [0]
    assert store.layout.features == (17, 24) and store.layout.logits is None
    run(recipe, tmp_path / "live")
    run(from_labels(recipe, store), tmp_path / "stored")
    live, found = metrics(tmp_path / "live"), metrics(tmp_path / "stored")
    for ours, theirs in zip(live, found, strict=True):
        if ours["kind"] == "train":
            assert theirs["vitkd"] == pytest.approx(ours["vitkd"], rel=1e-4)


def test_every_record_is_of_the_view_that_training_shows(kd, tmp_path):
    """Odd counts under mixing: the one image without a partner is labelled too."""
    recipe = kd(**{"train.epochs": 6, "data.views": 5})
    store = written(recipe, tmp_path / "labels")
    assert store.status().records == 45 * 5
    with join_world("cpu") as world:
        prepared = prepare(from_labels(recipe, store), world, lambda text: None)
        seen = set()
        # Every step compares the views' checksums. The sixth epoch shows the first view again, in
        # another order and with the same pairs.
        for (batch,) in prepared.loaders.train.batches(0, 12):
            seen |= set(batch.views.tolist())
    assert seen == set(range(5)) and prepared.loaders.train.steps_per_epoch == 2


def test_two_processes_read_the_labels_of_one(stored):
    def read(count):
        with join_world("cpu") as world:
            prepared = prepare(stored(), world, lambda text: None)
            batches = [batch for step in prepared.loaders.train.batches(0, 4) for batch in step]
        return [(b.ids.tolist(), b.targets["teacher"].logits().tolist()) for b in batches]

    one, (first, second) = read(1), ranks(2, read)
    for step in range(4):
        assert all(one[step][i] == first[step][i] + second[step][i] for i in (0, 1))


# -- nothing that does not belong -----------------------------------------------------------------


def refused(recipe, folder, words=None):
    with pytest.raises((ConfigError, DataError), match=words) as caught:
        run(recipe, folder)
    assert not folder.exists()
    return caught.value.field


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.seed": 3}, r"view.seed is 0 in the labels and 3 here"),
        ({"data.augment.reprob": 0.25}, r"view.augment.reprob"),
        ({"data.augment.mixup": 0.0, "data.augment.cutmix": 0.0}, r"view.augment.mixup"),
        ({"student.model_args.img_size": 8}, r"view.image_size"),
        ({"data.in_memory": False}, r"view.pipeline"),
    ],
)
def test_labels_of_other_views_are_refused_by_name(stored, tmp_path, changes, words):
    field = refused(stored(**changes), tmp_path / "run", words)
    assert field == "teachers.teacher.labels"


def test_labels_of_too_few_views_are_refused(stored, tmp_path):
    assert refused(stored(**{"data.views": 3}), tmp_path / "run") == "data.views"


def test_labels_of_other_images_or_classes_are_refused(stored, tmp_path):
    other = write_images(tmp_path / "images", train=15)
    (other / "train" / "bee" / "14.png").rename(other / "train" / "bee" / "99.png")
    changes = {"data.dir": str(other)}
    refused(stored(**changes), tmp_path / "run", r"images.fingerprint")
    renamed = write_images(tmp_path / "renamed", train=15)
    for split in ("train", "val"):
        (renamed / split / "cat").rename(renamed / split / "cow")
    changes = {"data.dir": str(renamed), "teachers.teacher.model": ""}
    refused(stored(**changes), tmp_path / "run", r"classes.names")


def test_labels_of_other_weights_are_refused(stored, kd, plain, labels, tmp_path):
    """Also when labelling is to go on."""
    run(plain(**{"train.epochs": 8, "optim.lr": 5e-3, "train.seed": 6}), tmp_path / "other")
    changes = {"teachers.teacher.model": str(tmp_path / "other" / "last")}
    refused(stored(**changes), tmp_path / "run", r"teacher.weights")
    with pytest.raises(DataError, match=r"teacher.weights"):
        written(kd(**changes), labels / "all")


def test_a_view_of_other_pixels_is_an_error_and_not_noise(kd, tmp_path, monkeypatch):
    """As when another version of a library decodes or resamples: names, sizes and settings are all
    the same.
    """
    root = write_images(tmp_path / "images", train=15)
    for path in root.rglob("*.png"):  # all of one size in bytes
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    recipe = kd(**{"data.dir": str(root)})
    store = written(recipe, tmp_path / "labels")
    changed = root / "train" / "bee" / "03.bmp"
    pixels = np.asarray(Image.open(changed)).copy()
    pixels[4:12, 4:12] ^= 1
    Image.fromarray(pixels).save(changed)
    with pytest.raises(DataError, match=r"view \d of sample 18") as caught:
        run(from_labels(recipe, store), tmp_path / "run")
    assert caught.value.field == "teachers.teacher.labels"
    monkeypatch.setattr(identity, "versions", lambda: {"Pillow": "99.0"})
    with pytest.raises(DataError, match=r"Pillow \(.*, now 99.0\)"):
        run(from_labels(recipe, store), tmp_path / "again")


def test_a_missing_record_is_an_error_or_the_teachers_own_answer(stored, kd, tmp_path):
    store = written(kd(), tmp_path / "labels")
    store.part_path(1, 2).unlink()
    broken = {"teachers.teacher.labels": str(store.path)}
    field = refused(stored(**broken), tmp_path / "run")
    assert field == "teachers.teacher.labels"
    run(stored(**broken, **{"data.views": 1}), tmp_path / "one_view")  # that view is whole
    online = {"teachers.teacher.missing": "online"}
    run(stored(**broken, **online), tmp_path / "online")
    run(stored(), tmp_path / "whole")
    whole, found = metrics(tmp_path / "whole"), metrics(tmp_path / "online")
    for ours, theirs in zip(whole, found, strict=True):
        key = "loss" if "loss" in ours else "nll"
        assert theirs[key] == pytest.approx(ours[key], rel=1e-5)
    run(stored(**online, **{"data.views": 3}), tmp_path / "more")  # one without any labels
    run(kd(**{"data.views": 3}), tmp_path / "live")
    live, found = metrics(tmp_path / "live"), metrics(tmp_path / "more")
    assert found[-2]["loss"] == pytest.approx(live[-2]["loss"], rel=1e-4)


def test_damage_is_an_error_when_it_is_read(kd, tmp_path):
    store = written(kd(), tmp_path / "labels")
    path = store.part_path(0, 1)
    data = bytearray(path.read_bytes())
    data[5] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"part-00001\.bin"):
        run(from_labels(kd(), store), tmp_path / "run")


def test_labels_without_what_an_objective_reads_are_refused(kd, taught, tmp_path):
    sparse = written(kd(), tmp_path / "sparse", LabelOptions(encoding="topk", k=2))
    assert sparse.layout.logits.temperatures == (2.0,)
    for objectives in (
        {"nkd": NKD(temperature=2.0)},  # two temperatures together
        {"kd": SoftKD(temperature=3.0)},
        {"vitkd": ViTKD(low_blocks=(0,))},
    ):
        refused(from_labels(replace(kd(), objectives=objectives), sparse), tmp_path / "run")
    refused(from_labels(taught(), sparse), tmp_path / "run")  # MaskedKD


# -- views, seeds and teachers --------------------------------------------------------------------


def test_views_and_their_seed_come_from_the_labels_where_the_recipe_does_not_say(stored):
    assert with_views_of_labels(stored(**{"data.views": None})).data.views == 2
    few = stored(**{"data.views": None, "train.epochs": 2})
    assert with_views_of_labels(few).data.views is None
    assert with_views_of_labels(stored(**{"data.views": 1})).data.views == 1
    assert with_views_of_labels(stored(**{"train.seed": 4})).data.seed == 0
    assert with_views_of_labels(stored()).data.seed is None


def test_one_set_of_labels_serves_students_of_any_seed(stored, tmp_path):
    run(stored(), tmp_path / "one")
    run(stored(**{"train.seed": 4}), tmp_path / "two")
    assert metrics(tmp_path / "one")[0]["ce"] != metrics(tmp_path / "two")[0]["ce"]


def test_the_same_command_resumes_whatever_was_labelled_since(kd, tmp_path):
    store = written(kd(), tmp_path / "labels")
    recipe = from_labels(kd(**{"data.views": None}), store)
    run(recipe, tmp_path / "run")
    written(kd(**{"data.views": 3}), tmp_path / "labels")
    assert "finished already" in "\n".join(said(recipe, tmp_path / "run"))
    assert with_views_of_labels(recipe).data.views is None  # of a new run


def test_other_labels_do_not_continue_a_run(stored, kd, tmp_path):
    run(stored(**{"train.save_every": 1}), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    other = written(kd(), tmp_path / "other", LabelOptions(encoding="float16"))
    with pytest.raises(DataError, match="labels of the teacher"):
        run(from_labels(kd(), other), tmp_path / "run")


def test_training_from_labels_needs_no_teacher_even_where_the_recipe_names_it(kd, plain, tmp_path):
    run(plain(**{"train.epochs": 6, "optim.lr": 5e-3, "train.seed": 6}), tmp_path / "teacher")
    named = {"teachers.teacher.model": str(tmp_path / "teacher" / "last")}
    store = written(kd(**named), tmp_path / "labels")
    (tmp_path / "teacher").rename(tmp_path / "gone")
    run(from_labels(kd(**named), store), tmp_path / "run")
    # Another one that is named is looked for, and compared.
    moved = {"teachers.teacher.model": str(tmp_path / "gone" / "last")}
    run(from_labels(kd(**moved), store), tmp_path / "moved")
    assert metrics(tmp_path / "moved") == metrics(tmp_path / "run")
    assert LabelStore.open(store.path).verify() == []
