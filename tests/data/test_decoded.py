"""Which images are kept decoded, and that it changes no pixel where it must not."""

from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from vitdistill.data import decoded
from vitdistill.data.augment import AUGMENTS, Augment, InputSpec
from vitdistill.data.decoded import DecodedSource, keep_decoded
from vitdistill.data.sources.open import open_source

SPEC = InputSpec((32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
RRC, PAD = Augment(), AUGMENTS["small"]
VARIOUS = ((32, 32), (50, 20), (20, 47))


@pytest.mark.parametrize("threads", [0, 2])
def test_the_choice_depends_on_data_and_options_only(make_folder, monkeypatch, threads) -> None:
    alike = open_source(str(make_folder()), "train")
    various = open_source(str(make_folder(sizes=VARIOUS, name="various")), "train")

    def kept(source, augment: Augment, in_memory: bool | None = None) -> type:
        return type(keep_decoded(source, augment, SPEC, in_memory, threads))

    assert kept(alike, RRC) is kept(various, PAD) is kept(alike, PAD, True) is Tensor
    assert kept(various, RRC) is kept(alike, replace(RRC, aa="v0")) is DecodedSource
    assert kept(alike, RRC, False) is kept(various, PAD, False) is type(alike)
    monkeypatch.setattr(decoded, "IN_MEMORY_BYTES", 24 * 32 * 32 * 3)
    assert kept(alike, RRC) is kept(alike, PAD) is type(alike)
    assert kept(alike, RRC, True) is Tensor
    monkeypatch.setattr(decoded, "IN_MEMORY_BYTES", 24 * 32 * 32 * 3 + 1)
    assert kept(alike, RRC) is Tensor


def test_a_decoded_source_is_its_source(make_folder) -> None:
    source = open_source(str(make_folder(sizes=VARIOUS)), "train")
    again = keep_decoded(source, RRC, SPEC, None, 2)
    assert isinstance(again, DecodedSource) and again.fingerprint() == source.fingerprint()
    for i in range(len(source)):
        assert np.array_equal(np.asarray(again.load(i)), np.asarray(source.load(i)))
