"""Plans: what every network has to compute, and what is refused before anything is computed."""

from dataclasses import replace

import pytest

from vitdistill.errors import ConfigError
from vitdistill.method import Network
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.maskedkd import MaskedKD, RandomPatches, TeacherGuided
from vitdistill.plan import describe_needs, make_plan
from vitdistill.vit import Needs

STUDENT = Network(
    name="student",
    architecture="tiny",
    image_size=(224, 224),
    depth=12,
    dim=192,
    num_classes=10,
    num_parameters=5,
    grid=(14, 14),
    patch_size=(16, 16),
    num_prefix_tokens=1,
    walks=True,
    attention_source="class",
)
TEACHER = replace(STUDENT, name="teacher", architecture="small", dim=384, grid=(16, 16), depth=8)
CNN = Network(name="teacher", architecture="resnet18", image_size=(224, 224), depth=5, dim=512, num_classes=10, num_parameters=9)
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


def test_without_a_selector_the_teacher_sees_everything() -> None:
    assert make_plan(STUDENT, {"teacher": TEACHER}, KD).num_keep == {"teacher": None}


def test_a_guide_is_an_extra_pass_of_the_teacher() -> None:
    plan = make_plan(STUDENT, {"teacher": TEACHER}, KD, TeacherGuided(keep_rate=0.25))
    assert plan.guides == {"teacher": Needs(attention=frozenset({7}))}
    assert plan.student_needs == plan.live["teacher"] == Needs(logits=True)


def test_random_patches_need_nothing_of_anybody() -> None:
    plan = make_plan(CNN, {"teacher": TEACHER}, KD, RandomPatches())
    assert plan.student_needs == Needs(logits=True) and plan.guides == {} and plan.num_keep == {"teacher": 128}


def test_two_teachers_keep_their_own_counts() -> None:
    teachers = {"a": replace(TEACHER, name="a"), "b": replace(STUDENT, name="b")}
    objectives = {"x": SoftKD(teacher="a"), "y": HardKD(teacher="b")}
    assert make_plan(STUDENT, teachers, objectives, MaskedKD(keep_rate=0.75)).num_keep == {"a": 192, "b": 144}


REFUSED = {
    "nothing to minimise": (STUDENT, {}, {}, None, "there is no objective"),
    "no teacher": (STUDENT, {}, KD, None, "'kd' reads a teacher named 'teacher', but no teacher is given"),
    "another teacher": (STUDENT, {"big": TEACHER}, KD, None, "but the teachers are big"),
    "an idle teacher": (STUDENT, {"teacher": TEACHER}, CE, None, "no objective reads the teacher 'teacher'"),
    "a selector without a teacher": (STUDENT, {}, CE, MaskedKD(), "MaskedKD chooses the patches a teacher sees, but no teacher runs"),
    "other classes": (STUDENT, {"teacher": replace(TEACHER, num_classes=9)}, KD, None, "answers with 9 classes and the student with 10"),
    "hard labels of other classes": (
        STUDENT,
        {"teacher": replace(TEACHER, num_classes=9)},
        {"kd": HardKD()},
        None,
        "class by class",
    ),
    "a teacher without patches": (STUDENT, {"teacher": CNN}, KD, MaskedKD(), "resnet18.* needs a plain ViT as teacher; use the kd recipe"),
    "random patches of a CNN": (STUDENT, {"teacher": CNN}, KD, RandomPatches(), "RandomPatches needs a plain ViT"),
    "a guide without patches": (STUDENT, {"teacher": CNN}, KD, TeacherGuided(), "TeacherGuided needs a plain ViT"),
    "a guide without attention": (
        STUDENT,
        {"teacher": replace(TEACHER, attention_source=None)},
        KD,
        TeacherGuided(),
        "has no attention to guide",
    ),
    "a student without patches": (
        replace(CNN, name="student"),
        {"teacher": TEACHER},
        KD,
        MaskedKD(),
        "reads the student's attention over its patches, and resnet18 has none",
    ),
    "a block the student lacks": (
        STUDENT,
        {"teacher": TEACHER},
        KD,
        MaskedKD(block=12),
        r"MaskedKD reads block 12 .* the student \(tiny\)",
    ),
    "a block the teacher lacks": (STUDENT, {"teacher": TEACHER}, KD, TeacherGuided(block=-9), r"reads block -9 .* the teacher \(small\)"),
    "more patches than there are": (STUDENT, {"teacher": TEACHER}, KD, MaskedKD(num_keep=257), "num_keep is 257, but .* only 256"),
    "a head the student lacks": (STUDENT, {}, {"ce": CrossEntropy(head="distillation")}, None, "needs a student with a distillation token"),
    "a class head among one": (STUDENT, {}, {"ce": CrossEntropy(head="class")}, None, "has one head"),
    "a distillation head for kd": (
        STUDENT,
        {"teacher": TEACHER},
        {"kd": SoftKD(head="distillation")},
        None,
        "needs a student with a distillation token",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(case: str) -> None:
    student, teachers, objectives, selector, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=sentence) as caught:
        make_plan(student, teachers, objectives, selector)
    assert "\n" not in str(caught.value)


def test_a_distilled_student_takes_every_head() -> None:
    distilled = replace(STUDENT, heads=("class", "distillation"), num_prefix_tokens=2)
    for ce, kd in (("auto", "auto"), ("class", "distillation"), ("distillation", "class"), ("all", "auto"), ("auto", "all")):
        make_plan(distilled, {"teacher": TEACHER}, {"ce": CrossEntropy(head=ce), "kd": SoftKD(head=kd)}, MaskedKD())


def test_plans_are_described_in_words() -> None:
    needs = Needs(logits=True, attention=frozenset({11}))
    assert describe_needs(STUDENT, needs, None) == (
        "196 of 196 patches; 12 of 12 blocks; records logits and class-token attention of block 11"
    )
    early = Needs(hidden=frozenset({0, 3}))
    assert describe_needs(TEACHER, early, 64) == "64 of 256 patches; 4 of 8 blocks; records hidden states after block 0, 3"
    assert describe_needs(CNN, Needs(logits=True), None) == "records logits"
    mean = replace(STUDENT, attention_source="mean")
    assert "mean attention of block 11" in describe_needs(mean, needs, None)


def test_a_head_that_nobody_trains_is_refused() -> None:
    """A second head is averaged into the prediction, so that leaving it at its random start would spoil every answer."""
    student = replace(STUDENT, heads=("class", "distillation"), num_prefix_tokens=2)
    with pytest.raises(ConfigError, match="no objective trains the distillation head"):
        make_plan(student, {}, {"ce": CrossEntropy()})
    assert make_plan(student, {}, {"ce": CrossEntropy(head="all")})
    assert make_plan(student, {"teacher": TEACHER}, {"ce": CrossEntropy(), "kd": SoftKD()})
    with pytest.raises(ConfigError, match="no objective trains the class head"):
        make_plan(student, {"teacher": TEACHER}, {"kd": SoftKD()})
