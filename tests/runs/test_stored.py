"""Training from stored answers is training with the teacher, and nothing else is read."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import ranks, records, run, said, write_images

from vitdistill import Distiller
from vitdistill.errors import ConfigError, DataError
from vitdistill.labels import identity
from vitdistill.labels.store import LabelStore
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.guidance import LocalityGuidance
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


@pytest.fixture(scope="module")
def store(kd, tmp_path_factory):
    """The labels of both views; to be read only."""
    return written(kd(), tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def live(kd, tmp_path_factory):
    """The log of the run with the teacher."""
    folder = tmp_path_factory.mktemp("live") / "run"
    run(kd(), folder)
    return records(folder)


@pytest.fixture
def stored(kd, store):
    """``stored(...)``: the recipe with labels of its two views."""
    return lambda **changes: kd(**{"teachers.teacher.labels": str(store.path), **changes})


def same(live, found, rel, keys=("ce", "kd", "loss", "grad_norm", "nll", "vitkd")):
    """Both logs say the same."""
    for ours, theirs in zip(live, found, strict=True):
        assert ours["step"] == theirs["step"]
        for key in ours.keys() & set(keys):
            assert theirs[key] == pytest.approx(ours[key], rel=rel, abs=rel / 10), key


# -- the same training ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rel"),
    [
        (EXACT, 1e-5),
        (LabelOptions(encoding="float16", part_size=8), 2e-2),
        # Two classes of three and the mass of the third say everything.
        (LabelOptions(encoding="topk", k=2), 2e-2),
    ],
    ids=["float32", "float16", "topk"],
)
def test_training_from_labels_is_training_with_the_teacher(kd, live, tmp_path, options, rel):
    """Three epochs on two views, so that one is shown twice; batches are made of other images than
    those that were labelled together.
    """
    store = written(kd(), tmp_path / "labels", options)
    run(from_labels(kd(**{"teachers.teacher.model": ""}), store), tmp_path / "run")
    same(live, records(tmp_path / "run"), rel)


def test_stored_answers_give_the_very_loss_of_live_ones(kd, store):
    """Bit for bit, where records are made of the answers to the same batch."""
    with join_world("cpu") as world:
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


@pytest.mark.parametrize("others", [{}, {"ce": CrossEntropy()}], ids=["alone", "classifier"])
def test_hidden_states_and_features_are_stored_where_the_plan_reads_them(kd, tmp_path, others):
    vitkd = {"vitkd": ViTKD(low_blocks=(0,), reduction="mean")}
    recipe = replace(kd(), objectives=vitkd | others)
    store = written(recipe, tmp_path / "labels", LabelOptions(hidden_dtype="float32"))
    assert [block for block, _, _ in store.layout.hidden] == [0]
    assert store.layout.features == (17, 24) and store.layout.logits is None
    run(recipe, tmp_path / "live")
    run(from_labels(recipe, store), tmp_path / "stored")
    same(records(tmp_path / "live"), records(tmp_path / "stored"), 1e-4, ("vitkd",))


@pytest.mark.parametrize(
    ("name", "objective", "options", "blocks"),
    [
        ("kd", SoftKD(temperature=2.0, standardize=True), EXACT, []),
        ("guidance", LocalityGuidance(), LabelOptions(hidden_dtype="float32"), [0, 1]),
    ],
)
def test_standardised_logits_and_a_teachers_stages_are_read_from_labels(
    kd, tmp_path, name, objective, options, blocks
):
    recipe = replace(kd(), objectives={name: objective})
    store = written(recipe, tmp_path / "labels", options)
    assert [block for block, _, _ in store.layout.hidden] == blocks
    run(recipe, tmp_path / "live")
    run(from_labels(recipe, store), tmp_path / "stored")
    same(
        records(tmp_path / "live"), records(tmp_path / "stored"), 1e-4, (name, "loss", "grad_norm")
    )


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


def test_a_loop_of_ones_own_reads_labels_as_a_run_does(kd, store):
    with join_world("cpu") as world:
        prepared = prepare(from_labels(kd(), store), world, lambda text: None)
        distillation = prepared.distillation.eval()  # without stochastic depth
        distiller = Distiller(prepared.student, store, prepared.plan.objectives)
        for step in prepared.loaders.train.batches(0, 2):
            for batch in step:
                given = {
                    name: getattr(batch, name) for name in ("ids", "views", "mixed_labels", "lam")
                }
                losses = distiller(batch.images, batch.labels, **given)
                assert torch.equal(losses["loss"], distillation(batch, {})["loss"])
    with pytest.raises(ConfigError) as refused:
        distiller(batch.images, batch.labels)
    assert refused.value.field == "ids"


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
    root = write_images(tmp_path / "images", train=15)
    changes = {"data.dir": str(root), "teachers.teacher.model": ""}
    bee = root / "train" / "bee"
    (bee / "14.png").rename(bee / "99.png")
    refused(stored(**changes), tmp_path / "run", r"images.fingerprint")
    (bee / "99.png").rename(bee / "14.png")
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / "cow")
    refused(stored(**changes), tmp_path / "run", r"classes.names")


def test_labels_of_other_weights_are_refused(stored, kd, plain, store, tmp_path):
    """Also when labelling is to go on."""
    run(plain(**{"train.epochs": 8, "optim.lr": 5e-3, "train.seed": 6}), tmp_path / "other")
    changes = {"teachers.teacher.model": str(tmp_path / "other" / "last")}
    refused(stored(**changes), tmp_path / "run", r"teacher.weights")
    with pytest.raises(DataError, match=r"teacher.weights"):
        written(kd(**changes), store.path.parent)


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


@pytest.fixture
def copy(store, tmp_path):
    """A copy of the labels, and the field that names it."""
    path = shutil.copytree(store.path, tmp_path / "copy")
    return LabelStore.open(path), {"teachers.teacher.labels": str(path)}


def test_a_missing_record_is_an_error_or_the_teachers_own_answer(stored, kd, copy, live, tmp_path):
    gone, broken = copy
    gone.part_path(1, 2).unlink()
    assert refused(stored(**broken), tmp_path / "run") == "teachers.teacher.labels"
    run(stored(**broken, **{"data.views": 1}), tmp_path / "one_view")  # that view is whole
    online = {"teachers.teacher.missing": "online"}
    run(stored(**broken, **online), tmp_path / "online")
    same(live, records(tmp_path / "online"), 1e-5)
    run(stored(**online, **{"data.views": 3}), tmp_path / "more")  # one without any labels
    run(kd(**{"data.views": 3}), tmp_path / "three")
    same(records(tmp_path / "three"), records(tmp_path / "more"), 1e-4)


def test_damage_is_an_error_when_it_is_read(stored, copy, tmp_path):
    damaged, fields = copy
    path = damaged.part_path(0, 1)
    data = bytearray(path.read_bytes())
    data[5] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"part-00001\.bin"):
        run(stored(**fields), tmp_path / "run")


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


def test_one_set_of_labels_serves_students_of_any_seed(stored, live, tmp_path):
    run(stored(**{"train.seed": 4}), tmp_path / "run")
    assert records(tmp_path / "run")[0]["ce"] != live[0]["ce"]


def test_one_set_of_labels_serves_students_of_any_normalisation(kd, tmp_path):
    calm = {"data.augment.reprob": 0.0}
    store = written(kd(**calm), tmp_path / "labels")
    means = set()
    for model in ("deit_tiny_patch16_224", "vit_base_patch16_clip_224", "resnet10t"):
        recipe = kd(**calm, **{"student.model": model})
        if model == "resnet10t":
            recipe = replace_fields(recipe, {"student.model_args": {}, "student.image_size": 16})
        with join_world("cpu") as world:
            live = prepare(recipe, world, lambda text: None)
            stored = prepare(from_labels(recipe, store), world, lambda text: None)
        means.add(live.networks.spec.mean)
        for (batch,), (other,) in zip(
            live.loaders.train.batches(0, 3), stored.loaders.train.batches(0, 3), strict=True
        ):
            answer = live.teachers["teacher"](batch.images, live.plan.live["teacher"]).logits
            found = other.targets["teacher"].logits()
            torch.testing.assert_close(found, answer, rtol=1e-4, atol=1e-4)
    assert len(means) == 2


@pytest.mark.parametrize("model", ["deit_tiny_patch16_224", "vit_base_patch16_clip_224"])
def test_erased_views_belong_to_one_normalisation(stored, tmp_path, model):
    words = r"view.mean.*label with data.augment.reprob=0"
    refused(stored(**{"student.model": model}), tmp_path / "run", words)


def test_the_same_command_resumes_whatever_was_labelled_since(kd, copy, tmp_path):
    store, _ = copy
    recipe = from_labels(kd(**{"data.views": None}), store)
    run(recipe, tmp_path / "run")
    LabelStore.create(store.path, replace(store.manifest, num_views=3))
    assert "finished already" in said(recipe, tmp_path / "run")[-1]
    assert with_views_of_labels(recipe).data.views is None  # of a new run


def test_other_labels_do_not_continue_a_run(stored, kd, tmp_path):
    run(stored(), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    other = written(kd(), tmp_path / "other", LabelOptions(encoding="float16"))
    with pytest.raises(DataError, match="labels of the teacher"):
        run(from_labels(kd(), other), tmp_path / "run")


def test_training_from_labels_needs_no_teacher_even_where_the_recipe_names_it(
    kd, teacher, tmp_path
):
    shutil.copytree(teacher, tmp_path / "teacher")
    named = {"teachers.teacher.model": str(tmp_path / "teacher" / "last")}
    store = written(kd(**named), tmp_path / "labels")
    (tmp_path / "teacher").rename(tmp_path / "gone")
    run(from_labels(kd(**named), store), tmp_path / "run")
    # Another one that is named is looked for, and compared.
    moved = {"teachers.teacher.model": str(tmp_path / "gone" / "last")}
    run(from_labels(kd(**moved), store), tmp_path / "moved")
    assert records(tmp_path / "moved") == records(tmp_path / "run")
    assert store.verify() == []
