"""A teacher that would waste the run is refused in one sentence, before anything is written."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_runs import run, tree
from timm.models import create_model

from vitdistill.data.loader import EvalLoader
from vitdistill.data.sources.open import open_source
from vitdistill.distill.classes import match_classes
from vitdistill.errors import ConfigError, NonFiniteError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.config import TeacherConfig
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
from vitdistill.weights import create as weights
from vitdistill.weights.export import export_timm
from vitdistill.world import World

CLASSES = ("ant", "bee", "cat")
HERE = World(0, 1, torch.device("cpu"))


def prove(folder, images, **settings):
    """The proof of the teacher in ``folder`` on 21 images, given in its own contract."""
    config = TeacherConfig(model=str(folder), **settings)
    spec = build_teacher(config, "teacher", CLASSES, _spec(folder), "cpu")[0].spec
    teacher, _ = build_teacher(config, "teacher", CLASSES, spec, "cpu")
    return prove_teacher(
        teacher, EvalLoader(open_source(str(images), "val"), spec, batch_size=8), CLASSES, HERE
    )


def _spec(folder):
    from vitdistill.data.model_input import input_spec_of

    return input_spec_of(weights.create_model(str(folder)))


def changed(teacher, folder, change=None, classes=None):
    """The teacher's export with other weights, or other class names."""
    model = create_model(f"local-dir:{teacher / 'last'}", pretrained=True).eval()
    spec = _spec(teacher / "last")
    args = json.loads((teacher / "last" / "config.json").read_text())
    if change is not None:
        with torch.no_grad():
            change(model)
    export_timm(
        model,
        folder,
        architecture=args["architecture"],
        model_args=args["model_args"],
        classes=classes or CLASSES,
        input_spec=spec,
    )
    return folder


def test_a_good_teacher_is_proved(teacher, images):
    proof = prove(teacher / "last", images)
    assert proof.accuracy == 1.0 and proof.num_images == 21 and proof.chance == pytest.approx(1 / 3)


def test_random_weights_are_refused(tmp_path, teacher, images):
    folder = changed(teacher, tmp_path / "random", lambda model: model.init_weights("reset"))
    with pytest.raises(
        ConfigError,
        match=(
            r"the teacher .* is right on [0-9.]+% of 21 validation images, which is not above"
            r" chance [(]33[.]3% for 3 classes[)]: its "
        ),
    ):
        prove(folder, images)


def test_permuted_classes_are_named(tmp_path, teacher, images):
    def rotate(model):
        model.head.weight.copy_(model.head.weight.roll(1, 0))
        model.head.bias.copy_(model.head.bias.roll(1, 0))

    folder = changed(teacher, tmp_path / "rotated", rotate)
    with pytest.raises(
        ConfigError,
        match=(
            r"its classes look permuted: in another order it would be right on 100\.0% \(its class"
            r" 0 is .*'cat'\)"
        ),
    ):
        prove(folder, images)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_answer_that_is_no_number_is_refused(tmp_path, teacher, images, value):
    folder = shutil.copytree(teacher / "last", tmp_path / "broken")
    state = load_file(folder / "model.safetensors")
    state["head.bias"][1] = value
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["vitdistill"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        NonFiniteError,
        match=(
            r"the teacher .* answers with NaN or infinity on validation images: check its weights"
        ),
    ):
        prove(folder, images)


def test_a_refusal_changes_no_file(tmp_path, taught, teacher, images):
    folder = changed(teacher, tmp_path / "random", lambda model: model.init_weights("reset"))
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="chance"):
        run(taught(**{"teachers.teacher.model": str(folder)}), tmp_path / "run")
    with pytest.raises(ConfigError, match="would have random weights"):
        run(taught(**{"teachers.teacher.model": "vit_tiny_patch16_224"}), tmp_path / "run")
    assert tree(tmp_path) == before and not (tmp_path / "run").exists()


# -- features -------------------------------------------------------------------------------------

NEEDS = Needs(hidden=frozenset({0}), features=True)


def prove_its_features(folder, images, needs=NEEDS):
    """The proof of what is recorded of the teacher in ``folder``, whatever its classes."""
    spec = _spec(folder)
    teacher, match = build_teacher(
        TeacherConfig(model=str(folder)), "teacher", CLASSES, spec, "cpu", {"vitkd": ViTKD()}
    )
    assert match.index is None and match.remark == "only its features are read"
    prove_features(
        teacher, needs, EvalLoader(open_source(str(images), "val"), spec, batch_size=8), HERE
    )


def test_features_need_no_classes(tmp_path, teacher, images):
    prove_its_features(teacher / "last", images)
    prove_its_features(changed(teacher, tmp_path / "other", classes=("dog", "eel", "fox")), images)
    prove_its_features(
        changed(teacher, tmp_path / "random", lambda model: model.init_weights("reset")), images
    )

    def behead(model):
        model.head, model.num_classes = torch.nn.Identity(), 0

    folder = tmp_path / "headless"
    model = create_model(f"local-dir:{teacher / 'last'}", pretrained=True).eval()
    behead(model)
    args = json.loads((teacher / "last" / "config.json").read_text())
    spec = _spec(teacher / "last")
    export_timm(
        model,
        folder,
        architecture=args["architecture"],
        model_args=args["model_args"],
        classes=None,
        input_spec=spec,
    )
    prove_its_features(folder, images)
    with pytest.raises(ConfigError, match="answers with 0 classes and the data set has 3"):
        build_teacher(
            TeacherConfig(model=str(folder)), "teacher", CLASSES, spec, "cpu", {"kd": SoftKD()}
        )


