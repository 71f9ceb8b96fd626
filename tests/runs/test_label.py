"""Labelling: the same bytes whoever writes them and whatever kills them; checking them anew."""

import shutil
import signal
from dataclasses import replace

import pytest
from small_runs import VIT, Child, ranks, run, until, write_images

from vitdistill.errors import ConfigError, DataError, NonFiniteError, Preempted
from vitdistill.labels.store import LabelStore
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.convert import replace_fields
from vitdistill.runs.answers import LabelRun, prepare_teachers
from vitdistill.runs.label import LabelOptions, label, logit_encoding
from vitdistill.runs.label_check import check
from vitdistill.vit.network import Network
from vitdistill.world import join_world

pytestmark = pytest.mark.whole

EXACT = LabelOptions(encoding="float32", part_size=8)
MANY = {"data.views": 8, "train.epochs": 8}


def written(recipe, folder, options=EXACT):
    """The store of the recipe's one teacher."""
    (store,) = label(recipe, folder, options, device="cpu").stores.values()
    return store


def count(recipe, folder, options=EXACT):
    """How many parts this process wrote."""
    return label(recipe, folder, options, device="cpu").parts


def parts(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.bin"))}


def sealed(folder):
    """How many parts are there while others write: their folders are never renamed, unlike the
    teacher's when it is made.
    """
    return len(list((folder / "teacher").glob("view-*/*.bin")))


# -- the same bytes -------------------------------------------------------------------------------


def test_the_students_weights_need_not_be_there(kd, tmp_path):
    """Its network tells what it sees; training alone begins with timm's weights, of another width."""
    recipe = kd(**{"student.pretrained": True})
    store = written(recipe, tmp_path / "labels")
    assert store.manifest.about["recipe"]["student"]["pretrained"]
    with pytest.raises(DataError, match=r"pretrained weights of .* could not be loaded"):
        run(recipe, tmp_path / "run")


def test_bytes_do_not_depend_on_workers_or_processes(kd, tmp_path):
    recipe = kd(**{"data.in_memory": False})  # views are made one by one, in workers if any
    written(recipe, tmp_path / "0")
    expected = parts(tmp_path / "0")
    assert len(expected) == 2 * 6
    written(replace_fields(recipe, {"data.workers": 3}), tmp_path / "w")
    done = ranks(3, lambda rank: count(recipe, tmp_path / "p"))
    assert sum(done) == 12 and min(done) > 0
    # Without torchrun too: separate commands on one folder.
    children = [Child(lambda: count(recipe, tmp_path / "c")) for _ in range(2)]
    assert sum(child.wait() for child in children) == 12
    assert all(parts(tmp_path / name) == expected for name in "wpc")


def test_labelling_stops_when_asked_and_goes_on(kd, tmp_path):
    many = kd(**{"train.eval_batch_size": 1, "data.views": 8, "train.epochs": 8})
    folder = tmp_path / "labels"
    child = Child(lambda: count(many, folder))
    until(lambda: sealed(folder) > 2)
    child.kill(signal.SIGTERM)
    stopped = child.wait()
    assert type(stopped) is Preempted and child.code == 75 and "SIGTERM" in str(stopped)
    before = parts(folder)
    assert count(many, folder) == 8 * 6 - len(before) > 0
    assert before.items() <= parts(folder).items()


def test_an_image_that_was_replaced_makes_other_labels(kd, tmp_path):
    path = write_images(tmp_path / "images", train=15) / "train" / "cat" / "14.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    calm = {"data.augment.mixup": 0.0, "data.augment.cutmix": 0.0, "data.in_memory": False}
    recipe = kd(**calm, **{"data.dir": str(tmp_path / "images")})
    with pytest.raises(DataError, match=r"cat/14.png"):
        written(recipe, tmp_path / "labels")
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"images.fingerprint") as caught:
        written(recipe, tmp_path / "labels")
    assert caught.value.field == "output"
    assert written(recipe, tmp_path / "other").status().records == 45 * 2


def test_views_can_be_added_later(kd, tmp_path):
    few = written(kd(), tmp_path / "labels")
    before = parts(few.path)
    more = written(kd(**{"data.views": 3}), tmp_path / "labels")
    assert more.manifest.num_views == 3 and more.manifest.digest == few.manifest.digest
    assert before.items() < parts(few.path).items() and len(parts(few.path)) == 3 * 6


def test_which_of_a_teachers_classes_are_labelled_is_part_of_what_labels_are(kd, tmp_path):
    assert written(kd(), tmp_path / "all").manifest.identity["teacher.classes_taken"] is None
    root = write_images(tmp_path / "images")
    for folder in root.glob("*/bee"):
        shutil.rmtree(folder)
    store = written(kd(**{"data.dir": str(root)}), tmp_path / "some")
    assert store.manifest.identity["teacher.classes_taken"] == [0, 2]


