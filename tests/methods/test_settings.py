"""Settings of methods that mean nothing together are refused, by field; bounds of single ones are
in tests/contract.
"""

from typing import Any

import pytest

from vitdistill.errors import ConfigError
from vitdistill.methods.base import WeightSchedule
from vitdistill.methods.cross_entropy import CrossEntropy, chosen_head
from vitdistill.methods.dist import DIST
from vitdistill.methods.dmae import DMAE
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.manifold import Manifold
from vitdistill.methods.masking import RandomMasking
from vitdistill.methods.relations import Relations
from vitdistill.methods.tokens import TokenFeatures
from vitdistill.methods.vitkd import ViTKD

RISING, FALLING = WeightSchedule(to=1.0), WeightSchedule(to=0.0)

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (CrossEntropy, {"weight": 0}, "weight"),
    (HardKD, {"weight": 0, "schedule": FALLING}, "weight"),
    (WeightSchedule, {"to": 1.0, "begin": 0.6, "end": 0.5}, "schedule.begin"),
    (DIST, {"beta": 0.0, "gamma": 0.0}, "beta"),
    (TokenFeatures, {"class_weight": 0.0, "patch_weight": 0.0}, "class_weight"),
    (RandomMasking, {"mask_rate": 0.5, "teacher_mask_rate": 0.6}, "masking.teacher_mask_rate"),
    (Manifold, {"blocks": ()}, "blocks"),
    (Manifold, {"teacher_blocks": (0, 1)}, "teacher_blocks"),
    *[(Relations, {"relations": r}, "relations") for r in ((), ("qq", "qq"), ("q",), ("qx",))],
    (PixelReconstruction, {"decoder_dim": 510}, "decoder_dim"),
    (DMAE, {"student_blocks": (0, 1), "teacher_blocks": (0,)}, "teacher_blocks"),
    (DMAE, {"student_blocks": (0, 1)}, "teacher_blocks"),
    (DMAE, {"beta": 0.5}, "beta"),
    (ViTKD, {"teacher_low_blocks": (0,)}, "teacher_low_blocks"),
    (ViTKD, {"low_blocks": (), "high_weight": 0.0}, "high_weight"),
]


@pytest.mark.parametrize(("method", "settings", "field"), REFUSED)
def test_a_setting_that_means_nothing_is_refused(
    method: Any, settings: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        method(**settings)
    assert caught.value.field == field


def test_a_schedule_may_raise_a_weight_from_0() -> None:
    assert SoftKD(weight=0, schedule=RISING).weight_at(0.5) == 0.5


@pytest.mark.parametrize(
    ("heads", "head", "teacher"),
    [
        (("class",), "distillation", None),
        (("class", "conv", "inv"), "distillation", "conv"),
        (("class", "conv", "inv"), "auto", "teacher"),
    ],
)
def test_a_head_that_is_not_there_is_refused(
    heads: tuple[str, ...], head: str, teacher: str | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen_head(heads, head, teacher)
    assert caught.value.field == "head"
