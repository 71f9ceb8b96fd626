"""Settings of methods that mean nothing are refused, by field."""

from typing import Any

import pytest

from vitdistill.errors import ConfigError
from vitdistill.methods.attention_maps import AttentionMaps
from vitdistill.methods.base import WeightSchedule
from vitdistill.methods.cross_entropy import CrossEntropy, chosen_head
from vitdistill.methods.dist import DIST
from vitdistill.methods.dkd import DKD
from vitdistill.methods.dmae import DMAE
from vitdistill.methods.kd import HardKD, SoftKD
from vitdistill.methods.mae import PixelReconstruction
from vitdistill.methods.manifold import Manifold
from vitdistill.methods.maskedkd import MaskedKD
from vitdistill.methods.masking import RandomMasking
from vitdistill.methods.nkd import NKD
from vitdistill.methods.relations import Relations
from vitdistill.methods.tokens import TokenFeatures
from vitdistill.methods.vitkd import ViTKD
from vitdistill.methods.wttm import WTTM

NAN, INF = float("nan"), float("inf")
RISING, FALLING = WeightSchedule(to=1.0), WeightSchedule(to=0.0)

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    *[(CrossEntropy, {"weight": w}, "weight") for w in (0, -1, NAN, INF)],
    (HardKD, {"weight": 0, "schedule": FALLING}, "weight"),
    *[(CrossEntropy, {"smoothing": s}, "smoothing") for s in (-0.1, 1.0, NAN)],
    *[(WeightSchedule, {"to": to}, "schedule.to") for to in (-1.0, NAN, INF)],
    (WeightSchedule, {"to": 1.0, "begin": 0.6, "end": 0.5}, "schedule.begin"),
    (WeightSchedule, {"to": 1.0, "begin": -0.1}, "schedule.begin"),
    (WeightSchedule, {"to": 1.0, "end": 1.5}, "schedule.begin"),
    (WeightSchedule, {"to": 1.0, "begin": NAN}, "schedule.begin"),
    *[
        (method, {"temperature": t}, "temperature")
        for method in (SoftKD, DIST, DKD, NKD, WTTM)
        for t in (0.0, -1.0, NAN, INF)
    ],
    *[(method, {"beta": b}, "beta") for method in (DIST, DKD) for b in (-1.0, NAN, INF)],
    (DIST, {"beta": 0.0, "gamma": 0.0}, "beta and gamma"),
    (NKD, {"gamma": -1.0}, "gamma"),
    (TokenFeatures, {"class_weight": 0.0, "patch_weight": 0.0}, "class_weight and patch_weight"),
    (TokenFeatures, {"kind": "l3"}, "kind"),
    (AttentionMaps, {"rows": "some"}, "rows"),
    (AttentionMaps, {"divergence": "l1"}, "divergence"),
    *[(MaskedKD, {"keep_rate": r}, "selector.keep_rate") for r in (0.0, -0.5, 1.1, NAN)],
    (MaskedKD, {"num_keep": 0}, "selector.num_keep"),
    *[(RandomMasking, {"mask_rate": r}, "masking.mask_rate") for r in (1.0, -0.1, NAN)],
    (RandomMasking, {"mask_rate": 0.5, "teacher_mask_rate": 0.6}, "masking.teacher_mask_rate"),
    (Manifold, {"blocks": ()}, "blocks"),
    (Manifold, {"teacher_blocks": (0, 1)}, "teacher_blocks"),
    (Manifold, {"num_samples": 1}, "num_samples"),
    (Manifold, {"sample_weight": -1.0}, "sample_weight"),
    *[(Relations, {"relations": r}, "relations") for r in ((), ("qq", "qq"), ("q",), ("qx",))],
    (Relations, {"num_heads": 0}, "num_heads"),
    (PixelReconstruction, {"decoder_depth": 0}, "decoder_depth"),
    (PixelReconstruction, {"decoder_dim": 510}, "decoder_dim"),
    (DMAE, {"student_blocks": (0, 1), "teacher_blocks": (0,)}, "teacher_blocks"),
    (DMAE, {"student_blocks": (0, 1)}, "teacher_blocks"),
    (DMAE, {"projection": "conv"}, "projection"),
    (DMAE, {"distance": "l3"}, "distance"),
    (DMAE, {"beta": 0.5}, "beta"),
    (DMAE, {"beta": 0.0, "distance": "smooth_l1"}, "beta"),
    (DMAE, {"beta": 2.0, "distance": "smooth_l1"}, "beta"),
    (ViTKD, {"mask_rate": 1.0}, "mask_rate"),
    (ViTKD, {"low_weight": -1.0}, "low_weight"),
    (ViTKD, {"teacher_low_blocks": (0,)}, "teacher_low_blocks"),
    (ViTKD, {"low_blocks": (), "high_weight": 0.0}, "low_blocks"),
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