# -- what cannot be stored ------------------------------------------------------------------------


def test_recipes_whose_answers_cannot_be_stored_are_refused(kd, taught, tmp_path):
    alone = replace(kd(), teachers={}, objectives={"ce": kd().objectives["ce"]})
    repeated = kd(**{"data.augment.repeated_aug": 3, "data.views": None})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    for recipe, options, name, field in (
        (taught(), EXACT, "labels", "selector"),
        (alone, EXACT, "labels", "teachers"),
        (repeated, EXACT, "labels", "data.augment.repeated_aug"),
        (kd(), LabelOptions(hidden_dtype="float32"), "labels", "hidden_dtype"),
        (kd(), EXACT, "thesis", "output"),
    ):
        with pytest.raises(ConfigError) as caught:
            label(recipe, tmp_path / name, options, device="cpu")
        assert caught.value.field == field
    assert not (tmp_path / "labels").exists()


def test_a_part_holds_at_least_a_sample():
    with pytest.raises(ConfigError) as caught:
        LabelOptions(part_size=0)
    assert caught.value.field == "part_size"


def test_answers_that_are_not_finite_are_not_stored(kd, tmp_path):
    layout = written(kd(), tmp_path / "labels").layout
    with join_world("cpu") as world:
        prepared = prepare_teachers(kd(), world, lambda text: None)
        made = LabelRun(prepared, {"teacher": layout})
        next(prepared.teachers["teacher"].model.parameters()).data.fill_(float("nan"))
        batch, answers = next(made.answers(0, 8, 16))
        with pytest.raises(NonFiniteError, match=r"sample 8 \(ant/08.png\)"):
            made.records("teacher", 0, batch, answers["teacher"])


KD = {"kd": SoftKD(temperature=2.0)}


@pytest.mark.parametrize(
    ("objectives", "classes", "kind", "temperatures"),
    [
        (KD, 256, "float16", ()),
        (KD, 1000, "topk", (2.0,)),
        ({**KD, "b": SoftKD(temperature=4.0), "c": HardKD()}, 1000, "topk", (2.0, 4.0)),
        ({"nkd": NKD(temperature=3.0)}, 1000, "float16", ()),
        ({"hard": HardKD()}, 1000, "topk", (1.0,)),
        ({**KD, "vitkd": ViTKD()}, 1000, "topk", (2.0,)),  # which reads no logits
    ],
)
def test_the_encoding_follows_classes_and_objectives(kd, objectives, classes, kind, temperatures):
    network = Network("teacher", "a", (8, 8), depth=2, dim=4, num_classes=classes, num_parameters=0)
    found = logit_encoding(replace(kd(), objectives=objectives), network, LabelOptions())
    assert (found.kind, found.temperatures) == (kind, temperatures)
    assert kind != "topk" or found.k == 10


# -- checking -------------------------------------------------------------------------------------


def test_check_finds_the_answers_again_and_a_teacher_that_changed(kd, whole, tmp_path):
    for encoding in ("float32", "topk"):
        store = written(kd(), tmp_path / encoding, LabelOptions(encoding=encoding, part_size=8))
        found = check(store, 40, device="cpu")
        assert found.as_stored and 40 >= found.count == found.views > 35 and found.agreement == 1.0
    assert not replace(found, views=found.views - 1).as_stored
    empty = LabelStore.create(tmp_path / "empty", store.manifest)
    with pytest.raises(DataError, match="no records"):
        check(empty, 4, device="cpu")
    with pytest.raises(DataError, match=r"teacher.weights"):
        check(store, 4, model=str(whole / "last"), device="cpu")


def test_labels_of_several_teachers_are_written_and_checked_together(kd, tmp_path):
    recipe = kd()
    heads = {"base": "vit_tiny_patch16_224", "teachers": ["a", "b"], **VIT}
    kds = {f"kd_{name}": SoftKD(teacher=name) for name in "ab"}
    recipe = replace(
        recipe,
        student=replace(recipe.student, model="advised_vit", model_args=heads),
        teachers=dict.fromkeys("ab", recipe.teachers["teacher"]),
        objectives={"ce": recipe.objectives["ce"], **kds},
    )
    stores = label(recipe, tmp_path / "labels", EXACT, device="cpu").stores
    assert parts(stores["a"].path).keys() == parts(stores["b"].path).keys()
    for store in stores.values():
        assert check(store, 20, device="cpu").as_stored
    changes = {f"teachers.{name}.labels": str(store.path) for name, store in stores.items()}
    run(replace_fields(recipe, changes), tmp_path / "run")
    assert "kd_b" in (tmp_path / "run" / "metrics.jsonl").read_text()
