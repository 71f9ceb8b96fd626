"""Labelling: the same bytes whoever writes them and whatever kills them; checking them anew."""

import shutil
import signal
import time
from dataclasses import replace

import numpy as np
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


def written(recipe, folder, options=EXACT):
    """The store of the recipe's one teacher."""
    (store,) = label(recipe, folder, options, device="cpu").stores.values()
    return store


def parts(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.bin"))}


def sealed(folder):
    """How many parts are there while others write: their folders are never renamed, unlike the
    teacher's when it is made.
    """
    return len(list((folder / "teacher").glob("view-*/*.bin")))


def leftovers(folder):
    return [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".bin", ".json")]


# -- the same bytes -------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_workers_or_processes(kd, tmp_path):
    recipe = kd(**{"data.in_memory": False})  # views are made one by one, in workers if any
    written(recipe, tmp_path / "0")
    expected = parts(tmp_path / "0")
    assert len(expected) == 2 * 6
    written(replace_fields(recipe, {"data.workers": 3}), tmp_path / "w")
    assert parts(tmp_path / "w") == expected

    def work(name):
        return label(recipe, tmp_path / name, EXACT, device="cpu").parts

    done = ranks(3, lambda rank: work("p"))
    assert sum(done) == 12 and min(done) > 0 and parts(tmp_path / "p") == expected
    # Without torchrun too: separate commands on one folder.
    children = [Child(lambda: work("c")) for _ in range(2)]
    assert sum(child.wait() for child in children) == 12 and parts(tmp_path / "c") == expected


def test_bytes_do_not_depend_on_being_killed(kd, tmp_path):
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
        child = Child(work)
        until(lambda enough=enough: sealed(folder) >= enough)
        time.sleep(0.02 * random.random())  # anywhere in the next part
        child.kill()
        child.wait()
        killed += child.code == -signal.SIGKILL
        assert parts(folder).items() <= expected.items()
    written(recipe, folder, options)
    assert killed >= 5 and parts(folder) == expected and leftovers(folder) == []


def test_labelling_stops_when_asked_and_goes_on(kd, tmp_path):
    recipe = kd(**{"train.eval_batch_size": 1, "data.views": 8, "train.epochs": 8})
    options = replace(EXACT, part_size=4)
    child = Child(lambda: label(recipe, tmp_path / "labels", options, device="cpu").parts)
    until(lambda: sealed(tmp_path / "labels") > 2)
    child.kill(signal.SIGTERM)
    stopped = child.wait()
    assert isinstance(stopped, Preempted) and child.code == 75 and "SIGTERM" in str(stopped)
    before = parts(tmp_path / "labels")
    done = label(recipe, tmp_path / "labels", options, device="cpu").parts
    assert done == 8 * 12 - len(before)
    assert before.items() <= parts(tmp_path / "labels").items()


def test_an_image_that_was_replaced_makes_other_labels(kd, tmp_path):
    root = write_images(tmp_path / "images", train=15)
    path = root / "train" / "cat" / "14.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    calm = {"data.augment.mixup": 0.0, "data.augment.cutmix": 0.0, "data.in_memory": False}
    recipe = kd(**calm, **{"data.dir": str(root)})
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
    found = []
    for gone in (None, "bee"):
        root = write_images(tmp_path / str(gone))
        for split in ("train", "val") if gone else ():
            shutil.rmtree(root / split / gone)
        store = written(kd(**{"data.dir": str(root)}), tmp_path / f"labels_{gone}")
        found.append(store.manifest.identity["teacher.classes_taken"])
    assert found == [None, [0, 2]]


# -- what cannot be stored ------------------------------------------------------------------------