def test_a_teacher_of_other_classes_is_refused_as_soon_as_its_logits_are_read(tmp_path, teacher):
    folder = changed(teacher, tmp_path / "other", classes=("dog", "eel", "fox"))
    config, spec = TeacherConfig(model=str(folder)), _spec(folder)
    for objectives in (None, {"kd": SoftKD()}, {"vitkd": ViTKD(), "kd": SoftKD()}):
        with pytest.raises(ConfigError, match="does not know 3 of the data set's 3 classes"):
            build_teacher(config, "teacher", CLASSES, spec, "cpu", objectives)
    for objectives in ({"vitkd": ViTKD()}, {"vitkd": ViTKD(), "kd": SoftKD(teacher="another")}):
        assert (
            build_teacher(config, "teacher", CLASSES, spec, "cpu", objectives)[0].class_index
            is None
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_refused(tmp_path, teacher, images, value):
    folder = shutil.copytree(teacher / "last", tmp_path / "broken")
    state = load_file(folder / "model.safetensors")
    state["blocks.0.mlp.fc2.bias"][1] = value
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["vitdistill"]
    (folder / "config.json").write_text(json.dumps(config))
    sentence = r"the teacher .* gives NaN or infinity on validation images: check its weights"
    for needs in (
        NEEDS,
        Needs(hidden=frozenset({0})),
        Needs(features=True),
        Needs(qkv=frozenset({1})),
        Needs(attention=frozenset({1})),
    ):
        with pytest.raises(NonFiniteError, match=sentence):
            prove_its_features(folder, images, needs)
    prove_its_features(folder, images, Needs(qkv=frozenset({0})))  # what is broken is not read


def test_features_that_are_the_same_for_every_image_are_refused(tmp_path, teacher, images):
    folder = changed(
        teacher, tmp_path / "blind", lambda model: model.patch_embed.proj.weight.zero_()
    )
    for needs in (NEEDS, Needs(qkv=frozenset({0}))):
        with pytest.raises(
            ConfigError,
            match=(
                r"the teacher .* gives the same features for every image: its weights are not"
                r" loaded"
            ),
        ):
            prove_its_features(folder, images, needs)


def test_who_reads_logits_and_who_trains_a_classifier():
    student = Network(
        "student",
        "tiny",
        (16, 16),
        2,
        24,
        3,
        5,
        grid=(4, 4),
        walks=True,
        attention_source="class",
        dims=(24, 24),
    )
    one, two = (
        Network(name, "big", (16, 16), 2, 24, 9, 5, walks=True, dims=(24, 24))
        for name in ("one", "two")
    )
    objectives = {"a": ViTKD(teacher="one"), "b": SoftKD(teacher="two"), "ce": CrossEntropy()}
    assert not reads_logits(objectives, one) and reads_logits(objectives, two)
    assert trains_classifier(objectives, student)
    assert trains_classifier({"ce": CrossEntropy()}, student) and trains_classifier(
        {"b": SoftKD()}, student
    )
    assert not trains_classifier({"a": ViTKD()}, student) and not reads_logits(
        {"ce": CrossEntropy()}, one
    )


# -- classes --------------------------------------------------------------------------------------


def test_another_order_of_the_classes_needs_a_word(tmp_path, teacher, images):
    """Exported with its classes, and their rows of the head, in another order."""

    def rotate(model):
        model.head.weight.copy_(model.head.weight.roll(1, 0))
        model.head.bias.copy_(model.head.bias.roll(1, 0))

    folder = changed(teacher, tmp_path / "ordered", rotate, classes=("cat", "ant", "bee"))
    with pytest.raises(ConfigError, match="another order"):
        prove(folder, images)
    assert prove(folder, images, reorder_classes=True).accuracy == 1.0


def test_a_teacher_of_more_classes_answers_for_those_at_hand(tmp_path, teacher, images):
    def widen(model):
        head = torch.nn.Linear(24, 5)
        head.weight[[4, 1, 3]], head.bias[[4, 1, 3]] = model.head.weight, model.head.bias
        head.bias[[0, 2]] = 100.0
        model.head, model.num_classes = head, 5

    folder = changed(teacher, tmp_path / "wide", widen, classes=("dog", "bee", "eel", "cat", "ant"))
    assert prove(folder, images).accuracy == 1.0


@pytest.mark.parametrize(
    ("names", "count", "sentence"),
    [
        (None, 1000, r"answers with 1000 classes and the data set has 3"),
        (("ant", "bee"), 3, r"names 2 classes"),
        (("ant", "bee", "dog"), 3, r"does not know 1 of the data set's 3 classes \('cat'\)"),
        (("a", "b", "c", "d"), 4, r"does not know 3 of .* \('ant', 'bee', 'cat'\)"),
        (("ant", "bee", "cat", "bee"), 4, r"has two classes called 'bee'"),
        (
            ("bee", "ant", "cat"),
            3,
            "another order",
        ),
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
    pairs = [(0, 0)] * 90 + [(1, 0)] * 10
    assert chance_accuracy(pairs) == 0.9
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
    pairs = [(label, order[label]) for label in range(8) for _ in range(5)] + [
        (0, order[1])
    ] * mistakes
    assert best_order(pairs) == {answer: label for label, answer in enumerate(order)}
