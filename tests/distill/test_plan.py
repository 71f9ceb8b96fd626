"""Plans: what every network has to compute, and what is refused before anything is computed."""

from dataclasses import replace

import pytest
from small_vits import CNN, STUDENT, TEACHER

from vitdistill.distill.plan import make_plan
from vitdistill.errors import ConfigError
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.maskedkd import MaskedKD, RandomPatches, TeacherGuided
from vitdistill.methods.nkd import NKD
from vitdistill.methods.vitkd import ViTKD
from vitdistill.vit.needs import Needs

CE, KD = {"ce": CrossEntropy()}, {"kd": SoftKD()}


def test_a_student_alone() -> None:
    plan = make_plan(STUDENT, {}, CE)
    assert plan.student_needs == Needs(logits=True)
    assert plan.live == plan.guides == plan.num_keep == {} and plan.selector is None


def test_needs_are_united_and_counted_from_the_front() -> None:
    plan = make_plan(STUDENT, {"teacher": TEACHER}, CE | KD, MaskedKD(keep_rate=0.5))
    assert plan.student_needs == Needs(logits=True, attention=frozenset({11}))
    assert plan.live == {"teacher": Needs(logits=True)} and plan.guides == {}
    assert plan.num_keep == {"teacher": 128}  # a fraction of the teacher's own patches
    other = make_plan(STUDENT, {"teacher": TEACHER}, CE | KD, MaskedKD(block=3))
    assert other.student_needs.attention == {3}


def test_two_objectives_of_one_teacher_record_what_either_reads() -> None:
    features = {"vitkd": ViTKD(low_blocks=(0,), reduction="mean")}
    for objectives in (KD | features, features | KD):
        plan = make_plan(STUDENT, {"teacher": TEACHER}, objectives)
        assert plan.live["teacher"].logits and plan.live["teacher"].features


def test_a_guide_is_an_extra_pass_of_the_teacher() -> None:
    plan = make_plan(STUDENT, {"teacher": TEACHER}, KD, TeacherGuided(keep_rate=0.25))
    assert plan.guides == {"teacher": Needs(attention=frozenset({7}))}
    assert plan.student_needs == plan.live["teacher"] == Needs(logits=True)


def test_random_patches_need_nothing_of_anybody() -> None:
    plan = make_plan(CNN, {"teacher": TEACHER}, KD, RandomPatches())
    assert plan.student_needs == Needs(logits=True) and plan.guides == {}
    assert plan.num_keep == {"teacher": 128}


MODEL, SELECTED, ALONE = "teachers.teacher.model", "selector.teachers", replace(CNN, name="student")
TAUGHT = {"teacher": TEACHER}
THREE_HEADS = replace(STUDENT, heads=("class", "conv", "inv"))
TWO = {"vit": replace(TEACHER, name="vit"), "cnn": replace(CNN, name="cnn")}
BOTH = {"a": SoftKD(teacher="vit"), "b": HardKD(teacher="cnn")}
DISTILLATION = {"ce": CrossEntropy(head="distillation")}

