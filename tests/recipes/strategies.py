"""Arbitrary recipes for hypothesis, and one of three stages."""

from dataclasses import replace

from hypothesis import strategies as st

from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.maskedkd import MaskedKD, TeacherGuided
from vitdistill.recipes.config import OptimConfig, Recipe, StudentConfig, TeacherConfig, TrainConfig
from vitdistill.recipes.stages import Stages

TRAPS = [
    *("no", "null", "~", "1e-3", "010", "1:30", "true", ".nan", "", " ", "a: b", "#c", "<<", "="),
    *("2026-11-21", "0x10", "1_000", "0b1", "1.", "+.5", "- x", "é", "'", '"', "!x", "&a", "*a"),
]
"""Words that some YAML takes for something else than text."""

WORDS = st.sampled_from(TRAPS) | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS
)
PLAIN = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
_OBJECTIVES = st.one_of(
    st.builds(CrossEntropy, smoothing=st.floats(0, 0.99)),
    st.builds(SoftKD, weight=st.floats(1e-9, 1e9), temperature=st.floats(1e-3, 1e3)),
    st.builds(HardKD, teacher=WORDS),
)
RECIPES = st.builds(
    Recipe,
    description=WORDS,
    student=st.builds(
        StudentConfig,
        model=WORDS,
        checkpoint=st.none() | WORDS,
        model_args=st.dictionaries(WORDS, PLAIN, max_size=3),
    ),
    teachers=st.dictionaries(
        st.sampled_from(["teacher", "second"]), st.builds(TeacherConfig, model=WORDS), max_size=2
    ),
    objectives=st.dictionaries(st.sampled_from(["ce", "kd", "other"]), _OBJECTIVES, min_size=1),
    selector=st.none()
    | st.builds(
        MaskedKD,
        keep_rate=st.floats(1e-6, 1),
        num_keep=st.none() | st.integers(1, 9),
        block=st.integers(-3, 3),
    )
    | st.builds(TeacherGuided, softmax_over=st.sampled_from(["tokens", "patches"])),
    optim=st.builds(
        OptimConfig,
        lr=st.floats(1e-12, 1e3),
        min_lr=st.just(0.0),
        clip_grad=st.none() | st.floats(1e-3, 9),
    ),
    train=st.builds(TrainConfig, epochs=st.integers(6, 10**6), seed=st.integers(-(2**40), 2**40)),
)


def three() -> Stages:
    """From nothing, from its weights at another size, and a fresh student taught by that."""
    plain = Recipe(student=StudentConfig(model="deit_tiny_patch16_224", drop_path=0.1))
    taught = replace(
        plain,
        teachers={"teacher": TeacherConfig(model="stage:finetune")},
        objectives={"ce": CrossEntropy(weight=0.5), "kd": SoftKD(weight=0.5)},
    )
    larger = StudentConfig(model="stage:pretrain", image_size=256, model_args={"depth": 6})
    finetune = replace(plain, student=larger)
    return Stages(name="three", stages={"pretrain": plain, "finetune": finetune, "distill": taught})
