"""Classes of one set of images in the numbers of another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitdistill.data.sources.base import ImageSource, PartSource, renumber, typical_side
from vitdistill.errors import DataError

names = st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=6, unique=True)


class Made(ImageSource):
    """Images of one row, as wide as their number and three."""

    def __init__(self, classes: list[str], labels: list[int]) -> None:
        self.name, self.classes = "made", tuple(classes)
        self.labels = np.array(labels, dtype=np.int64)
        self.sizes = np.ones(len(labels), dtype=np.int64)

    def key(self, i: int) -> str:
        return str(i)

    def load(self, i: int) -> Image.Image:
        return Image.new("RGB", (i + 3, 2 * i + 4))


@given(known=names, data=st.data(), part=st.booleans())
def test_a_class_keeps_its_name_and_gets_its_number(
    known: list[str], data: st.DataObject, part: bool
) -> None:
    own = data.draw(st.lists(st.sampled_from(known), unique=True))
    labels = data.draw(st.lists(st.integers(-1, len(own) - 1), min_size=1, max_size=8))
    source: ImageSource = Made(own, labels)
    if part:
        source = PartSource(source, np.arange(len(labels), dtype=np.int64))
    renumber(source, known)
    assert source.classes == tuple(known) and source.labels.dtype == np.int64
    for before, after in zip(labels, source.labels.tolist(), strict=True):
        assert after == -1 if before == -1 else known[after] == own[before]
    with pytest.raises(DataError):
        renumber(Made([*known, "more"], [0]), known)


@pytest.mark.parametrize(
    ("count", "side"), [(1, 3), (2, 4), (31, 18), (32, 19), (33, 19), (64, 35)]
)
def test_the_side_of_a_typical_image(count: int, side: int) -> None:
    assert abs(typical_side(Made(["a"], [0] * count)) - side) <= 1
