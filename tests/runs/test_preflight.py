"""A teacher that would waste the run is refused in one sentence, before anything is written."""

import json
import math
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_runs import CLASSES, VIT, run, tree
from timm.models import create_model

from vitdistill import Distiller
from vitdistill.data.augment import InputSpec
from vitdistill.data.batch import Batch
from vitdistill.data.loader import EvalLoader
from vitdistill.data.model_input import input_spec_of
from vitdistill.data.sources.open import open_source
from vitdistill.distill.classes import match_classes
from vitdistill.distill.teacher import Teacher
from vitdistill.errors import ConfigError, NonFiniteError, Set, UserError, tell
from vitdistill.methods.base import TokenSelector
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.recipes.convert import replace_fields
from vitdistill.recipes.settings import TeacherConfig
from vitdistill.runs.label import LabelOptions, label
from vitdistill.runs.networks import build_teacher, find_logit_readers
from vitdistill.runs.orders import alignment, natural_order
from vitdistill.runs.preflight import (
    accuracy_on_chosen,
    chance_accuracy,
    prove_features,
    prove_teacher,
)
from vitdistill.runs.prepare import prepare
from vitdistill.vit.families import describe_network
from vitdistill.vit.needs import Needs
from vitdistill.vit.network import Network
from vitdistill.vit.output import ViTOutput
from vitdistill.weights.export import export_timm
from vitdistill.world import ALONE

OTHER = ("dog", "eel", "fox")
NEEDS = Needs(hidden=frozenset({0}), features=True)


class Said(list):
    """The lines of a run."""

    def tell(self, line):
        self.append(tell(line))


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


def random(model):
    model.init_weights("reset")


def rotate(model):
    for parameter in model.head.parameters():
        parameter.copy_(parameter.roll(1, 0))


def build(folder, objectives=None, poison=None, **settings):
    """The teacher there; ``poison``: a parameter, and what its second number becomes."""
    spec = input_spec_of(create_model(f"local-dir:{folder}"))
    config = TeacherConfig(model=str(folder), **settings)
    teacher = build_teacher(config, "teacher", CLASSES, spec, "cpu", objectives)[0]
    if poison is not None:
        teacher.model.get_parameter(poison[0])[1] = poison[1]
    return teacher


@pytest.fixture
def prove(images):
    """``prove(folder)``: the proof of the teacher there on 21 images."""

    def make(folder, accept=False, **settings):
        teacher = build(folder, **settings)
        spec = input_spec_of(create_model(f"local-dir:{folder}"))
        loader = EvalLoader(open_source(str(images), "val"), spec, batch_size=8)
        return prove_teacher(teacher, loader, CLASSES, ALONE, accept)

    return make


@pytest.fixture
def prove_its_features(images):
    """``prove_its_features(folder, needs)``: the proof of what is recorded, whatever its classes."""

    def make(folder, needs=NEEDS, poison=None):
        teacher = build(folder, {"vitkd": ViTKD()}, poison)
        assert teacher.class_index is None
        spec = input_spec_of(create_model(f"local-dir:{folder}"))
        loader = EvalLoader(open_source(str(images), "val"), spec, batch_size=8)
        prove_features(teacher, needs, loader, ALONE)

    return make


def test_a_good_teacher_is_proved(teacher, prove):
    proof = prove(teacher / "last")
    assert (proof.accuracy, proof.num_images) == (1.0, 21) and proof.chance == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("change", "place"), [(random, "teachers.teacher"), (rotate, "teachers.teacher.class_order")]
)
def test_a_teacher_at_chance_or_of_permuted_classes_is_refused(changed, prove, change, place):
    with pytest.raises(ConfigError) as caught:
        prove(changed(change))
    assert caught.value.field.startswith(place)


