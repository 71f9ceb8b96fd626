"""A teacher that would waste the run is refused in one sentence, before anything is written."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_runs import CLASSES, run, tree
from timm.models import create_model

from vitdistill.data.loader import EvalLoader
from vitdistill.data.model_input import input_spec_of
from vitdistill.data.sources.open import open_source
from vitdistill.distill.classes import match_classes
from vitdistill.errors import ConfigError, NonFiniteError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.settings import TeacherConfig
from vitdistill.runs.networks import build_teacher, reads_logits, trains_classifier
from vitdistill.runs.preflight import (
    best_order,
    chance_accuracy,
    chance_level,
    prove_features,
    prove_teacher,
)
from vitdistill.vit.needs import Needs
from vitdistill.vit.network import Network
from vitdistill.weights.export import export_timm
from vitdistill.world import ALONE

OTHER = ("dog", "eel", "fox")
NEEDS = Needs(hidden=frozenset({0}), features=True)


@pytest.fixture
def changed(tmp_path, teacher):
    """``changed(change, classes)``: the teacher's export with other weights or class names."""

    def make(change=lambda model: None, classes=CLASSES):
        model = create_model(f"local-dir:{teacher / 'last'}", pretrained=True).eval()
        spec = input_spec_of(model)
        config = json.loads((teacher / "last" / "config.json").read_text())
        with torch.no_grad():
            change(model)
        folder = tmp_path / f"changed{len(list(tmp_path.iterdir()))}"
        args = config["model_args"]
        export_timm(
            model,
            folder,
            architecture=config["architecture"],
            model_args=args,
            classes=classes,
            input_spec=spec,
        )
        return folder

    return make


