"""Every batched operation against Pillow's own, and the policy against timm's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import functional as TF

from vitdistill import keyed
from vitdistill.data.views.randaugment import (
    OPERATIONS,
    Kind,
    Operation,
    Policy,
    apply_operation,
)
from vitdistill.data.views.single import posterize
from vitdistill.keyed import Stream

DEIT = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
KEYS = keyed.keys(0, 0, np.arange(40000, dtype=np.int64), Stream.AUGMENT)


def applied(images, kind, value, interpolation: str = "bicubic") -> torch.Tensor:
    operation = Operation(np.asarray(kind, dtype=np.int64), np.asarray(value))
    return apply_operation(images, operation, torch.tensor(FILL, dtype=torch.uint8), interpolation)


def timm_operation(name: str, image: Image.Image, value: float, interpolation: str) -> Image.Image:
    """timm's function of this name; posterize in our form, which has 0 bits."""
    if name.startswith("Posterize"):
        return posterize(image, int(value))
    arguments = () if name in ("AutoContrast", "Equalize", "Invert") else (value,)
    if name.startswith("Solarize"):
        arguments = (int(value),)
    look = {"fillcolor": FILL, "resample": PILLOW[interpolation]}
    return auto_augment.NAME_TO_OP[name](image, *arguments, **look)


def special_images(picture) -> list[Image.Image]:
    flat = Image.new("RGB", (24, 18), (7, 130, 255))
    two = Image.new("RGB", (24, 18), (3, 3, 3))
    two.putpixel((0, 0), (250, 4, 3))
    narrow = Image.fromarray((np.asarray(picture(5, (24, 18))) // 8 + 90).astype(np.uint8))
    return [flat, two, narrow]


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations_are_pillows(picture, stack, name: str) -> None:
    kind, level_to_value = OPERATIONS[name]
    images = [picture(i, (24, 18)) for i in range(20)] + special_images(picture)
    sign = np.where(np.arange(len(images)) % 2, 1.0, -1.0)
    value = level_to_value(np.linspace(0.0, 1.0, len(images)), sign)
    for interpolation in PILLOW if kind >= Kind.ROTATE else ("bicubic",):
        got = applied(stack(images), [kind] * len(images), value, interpolation)
        for image, v, ours in zip(images, value.tolist(), got, strict=True):
            theirs = TF.pil_to_tensor(timm_operation(name, image, v, interpolation))
            assert torch.equal(ours, theirs), (interpolation, v)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_levels_are_timms(name: str, monkeypatch) -> None:
    level_fn = auto_augment.LEVEL_TO_ARG[name]
    for draw, sign in ((0.0, 1.0), (1.0, -1.0)):
        monkeypatch.setattr(auto_augment, "random", SimpleNamespace(random=lambda draw=draw: draw))
        for level in np.linspace(0.0, 10.0, 41):
            ours = OPERATIONS[name][1](np.array([level / 10.0]), np.array([sign]))[0]
            theirs = level_fn(level, {})[0] if level_fn else 0.0
            assert ours == pytest.approx(theirs, abs=1e-12), level


@settings(max_examples=30)
@given(st.lists(st.sampled_from(sorted(Kind)), min_size=1, max_size=9), st.integers(0, 100))
def test_an_image_does_not_depend_on_its_company(picture, stack, kinds, number):
    images = stack([picture(number + i, (20, 20)) for i in range(len(kinds))])
    value = np.linspace(0.2, 0.9, len(kinds))
    together = applied(images, kinds, value)
    for i in range(len(kinds)):
        part = slice(i, i + 1)
        assert torch.equal(applied(images[part], kinds[part], value[part])[0], together[i])


def test_the_policy_is_timms() -> None:
    assert [*OPERATIONS] == auto_augment._RAND_INCREASING_TRANSFORMS
    assert Policy.of(DEIT) == Policy(2, 0.5, 9.0, 0.5, 10.0)
    assert Policy.of("rand-m5-n3-p0.7-mmax20-inc1") == Policy(3, 0.7, 5.0, 0.0, 20.0)


def test_draws_have_the_stated_frequencies() -> None:
    first, second = Policy.of(DEIT).draw(KEYS)
    for layer in (first, second):
        counts = np.bincount(layer.kind, minlength=16) / len(layer.kind)
        assert abs(counts[Kind.NOTHING] - 0.5) < 0.01
        assert np.abs(counts[1:] - 0.5 / 15).max() < 0.005
        angle = layer.value[layer.kind == Kind.ROTATE]
        assert abs((angle > 0).mean() - 0.5) < 0.05
        assert abs(np.abs(angle).mean() - 27) < 0.2 and np.abs(angle).max() == 30
    assert abs(np.corrcoef(first.kind, second.kind)[0, 1]) < 0.02