def test_a_teacher_that_was_made_for_the_middle_of_images_is_said_to_be_better_there(
    tmp_path, images, teacher, taught
):
    """Every other image has a frame of the next class's colour, and the student sees it whole."""
    framed, middle = shutil.copytree(images, tmp_path / "framed"), tmp_path / "middle"
    for path in sorted(framed.glob("val/*/*.png"))[::2]:
        with Image.open(path) as image:
            pixels = np.zeros((32, 32, 3), np.uint8)
            pixels[..., (CLASSES.index(path.parent.name) + 1) % 3] = 255
            pixels[8:24, 8:24] = np.array(image)
        Image.fromarray(pixels).save(path)
    shutil.copytree(teacher / "last", middle)
    for part, number in ((0.5, 1), (1.0, 0)):
        config = json.loads((middle / "config.json").read_text())
        config["pretrained_cfg"]["crop_pct"] = part
        (middle / "config.json").write_text(json.dumps(config))
        changes = {"data.dir": str(framed), "teachers.teacher.model": str(middle)}
        lines = Said()
        found = prepare(taught(**changes), ALONE, lines.tell).proofs["teacher"].accuracy
        warned = [line for line in lines if line.startswith("warning") and "middle 50%" in line]
        assert len(warned) == number and 0.4 < found < 0.8
        assert not number or ("100.0%" in warned[0] and "data.augment.crop=rrc" in warned[0])


@dataclass(frozen=True, kw_only=True)
class Fixed(TokenSelector):
    """Always these patches."""

    patches: tuple[int, ...] = ()

    def select(self, grid, num_keep, student, teacher, noise):
        return torch.tensor(self.patches).expand(len(student.logits), -1)