REFUSED = {
    "nothing to minimise": (STUDENT, {}, {}, None, "objectives"),
    "no teacher": (STUDENT, {}, KD, None, "objectives.kd.teacher"),
    "another teacher": (STUDENT, {"big": TEACHER}, KD, None, "objectives.kd.teacher"),
    "an idle teacher": (STUDENT, TAUGHT, CE, None, "teachers.teacher"),
    "a selector without a teacher": (STUDENT, {}, CE, MaskedKD(), "selector"),
    "other classes": (STUDENT, {"teacher": replace(TEACHER, num_classes=9)}, KD, None, MODEL),
    "a teacher without patches": (STUDENT, {"teacher": CNN}, KD, MaskedKD(), SELECTED),
    "random patches of a CNN": (STUDENT, {"teacher": CNN}, KD, RandomPatches(), SELECTED),
    "a guide without patches": (STUDENT, {"teacher": CNN}, KD, TeacherGuided(), SELECTED),
    "a guide without attention": (
        STUDENT,
        {"teacher": replace(TEACHER, attention_source=None)},
        KD,
        TeacherGuided(),
        MODEL,
    ),
    "a student without attention": (ALONE, TAUGHT, KD, MaskedKD(), "student.model"),
    "a block the student lacks": (STUDENT, TAUGHT, KD, MaskedKD(block=12), ""),
    "a block the teacher lacks": (STUDENT, TAUGHT, KD, TeacherGuided(block=-9), ""),
    "too many patches": (STUDENT, TAUGHT, KD, MaskedKD(num_keep=257), "selector.num_keep"),
    "a name no teacher has": (STUDENT, TAUGHT, KD, MaskedKD(teachers=("vit",)), SELECTED),
    "a chosen teacher without patches": (STUDENT, TWO, BOTH, MaskedKD(), SELECTED),
    "a teacher without feature maps": (STUDENT, {"teacher": CNN}, {"v": ViTKD()}, None, MODEL),
    "a student without feature maps": (ALONE, TAUGHT, {"v": ViTKD()}, None, "student.model"),
    "a student without classifier": (
        replace(STUDENT, num_classes=0),
        {},
        CE,
        None,
        "student.model",
    ),
    "a head the student lacks": (STUDENT, {}, DISTILLATION, None, "objectives.ce.head"),
    "a teacher without a head": (THREE_HEADS, TAUGHT, CE | KD, None, "objectives.kd.head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(case: str) -> None:
    student, teachers, objectives, selector, field = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        make_plan(student, teachers, objectives, selector)
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_every_head_of_the_prediction_has_to_be_trained() -> None:
    """A head left at its random start would spoil the prediction it is averaged into."""
    student = replace(STUDENT, heads=("class", "conv", "inv"), num_prefix_tokens=3)
    conv, inv = {"conv": replace(TEACHER, name="conv")}, {"inv": replace(TEACHER, name="inv")}
    kd_conv, kd_inv = {"kd_conv": SoftKD(teacher="conv")}, {"kd_inv": SoftKD(teacher="inv")}
    by_class = replace(student, answering=("class",))
    assert make_plan(student, conv | inv, CE | kd_conv | kd_inv).student_needs == Needs(logits=True)
    assert make_plan(student, conv, kd_conv | {"ce": CrossEntropy(head="all")})
    assert make_plan(by_class, conv, CE | kd_conv) and make_plan(by_class, {}, CE)
    for refused, teachers, objectives, head in (
        (student, conv, CE | kd_conv, "inv"),
        (student, conv | inv, kd_conv | kd_inv, "class"),
        (student, inv, CE | {"kd": SoftKD(teacher="inv", head="inv")}, "conv"),
        (by_class, conv, kd_conv, "class"),
    ):
        with pytest.raises(ConfigError, match=f"trains the {head} head") as caught:
            make_plan(refused, teachers, objectives)
        assert caught.value.field == "objectives"


# --- some teachers masked, others whole ----------------------------------------------------------


def test_a_selector_chooses_for_the_teachers_it_names() -> None:
    plan = make_plan(STUDENT, TWO, BOTH, MaskedKD(keep_rate=0.5, teachers=("vit",)))
    assert plan.num_keep == {"vit": 128, "cnn": None} and plan.student_needs.attention == {11}
    guided = make_plan(STUDENT, TWO, BOTH, TeacherGuided(teachers=("vit",)))
    assert guided.guides == {"vit": Needs(attention=frozenset({7}))}


def test_a_teacher_whose_logits_nobody_reads_may_have_no_classifier() -> None:
    headless = replace(TEACHER, num_classes=0)
    plan = make_plan(STUDENT, {"teacher": headless}, CE | {"vitkd": ViTKD()})
    assert plan.live == {"teacher": Needs(hidden=frozenset({0, 1}), features=True)}
    assert plan.student_needs == Needs(logits=True, hidden=frozenset({0, 1}), features=True)
    alone = make_plan(replace(STUDENT, num_classes=0), {"teacher": headless}, {"vitkd": ViTKD()})
    assert not alone.student_needs.logits


# --- what an objective has to say ----------------------------------------------------------------


def test_notes_are_those_of_the_objectives_own_teacher() -> None:
    teachers = {"vit": replace(TEACHER, name="vit"), "whole": replace(STUDENT, name="whole")}
    objectives = {
        "ce": CrossEntropy(),
        "a": ViTKD(teacher="vit"),
        "b": ViTKD(teacher="whole"),
        "c": NKD(teacher="whole"),
    }
    notes = make_plan(
        STUDENT, teachers, objectives, MaskedKD(keep_rate=0.5, teachers=("vit",))
    ).notes
    assert "128 of 256 patches" in notes["a"] and "from 14 x 14 to 16 x 16" in notes["a"]
    assert "patches" not in notes["b"] and "ce" not in notes and "c" not in notes