def test_recipes_whose_answers_cannot_be_stored_are_refused(kd, taught, tmp_path):
    alone = replace(kd(), teachers={}, objectives={"ce": kd().objectives["ce"]})
    for recipe, options, field in (
        (taught(), EXACT, "selector"),
        (alone, EXACT, "teachers"),
        (
            kd(**{"data.augment.repeated_aug": 3, "data.views": None}),
            EXACT,
            "data.augment.repeated_aug",
        ),
        (kd(), LabelOptions(hidden_dtype="float32"), "hidden_dtype"),
    ):
        with pytest.raises(ConfigError) as caught:
            label(recipe, tmp_path / "labels", options, device="cpu")
        assert caught.value.field == field
    assert not (tmp_path / "labels").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    with pytest.raises(ConfigError) as caught:
        label(kd(), tmp_path / "thesis", EXACT, device="cpu")
    assert caught.value.field == "output"


def test_a_part_holds_at_least_a_sample():
    with pytest.raises(ConfigError) as caught:
        LabelOptions(part_size=0)
    assert caught.value.field == "part_size"


def test_answers_that_are_not_finite_are_not_stored(kd, tmp_path):
    layout = written(kd(), tmp_path / "labels").layout
    with join_world("cpu") as world:
        prepared = prepare_teachers(kd(), world, lambda text: None)
        run = LabelRun(prepared, {"teacher": layout})
        next(prepared.teachers["teacher"].model.parameters()).data.fill_(float("nan"))
        batch, answers = next(run.answers(0, 8, 16))
        with pytest.raises(NonFiniteError, match=r"sample 8 \(ant/08.png\)"):
            run.records("teacher", 0, batch, answers["teacher"])


def test_the_encoding_follows_classes_and_objectives(kd):
    recipe = kd()

    def chosen(objectives, num_classes=1000):
        network = Network(
            "teacher", "a", (8, 8), depth=2, dim=4, num_classes=num_classes, num_parameters=0
        )
        return logit_encoding(replace(recipe, objectives=objectives), network, LabelOptions())

    assert chosen(recipe.objectives, 256).kind == "float16"
    found = chosen(recipe.objectives)
    assert (found.kind, found.k, found.temperatures) == ("topk", 10, (2.0,))
    both = {"a": SoftKD(temperature=1.0), "b": SoftKD(temperature=4.0), "c": HardKD()}
    assert chosen(both).temperatures == (1.0, 4.0)
    assert chosen({"nkd": NKD(temperature=3.0)}).kind == "float16"
    assert chosen({"hard": HardKD()}).temperatures == (1.0,)
    assert chosen({**recipe.objectives, "vitkd": ViTKD()}).kind == "topk"  # it reads no logits


# -- checking -------------------------------------------------------------------------------------


def test_check_finds_the_answers_again_and_a_teacher_that_changed(kd, plain, tmp_path):
    for encoding in ("float32", "topk"):
        store = written(kd(), tmp_path / encoding, LabelOptions(encoding=encoding, part_size=8))
        found = check(store, 40, device="cpu")
        assert found.as_stored and 40 >= found.count == found.views > 35 and found.agreement == 1.0
    assert not replace(found, views=found.views - 1).as_stored
    empty = LabelStore.create(tmp_path / "empty", store.manifest)
    with pytest.raises(DataError, match="no records"):
        check(empty, 4, device="cpu")
    run(plain(**{"train.epochs": 2, "train.seed": 6}), tmp_path / "other")
    with pytest.raises(DataError, match=r"teacher.weights"):
        check(store, 4, model=str(tmp_path / "other" / "last"), device="cpu")


def test_labels_of_several_teachers_are_written_and_checked_together(kd, tmp_path):
    recipe = kd()
    heads = {"base": "vit_tiny_patch16_224", "teachers": ["a", "b"], **VIT}
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
    for store in stores.values():
        assert check(store, 20, device="cpu").as_stored
    changes = {f"teachers.{name}.labels": str(store.path) for name, store in stores.items()}
    run(replace_fields(recipe, changes), tmp_path / "run")
    assert "kd_b" in (tmp_path / "run" / "metrics.jsonl").read_text()