def test_a_teacher_is_tried_on_the_patches_that_are_chosen_for_it(tmp_path, images, teacher):
    """The middle of each image has its class's colour, and the frame that of the next class."""
    framed = shutil.copytree(images, tmp_path / "framed")
    for path in framed.glob("val/*/*.png"):
        with Image.open(path) as image:
            pixels = np.zeros((32, 32, 3), np.uint8)
            pixels[..., (CLASSES.index(path.parent.name) + 1) % 3] = 255
            pixels[8:24, 8:24] = np.array(image)
        Image.fromarray(pixels).save(path)
    answering, student = build(teacher / "last"), create_model(f"local-dir:{teacher / 'last'}")
    loader = EvalLoader(open_source(str(framed), "val"), answering.spec, batch_size=8)
    side = answering.network.grid[0]
    inner = range(side // 4, side - side // 4)
    middle = tuple(row * side + column for row in inner for column in inner)
    frame = tuple({*range(side**2)} - {*middle})
    right = {}
    for patches in (middle, frame):
        selector = Fixed(num_keep=len(patches), patches=patches)
        distiller = Distiller(student, answering.model, ["ce", "kd"], selector)
        right[patches] = accuracy_on_chosen(distiller.distillation, answering, loader, ALONE)
    assert right == {middle: 1.0, frame: 0.0}


class Hungry(Fixed):
    def select(self, grid, num_keep, student, teacher, noise):
        raise torch.OutOfMemoryError


def test_memory_that_runs_out_there_is_answered_with_the_batch_size(images, teacher):
    answering, student = build(teacher / "last"), create_model(f"local-dir:{teacher / 'last'}")
    loader = EvalLoader(open_source(str(images), "val"), answering.spec, batch_size=8)
    distiller = Distiller(student, answering.model, ["ce", "kd"], Hungry(num_keep=8))
    with pytest.raises(UserError, match="eval_batch_size"):
        accuracy_on_chosen(distiller.distillation, answering, loader, ALONE)


def test_it_is_said_where_a_teacher_is_shown_a_part_of_the_patches(taught):
    for selector, number in ((MaskedKD(keep_rate=0.5), 1), (None, 0)):
        lines = Said()
        prepare(replace(taught(), selector=selector), ALONE, lines.tell)
        assert sum("of 16 patches it is shown" in line for line in lines) == number


def test_the_order_that_a_remedy_sets_is_the_teachers(changed, prove):
    folder = changed(rotate, classes=None)
    with pytest.raises(ConfigError) as caught:
        prove(folder)
    (fix,) = caught.value.fixes
    assert prove(folder, class_order=tuple(fix.value)).accuracy == 1.0


@pytest.mark.parametrize("untrained", [True, False], ids=["as it begins", "a few steps"])
def test_an_unproven_teacher_is_taken_where_the_recipe_says_so(changed, prove, untrained):
    def begin(model):
        random(model)
        model.head.weight.zero_()  # the same answer to every image
        for name, parameter in model.named_parameters():
            if "norm" in name and not untrained:
                parameter.add_(0.01 * torch.randn_like(parameter))

    folder = changed(begin)
    with pytest.raises(ConfigError) as caught:
        prove(folder)
    assert Set("teachers.teacher.accept_unproven", True) in caught.value.fixes
    proof = prove(folder, accept=True)
    assert proof.accuracy == pytest.approx(1 / 3) and caught.value.what == proof.doubts[0].what
    with pytest.raises(ConfigError, match="order"):  # which is no matter of how long it learnt
        prove(changed(rotate, classes=None), accept=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_answer_that_is_no_number_is_refused(changed, prove, value):
    with pytest.raises(NonFiniteError, match="gives NaN or infinity on validation images"):
        prove(changed(), poison=("head.bias", value))


@pytest.mark.whole
def test_a_refusal_changes_no_file_and_its_remedy_runs(tmp_path, taught, changed):
    folder = changed(random)
    before = tree(tmp_path)
    for model, words in (
        (str(folder), "looks untrained"),
        ("vit_tiny_patch16_224", "random weights"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(taught(**{"teachers.teacher.model": model}), tmp_path / "run")
    assert tree(tmp_path) == before and not (tmp_path / "run").exists()
    said = []
    accepted = {"teachers.teacher.model": str(folder), "teachers.teacher.accept_unproven": True}
    run(taught(**accepted), tmp_path / "run", said)
    assert any(line.startswith("warning: the teacher") for line in said)


@pytest.mark.whole
def test_label_refuses_it_too_and_both_take_the_remedy(tmp_path, kd, changed):
    recipe = replace_fields(kd(), {"teachers.teacher.model": str(changed(rotate, None))})
    before = tree(tmp_path)
    with pytest.raises(ConfigError) as caught:
        label(recipe, tmp_path / "labels", LabelOptions(), device="cpu")
    assert tree(tmp_path) == before
    (fix,) = caught.value.fixes
    recipe = replace_fields(recipe, {fix.field: fix.value})
    label(recipe, tmp_path / "labels", LabelOptions(), device="cpu")
    run(recipe, tmp_path / "run")
    store = str(tmp_path / "labels" / "teacher")
    run(replace_fields(recipe, {"teachers.teacher.labels": store}), tmp_path / "stored")


@pytest.mark.whole
def test_an_untrained_teacher_of_features_is_doubted_aloud(tmp_path, plain, changed):
    def begin(model):
        model.init_weights("reset")
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.reset_parameters()

    vitkd = {"ce": CrossEntropy(), "vitkd": ViTKD(reduction="mean")}
    teachers = {"teacher": TeacherConfig(model=str(changed(begin)))}
    recipe = replace(plain(), objectives=vitkd, teachers=teachers)
    said = []
    run(recipe, tmp_path / "run", said)
    assert any(line.startswith("warning: the teacher") for line in said)


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
            with pytest.raises(ConfigError, match=r"classes, but the data set|does not know 3 of"):
                build(folder, objectives)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_refused(changed, prove_its_features, value):
    folder, poison = changed(), ("blocks.0.mlp.fc2.bias", value)
    reading = ({"hidden": {0}}, {"features": True}, {"qkv": {1}}, {"attention": {1}})
    for fields in reading:
        needs = Needs(**{k: v if v is True else frozenset(v) for k, v in fields.items()})
        with pytest.raises(NonFiniteError, match="gives NaN or infinity on validation images"):
            prove_its_features(folder, needs, poison)
    prove_its_features(folder, Needs(qkv=frozenset({0})), poison)  # what is broken is not read


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
    assert not find_logit_readers(every, one) and find_logit_readers(every, two)
    assert not find_logit_readers({"ce": ce}, one)
    assert ce.trains_heads(student) and b.trains_heads(student) and not a.trains_heads(student)


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
        (None, 1000, r"answers with 1000 classes, but the data set has 3"),
        (("ant", "bee"), 3, r"but names 2"),
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


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (None, (2, 0, 1)),
        (CLASSES, (1, 0, 2)),
        (None, (0, 0, 1)),
        (None, (0, 1)),
        (OTHER, (1, 0, 2)),
    ],
)
def test_an_order_that_is_set_is_one_of_all_classes_and_names_do_not_contradict_it(
    changed, names, order
):
    folder = changed(classes=names)
    if names is OTHER or sorted(order) != [0, 1, 2]:
        with pytest.raises(ConfigError) as caught:
            build(folder, class_order=order)
        assert caught.value.field == "teachers.teacher.class_order"
    else:
        assert build(folder, class_order=order).class_index.tolist() == [*order]


@pytest.mark.whole
def test_labels_beside_unlabelled_training_images_prove_the_teacher(tmp_path, images, kd, changed):
    """The places that set it right work without labels, too; the natural order needs them."""
    (tmp_path / "set").mkdir()
    shutil.copytree(images / "val", tmp_path / "set" / "val")
    shutil.copytree(images / "train" / "ant", tmp_path / "set" / "train")
    teacher = {"teachers.teacher.model": str(changed(rotate, None))}
    recipe = replace(kd(**teacher), objectives={"kd": SoftKD()})
    recipe = replace_fields(recipe, {"data.dir": str(tmp_path / "set"), "data.views": None})
    with pytest.raises(ConfigError) as caught:
        prepare(recipe, ALONE, lambda text: None)
    (fix,) = caught.value.fixes
    said = Said()
    prepare(replace_fields(recipe, {fix.field: fix.value}), ALONE, said.tell)
    assert any(line.startswith("teacher: right on 100.0%") for line in said)
    with pytest.raises(ConfigError, match="does not place"):
        prepare(replace_fields(recipe, {fix.field: "natural"}), ALONE, said.tell)


# -- luck and order -------------------------------------------------------------------------------


def test_always_the_same_answer_is_chance_however_unequal_the_classes():
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert chance_accuracy(labels, torch.zeros_like(labels)) == pytest.approx(0.9)
    assert chance_accuracy(torch.arange(40) % 4, torch.arange(40) % 4) == pytest.approx(0.25)


@given(st.integers(2, 200), st.integers(0, 10_000))
def test_a_guess_fits_no_better_than_in_another_order(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (512,), generator=generator)
    assert abs(alignment(torch.randn(512, classes, generator=generator), labels)) < 4.5


def numbered(num_classes):
    """Class names as folders sort them."""
    return tuple(sorted(map(str, range(num_classes))))


def answered(num_classes, accuracy, count=512, seed=0, moved=None):
    """Labels, and logits of a teacher that is right on ``accuracy`` of them, with noise.

    ``moved`` gives the class that stands in each of its columns.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % num_classes
    logits = torch.randn(count, num_classes, generator=generator)
    knows = torch.rand(count, generator=generator) < (accuracy - 1 / num_classes) / (
        1 - 1 / num_classes
    )
    logits[torch.arange(count), labels] += 8.0 * knows
    return logits if moved is None else logits[:, moved], labels


def proof_of(logits, labels, classes):
    """The proof of a teacher that gives these answers."""
    spec = InputSpec((1, len(classes)), (0.0,) * 3, (1.0,) * 3)
    network = Network("teacher", "big", num_classes=len(classes))
    teacher = Teacher(torch.nn.Module(), network, spec, spec)

    def replay(model, images, needs, keep):
        assert images.shape[2] == 1  # it takes one size
        return ViTOutput(logits=images[:, 0, 0])

    teacher.run = replay
    images = logits[:, None, None].expand(-1, 3, 1, -1)
    ids = torch.arange(len(labels))
    parts = ids.split(100)
    batches = [Batch(images[i], labels[i], i, torch.zeros_like(i), 0) for i in parts]
    return prove_teacher(teacher, batches, classes, ALONE)


def found_of(logits, labels, classes):
    """What is wrong with a teacher that gives these answers, and whether it is refused for that."""
    try:
        (doubt,) = proof_of(logits, labels, classes).doubts
    except ConfigError as error:
        return error, True
    return doubt, False


@pytest.mark.parametrize("num_classes", [*range(11, 51), 100, 102, 1000])
@pytest.mark.parametrize("accuracy", [0.4, 1.0])
def test_the_order_of_numbers_is_named_with_its_setting(num_classes, accuracy):
    classes = numbered(num_classes)
    by_number = torch.tensor(natural_order(classes)).argsort()
    assert [classes[i] for i in by_number] == [str(i) for i in range(num_classes)]
    logits, labels = answered(num_classes, accuracy, moved=by_number)
    with pytest.raises(ConfigError) as caught:
        proof_of(logits, labels, classes)
    assert caught.value.fixes == (Set("teachers.teacher.class_order", "natural"),)
    assert not proof_of(logits[:, by_number.argsort()], labels, classes).doubts


@given(
    st.integers(5, 12).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.integers(2, n))),
    st.floats(0.25, 1.0),
    st.integers(0, 99),
)
def test_any_order_is_found_and_spelled(drawn, above_chance, seed):
    """From two exchanged classes to all of them; each is a cycle of the first classes drawn."""
    order, size = drawn
    cycle, moved = torch.tensor(order[:size]), torch.arange(len(order))
    moved[cycle] = cycle.roll(1)
    accuracy = 1 / len(order) + above_chance * (1 - 1 / len(order))
    logits, labels = answered(len(order), accuracy, seed=seed, moved=moved)
    classes = tuple(f"kind {chr(97 + i)}" for i in range(len(order)))
    found, certain = found_of(logits, labels, classes)
    assert found.fixes == (Set("teachers.teacher.class_order", moved.argsort().tolist()),)
    assert certain or above_chance < 0.5


@given(
    st.sampled_from((2, 3, 5, 10, 12, 30, 100, 200)), st.floats(0.1, 1.0), st.integers(0, 10_000)
)
def test_an_honest_teacher_passes_without_a_doubt(num_classes, above_chance, seed):
    accuracy = min(1 / num_classes + above_chance + 0.05, 1.0)
    logits, labels = answered(num_classes, accuracy, seed=seed)
    assert not proof_of(logits, labels, numbered(num_classes)).doubts


@pytest.mark.parametrize("count", [12, 21, 60])
@pytest.mark.parametrize("num_classes", [3, 10])
def test_few_images_do_not_condemn_a_good_teacher(count, num_classes):
    for seed in range(20):
        logits, labels = answered(num_classes, 0.8, count, seed)
        proof_of(logits, labels, numbered(num_classes))


def test_validation_images_of_some_classes_are_enough():
    logits, labels = answered(10, 0.8)
    for seen in (2, 3, 5):
        some = labels < seen
        assert not proof_of(logits[some], labels[some], numbered(10)).doubts


def test_two_classes_of_a_hundred_on_few_images_are_a_doubt():
    moved = torch.arange(100)
    moved[[7, 8]] = torch.tensor([8, 7])
    logits, labels = answered(100, 0.6, moved=moved)
    (doubt,) = proof_of(logits, labels, numbered(100)).doubts
    assert doubt.field == "teachers.teacher.class_order" and "its class 7 is" in str(doubt)


# -- weights that were never loaded ---------------------------------------------------------------

UNTRAINED = {
    "vit_tiny_patch16_224": VIT | {"img_size": 32},
    "deit3_small_patch16_224": VIT | {"img_size": 32},
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "regnetx_002": {},
    "edgenext_xx_small": {},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4, "depths": (1, 1)}
    | {"num_heads": (2, 2), "embed_dim": 24},
}


def colours(num_classes, count=200):
    """Images whose colour tells their class, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % num_classes
    colour = 2 * torch.randn(num_classes, 3, 1, 1, generator=generator)
    return torch.randn(count, 3, 32, 32, generator=generator) + colour[labels], labels


def move_norms(model):
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("moved_norms", [False, True])
@pytest.mark.parametrize("architecture", UNTRAINED)
def test_untrained_networks_are_refused(architecture, moved_norms):
    images, labels = colours(10)
    ids = torch.arange(len(labels))
    spec = InputSpec((32, 32), (0.5,) * 3, (0.5,) * 3)
    for seed in range(2):
        torch.manual_seed(seed)
        model = create_model(architecture, num_classes=10, **UNTRAINED[architecture]).eval()
        if moved_norms:  # as half of a file, or another file, leaves them
            move_norms(model)
        network = Network("teacher", architecture, num_classes=10)
        teacher = Teacher(model, network, spec, spec)
        teacher.run = lambda model, images, needs, keep: ViTOutput(logits=model(images))
        with pytest.raises(ConfigError) as caught:
            batch = Batch(images, labels, ids, torch.zeros_like(ids), 0)
            prove_teacher(teacher, [batch], numbered(10), ALONE)
        place = "teachers.teacher" + ("" if moved_norms else ".checkpoint")
        assert caught.value.field.startswith(place)


# -- other normalisations and sizes ---------------------------------------------------------------

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF, NONE = ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)


def brightness(images):
    """Answers by the brightness that classes have in [-1, 1]."""
    return -40.0 * (images.mean((1, 2, 3))[:, None] - torch.linspace(-0.8, 0.8, 8)).square()


@pytest.mark.parametrize(("told", "size"), [(HALF, 64), (IMAGENET, 64), (NONE, 64), (HALF, 128)])
def test_a_teacher_told_another_input_is_named_with_its_setting(told, size):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 8
    level = torch.linspace(-0.8, 0.8, 8)[labels] + 0.06 * torch.randn(256, generator=generator)
    images = level[:, None, None, None].expand(-1, 3, 64, 64)
    given, own = InputSpec((64, 64), *HALF), InputSpec((size, size), *told)
    teacher = Teacher(torch.nn.Module(), Network("teacher", "cnn", num_classes=8), own, given)

    def run(model, images, needs, keep):
        blur = 1.0 if images.shape[-1] == 64 else 0.0
        return ViTOutput(logits=blur * brightness(images) + torch.eye(8)[0])

    teacher.run = run
    ids = torch.arange(256)
    batches = [Batch(images[i], labels[i], i, torch.zeros_like(i), 0) for i in ids.split(100)]
    try:
        doubts = prove_teacher(teacher, batches, numbered(8), ALONE).doubts
    except ConfigError as error:
        doubts = (error,)
    fixes = {
        (HALF, 64): (),
        (HALF, 128): (Set("teachers.teacher.image_size", 64),),
    }
    overlay = Set(
        "teachers.teacher.model_args.pretrained_cfg_overlay", {"mean": [0.5] * 3, "std": [0.5] * 3}
    )
    assert [fix for doubt in doubts for fix in doubt.fixes] == [
        *fixes.get((told, size), (overlay,))
    ]


@pytest.mark.parametrize(("times", "size"), [(1, None), (2, 16), (0.5, 32)])
@torch.no_grad()
def test_a_vit_whose_positions_were_resampled_is_named_with_the_size_of_its_weights(times, size):
    """Its classes are textures of the size of a patch, which another size blurs or breaks."""
    torch.manual_seed(0)
    labels, own = torch.arange(240) % 4, size or 16
    images = torch.randn(4, 3, 4, 4)[labels].repeat(1, 1, own // 4, own // 4)
    images = images + 0.3 * torch.randn_like(images)
    model = create_model("vit_tiny_patch16_224", **VIT | {"img_size": own}, num_classes=4).eval()
    move_norms(model)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    model.head.weight.copy_(torch.linalg.lstsq(features, 9.0 * torch.eye(4)[labels]).solution.T)
    told = int(times * own)
    model.set_input_size((told, told))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = describe_network(model, "teacher", "vit", (told, told))
    spec, given = InputSpec((told, told), *HALF), InputSpec((own, own), *HALF)
    batches = [Batch(images, labels, labels, torch.zeros_like(labels), 0)]
    try:
        doubts = prove_teacher(
            Teacher(model, network, spec, given), batches, numbered(4), ALONE
        ).doubts
    except ConfigError as error:
        doubts = (error,)
    fixes = [] if size is None else [Set("teachers.teacher.image_size", size)]
    assert [fix for doubt in doubts for fix in doubt.fixes] == fixes
    # It was tried at other sizes, and is as it was.
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_normalisation_that_a_remedy_sets_is_the_teachers(changed):
    overlay = {"pretrained_cfg_overlay": {"mean": [0.1, 0.2, 0.3], "std": [0.4] * 3}}
    teacher = build(changed(), model_args=overlay)
    assert teacher.spec.mean == (0.1, 0.2, 0.3) and teacher.spec.std == (0.4,) * 3