def broken(folder, key, value):
    """An export with a number that is none, and no digest that would tell."""
    state = load_file(folder / "model.safetensors")
    state[key][1] = value
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["vitdistill"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random(model):
    model.init_weights("reset")


def rotate(model):
    for parameter in model.head.parameters():
        parameter.copy_(parameter.roll(1, 0))


def build(folder, objectives=None, **settings):
    spec = input_spec_of(create_model(f"local-dir:{folder}"))
    config = TeacherConfig(model=str(folder), **settings)
    return build_teacher(config, "teacher", CLASSES, spec, "cpu", objectives)[0]


@pytest.fixture
def prove(images):
    """``prove(folder)``: the proof of the teacher there on 21 images."""

    def make(folder, **settings):
        teacher = build(folder, **settings)
        spec = input_spec_of(create_model(f"local-dir:{folder}"))
        loader = EvalLoader(open_source(str(images), "val"), spec, batch_size=8)
        return prove_teacher(teacher, loader, CLASSES, ALONE)

    return make


@pytest.fixture
def prove_its_features(images):
    """``prove_its_features(folder, needs)``: the proof of what is recorded, whatever its classes."""

    def make(folder, needs=NEEDS):
        teacher = build(folder, {"vitkd": ViTKD()})
        assert teacher.class_index is None
        spec = input_spec_of(create_model(f"local-dir:{folder}"))
        loader = EvalLoader(open_source(str(images), "val"), spec, batch_size=8)
        prove_features(teacher, needs, loader, ALONE)

    return make


def test_a_good_teacher_is_proved(teacher, prove):
    proof = prove(teacher / "last")
    assert (proof.accuracy, proof.num_images) == (1.0, 21) and proof.chance == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (random, r"right on [0-9.]+% of 21 validation images, which is not above chance"),
        (rotate, r"in another order it would be right on 100\.0% \(its class 0 is .*'cat'\)"),
    ],
)
def test_a_teacher_at_chance_or_of_permuted_classes_is_refused(changed, prove, change, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        prove(changed(change))
    assert caught.value.field == "teachers.teacher"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_answer_that_is_no_number_is_refused(changed, prove, value):
    with pytest.raises(NonFiniteError, match="answers with NaN or infinity on validation images"):
        prove(broken(changed(), "head.bias", value))


@pytest.mark.whole
def test_a_refusal_changes_no_file(tmp_path, taught, changed):
    folder = changed(random)
    before = tree(tmp_path)
    for model, words in ((str(folder), "chance"), ("vit_tiny_patch16_224", "random weights")):
        with pytest.raises(ConfigError, match=words):
            run(taught(**{"teachers.teacher.model": model}), tmp_path / "run")
    assert tree(tmp_path) == before and not (tmp_path / "run").exists()


# -- features -------------------------------------------------------------------------------------


def behead(model):
    model.head, model.num_classes = torch.nn.Identity(), 0


@pytest.mark.parametrize(
    ("change", "classes"), [(random, CLASSES), (lambda model: None, OTHER), (behead, None)]
)
def test_features_need_no_classes(changed, prove_its_features, change, classes):
    folder = changed(change, classes)
    prove_its_features(folder)
    another = {"vitkd": ViTKD(), "kd": SoftKD(teacher="another")}
    assert build(folder, another).class_index is None
    if classes is not CLASSES:
        for objectives in (None, {"kd": SoftKD()}, {"vitkd": ViTKD(), "kd": SoftKD()}):
            with pytest.raises(ConfigError, match=r"classes and the data set|does not know 3 of"):
                build(folder, objectives)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_refused(changed, prove_its_features, value):
    folder = broken(changed(), "blocks.0.mlp.fc2.bias", value)
    reading = ({"hidden": {0}}, {"features": True}, {"qkv": {1}}, {"attention": {1}})
    for fields in reading:
        needs = Needs(**{k: v if v is True else frozenset(v) for k, v in fields.items()})
        with pytest.raises(NonFiniteError, match="gives NaN or infinity on validation images"):
            prove_its_features(folder, needs)
    prove_its_features(folder, Needs(qkv=frozenset({0})))  # what is broken is not read


def test_features_that_are_the_same_for_every_image_are_refused(changed, prove_its_features):
    folder = changed(lambda model: model.patch_embed.proj.weight.zero_())
    for needs in (NEEDS, Needs(qkv=frozenset({0}))):
        with pytest.raises(ConfigError, match="the same features for every image"):
            prove_its_features(folder, needs)


def test_who_reads_logits_and_who_trains_a_classifier():
    one, two, student = (
        Network(name, "a", (16, 16), 2, 24, 3, 5, grid=(4, 4), walks=True, dims=(24, 24))
        for name in ("one", "two", "student")
    )
    a, b, ce = ViTKD(teacher="one"), SoftKD(teacher="two"), CrossEntropy()
    every = {"a": a, "b": b, "ce": ce}
    assert not reads_logits(every, one) and reads_logits(every, two)
    assert not reads_logits({"ce": ce}, one)
    for objectives in (every, {"ce": ce}, {"b": b}):
        assert trains_classifier(objectives, student)
    assert not trains_classifier({"a": a}, student)


# -- classes --------------------------------------------------------------------------------------


def test_another_order_of_the_classes_needs_a_word(changed, prove):
    """Exported with its classes, and their rows of the head, in another order."""
    folder = changed(rotate, classes=("cat", "ant", "bee"))
    with pytest.raises(ConfigError, match="another order"):
        prove(folder)
    assert prove(folder, reorder_classes=True).accuracy == 1.0


def test_a_teacher_of_more_classes_answers_for_those_at_hand(changed, prove):
    def widen(model):
        head = torch.nn.Linear(24, 5)
        head.weight[[4, 1, 3]], head.bias[[4, 1, 3]] = model.head.weight, model.head.bias
        head.bias[[0, 2]] = 100.0
        model.head, model.num_classes = head, 5

    assert prove(changed(widen, ("dog", "bee", "eel", "cat", "ant"))).accuracy == 1.0


@pytest.mark.parametrize(
    ("names", "count", "sentence"),
    [
        (None, 1000, r"answers with 1000 classes and the data set has 3"),
        (("ant", "bee"), 3, r"it names 2"),
        (("a", "b", "cat", "d"), 4, r"does not know 2 of .* \('ant', 'bee'\)"),
        (("ant", "bee", "cat", "bee"), 4, r"has two classes called 'bee'"),
        (("bee", "ant", "cat"), 3, "another order"),
    ],
)
def test_classes_that_do_not_match_are_refused(names, count, sentence):
    with pytest.raises(ConfigError, match=sentence):
        match_classes("big one", names, count, CLASSES, reorder=False)


@given(st.permutations(["ant", "bee", "cat", "dog", "eel"]), st.integers(1, 5))
def test_matching_picks_every_class_by_its_name(order, size):
    match = match_classes("teacher", order, 5, sorted(order)[:size], reorder=True)
    picked = order if match.index is None else [order[i] for i in match.index]
    assert tuple(picked) == match.classes == tuple(sorted(order)[:size])


# -- chance ---------------------------------------------------------------------------------------


def test_always_the_same_answer_is_chance_however_unequal_the_classes():
    assert chance_accuracy([(0, 0)] * 90 + [(1, 0)] * 10) == 0.9
    assert chance_accuracy([(i % 4, i % 4) for i in range(40)]) == 0.25


@given(st.integers(2, 200), st.integers(0, 10_000))
def test_guessing_stays_below_the_level(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels, answers = torch.randint(classes, (2, 512), generator=generator).tolist()
    pairs = list(zip(labels, answers, strict=True))
    right = sum(a == b for a, b in pairs) / 512
    assert right <= chance_level(chance_accuracy(pairs), 512) + 0.01


@given(st.permutations(range(8)), st.integers(0, 3))
def test_the_best_order_undoes_a_permutation(order, mistakes):
    pairs = [(label, order[label]) for label in range(8) for _ in range(5)]
    pairs += [(0, order[1])] * mistakes
    assert best_order(pairs) == {answer: label for label, answer in enumerate(order)}
