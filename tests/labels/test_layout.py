"""Records of a teacher's answers: what they hold, and which answers are refused."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.errors import ConfigError
from vitdistill.labels.encoding import LogitEncoding
from vitdistill.labels.layout import Layout, NonFinite, Records

EXACT = LogitEncoding(kind="float32", num_classes=5)
TOPK = LogitEncoding(kind="topk", num_classes=5, k=2, temperatures=(1.0, 2.5))
ENCODINGS = (EXACT, LogitEncoding(kind="float16", num_classes=5), TOPK)


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encode(
    layout: Layout,
    logits: Tensor | None,
    hidden: dict[int, Tensor] | None = None,
    features: Tensor | None = None,
    count: int = 3,
) -> Records:
    pixels = np.arange(count, dtype=np.uint32) + np.uint32(2**32 - count)
    return layout.encode(logits, hidden or {}, features, pixels)


def test_the_size_of_a_record() -> None:
    sparse = LogitEncoding(kind="topk", num_classes=1000, k=10, temperatures=(1.0,))
    assert Layout(logits=sparse).record_bytes == 4 + 44
    states = Layout(hidden=((2, 5, 3), (4, 2, 2)), features=(5, 3), hidden_dtype="float32")
    assert states.record_bytes == 4 + 4 * (15 + 4 + 15)


@given(
    st.builds(
        Layout,
        logits=st.sampled_from([None, *ENCODINGS]),
        hidden=st.sampled_from([(), ((0, 3, 2),), ((2, 3, 2), (7, 1, 4))]),
        features=st.just((3, 2)),
        hidden_dtype=st.sampled_from(["float16", "float32"]),
    )
)
def test_a_layout_survives_json_and_pickle(layout: Layout) -> None:
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout and again.dtype == layout.dtype and again.to_json() == layout.to_json()
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_the_json_of_a_layout() -> None:
    """Frozen: the digest of a store is taken over it."""
    layout = Layout(logits=TOPK, hidden=((0, 3, 2),), features=(3, 2))
    assert layout.to_json() == {
        "logits": {"kind": "topk", "num_classes": 5, "k": 2, "temperatures": [1.0, 2.5]},
        "hidden": [[0, 3, 2]],
        "features": [3, 2],
        "hidden_dtype": "float16",
    }


@pytest.mark.parametrize("kind", ["uint8", "sampled"])
def test_encodings_that_are_gone_are_refused_by_name(kind: str) -> None:
    plain = Layout(logits=TOPK).to_json()
    plain["logits"]["kind"] = kind
    with pytest.raises(ConfigError, match=kind):
        Layout.from_json(plain)


def test_a_layout_holds_something() -> None:
    with pytest.raises(ConfigError):
        Layout()


@pytest.mark.parametrize(
    ("layout", "bad"),
    [(Layout(logits=encoding), math.nan) for encoding in ENCODINGS]
    + [(Layout(hidden=((1, 5, 1),)), bad) for bad in (-math.inf, 70000.0)],
)
def test_answers_that_cannot_be_stored_are_refused_by_row(layout: Layout, bad: float) -> None:
    z = gaussian(0, 6, 5)
    encode(layout, z, {1: z[..., None]}, count=6)
    z[2, 4] = z[5, 0] = bad
    with pytest.raises(NonFinite, match="not finite numbers of float") as caught:
        encode(layout, z, {1: z[..., None]}, count=6)
    assert caught.value.index == 2


def test_answers_of_another_shape_are_refused() -> None:
    layout = Layout(logits=EXACT, hidden=((1, 2, 3),))
    z, hidden = gaussian(0, 3, 5), {1: torch.zeros(3, 2, 3)}
    for logits, states in (
        (None, hidden),
        (z[:, :4], hidden),
        (z, {}),
        (z, {0: hidden[1]}),
        (z, {1: torch.zeros(3, 3, 2)}),
    ):
        with pytest.raises(ValueError, match="the labels hold"):
            encode(layout, logits, states)


@given(
    seed=st.integers(0, 10**6),
    number=st.sampled_from(["float16", "float32"]),
    logits=st.sampled_from([None, EXACT, TOPK]),
)
def test_hidden_states_and_features_come_back(seed, number, logits):
    layout = Layout(
        logits=logits, hidden=((0, 2, 3), (4, 5, 1)), features=(2, 3), hidden_dtype=number
    )
    hidden = {4: gaussian(seed, 3, 5, 1), 0: gaussian(seed, 3, 2, 3), 9: torch.zeros(3, 1, 1)}
    features = gaussian(seed, 3, 2, 3) * 100
    records = encode(layout, gaussian(seed, 3, 5), hidden, features)
    if logits == EXACT:  # and stay as they are where logits become smaller
        layout, records = layout.with_logits(TOPK), layout.convert(records, TOPK)
    targets = layout.targets(records)
    assert list(targets.hidden) == [0, 4] and targets.features is not None
    pairs = [(targets.hidden[i], hidden[i]) for i in (0, 4)]
    for got, true in ((targets.features, features), *pairs):
        assert torch.equal(got, true if number == "float32" else true.half().float())
    if logits is None:
        with pytest.raises(ConfigError):
            targets.logits()


def test_targets_move_and_keep_their_pixels() -> None:
    layout = Layout(logits=TOPK)
    targets = layout.targets(encode(layout, gaussian(0, 3, 5)))
    assert targets.pixels.tolist() == [2**32 - 3, 2**32 - 2, 2**32 - 1]
    assert targets.features is None and targets.hidden == {} and len(targets) == 3
    assert torch.equal(targets.to("cpu", non_blocking=True).logits(1.0), targets.logits(1.0))
    assert targets.to("meta").logits(1.0).device.type == "meta"  # nothing is decoded on the host
