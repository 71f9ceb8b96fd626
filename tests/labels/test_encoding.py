"""Logits as they are stored: what each encoding gives back, and how much of it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.errors import ConfigError
from vitdistill.labels.encoding import LogitEncoding
from vitdistill.labels.layout import Layout, Records

seeds = st.integers(0, 10**6)


def gaussian(
    seed: int, batch: int = 3, classes: int = 7, scale: float = 3.0, ties: bool = False
) -> Tensor:
    z = scale * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))
    return z.round() if ties else z


def topk(classes: int, k: int, *temperatures: float) -> LogitEncoding:
    return LogitEncoding(kind="topk", num_classes=classes, k=k, temperatures=temperatures or (1.0,))


def dense(kind: Any, classes: int) -> LogitEncoding:
    return LogitEncoding(kind=kind, num_classes=classes)


EVERY = [dense("float32", 5), dense("float16", 5), topk(5, 2), topk(5, 5)]


def encode(encoding: LogitEncoding, logits: Tensor) -> Records:
    pixels = np.arange(len(logits), dtype=np.uint32)
    return Layout(logits=encoding).encode(logits, {}, None, pixels)


def read(encoding: LogitEncoding, records: Records, temperature: float | None = None) -> Tensor:
    return Layout(logits=encoding).targets(records).logits(temperature)


def answered(encoding: LogitEncoding, logits: Tensor, temperature: float | None = None) -> Tensor:
    return read(encoding, encode(encoding, logits), temperature)


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits.double() / temperature).softmax(-1)


def order(logits: Tensor) -> Tensor:
    """Classes by falling logit and then rising number, by Python's sort."""
    return torch.tensor(
        [sorted(range(len(row)), key=lambda i: (-row[i], i)) for row in logits.tolist()]
    )


def head_error(logits: Tensor, k: int, temperature: float) -> Tensor:
    """The most that float16 can move the log of the head's sum."""
    head = logits.double().sort(dim=1, descending=True).values[:, :k]
    below = (head - head[:, :1]).abs()
    return (below * 2.0**-11 * 1.001 + 2.0**-25).amax(1) / temperature


def test_the_bytes_of_a_record() -> None:
    """Frozen: a store is read by every later version."""
    z = torch.tensor([[1.0, 4.0, -2.0, 4.0, 0.5]])
    record = encode(topk(5, 3, 2.0), z)
    assert record.dtype.names == ("pixels", "ids", "values", "tails")
    expected = (
        np.array([0], "<u4").tobytes()
        + np.array([1, 3, 0], "<u2").tobytes()
        + np.array([0, 0, -3], "<f2").tobytes()
    )
    assert record.tobytes()[:-4] == expected
    tail = math.log(math.exp(-6 / 2) + math.exp(-3.5 / 2))
    assert np.frombuffer(record.tobytes()[-4:], "<f4")[0] == pytest.approx(tail, abs=1e-6)
    half = np.array([4], "<f4").tobytes() + np.array([-3, 0, -6, 0, -3.5], "<f2").tobytes()
    assert encode(dense("float16", 5), z).tobytes()[4:] == half


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.lists(finite, min_size=4, max_size=4), min_size=1, max_size=5))
def test_float32_is_kept_bit_for_bit(rows: list[list[float]]) -> None:
    z = torch.tensor(rows, dtype=torch.float32)
    assert torch.equal(answered(dense("float32", 4), z).view(torch.int32), z.view(torch.int32))
    assert torch.equal(answered(dense("float32", 4), z, 3.0), z)  # any temperature


@given(
    seed=seeds,
    scale=st.sampled_from([1e-6, 0.01, 1.0, 30.0, 1e4]),
    offset=st.sampled_from([0.0, -7.0, 1e4]),
)
def test_the_error_of_float16(seed: int, scale: float, offset: float) -> None:
    z = gaussian(seed, scale=scale) + offset
    got = answered(dense("float16", 7), z)
    below = (z - z.amax(1, keepdim=True)).abs()
    assert torch.equal(got.amax(1), z.amax(1))  # the largest is exact
    assert torch.all(
        (got - z).abs() <= below * 2.0**-11 * 1.001 + 2.0**-24 + z.abs().amax() * 2.0**-23
    )


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_equal_logits_are_kept_as_they_are(kind: str) -> None:
    z = torch.tensor([[2.5] * 6, [-0.0] * 6, [1e-45] * 6, [-3e38] * 6])
    assert torch.equal(answered(dense(kind, 6), z), z)


def test_what_float16_cannot_reach_is_clamped() -> None:
    z = torch.tensor([[0.0, -1e9, 3.4e38], [-3.4e38, 3.4e38, 0.0], [5.0, -1e6, 4.0]])
    assert answered(dense("float16", 3), z)[2].tolist() == [5.0, -65499.0, 4.0]
    for encoding in (topk(3, 1), topk(3, 2, 0.001, 1000.0), topk(3, 3)):
        for t in encoding.temperatures:
            assert answered(encoding, z, t).isfinite().all()


@given(
    seed=seeds,
    k=st.integers(1, 11),
    ties=st.booleans(),
    temperatures=st.lists(st.sampled_from([0.25, 0.5, 1.0, 4.0, 10.0]), min_size=1, max_size=3),
)
def test_the_mass_of_the_tail_is_right_at_every_temperature(seed, k, ties, temperatures):
    z = gaussian(seed, classes=12, ties=ties)
    encoding, ids = topk(12, k, *temperatures), order(z)
    for t in temperatures:
        true, got = probabilities(z, t), probabilities(answered(encoding, z, t), t)
        # The tail is one number, spread evenly: its mass is exact though the head is rounded.
        tail = got.gather(1, ids[:, k:])
        mass = true.gather(1, ids[:, k:]).sum(1)
        torch.testing.assert_close(tail.sum(1), mass, rtol=2e-6, atol=1e-12)
        torch.testing.assert_close(tail, tail[:, :1].expand_as(tail))
        # The head is right to float16: each log-probability to its own and the sum's rounding.
        error = (got.gather(1, ids[:, :k]).log() - true.gather(1, ids[:, :k]).log()).abs()
        assert torch.all(error <= 2 * head_error(z, k, t)[:, None] + 2e-6)


@given(seed=seeds, classes=st.integers(1, 9), more=st.integers(0, 3))
def test_every_class_in_the_head_is_complete(seed: int, classes: int, more: int) -> None:
    z = gaussian(seed, classes=classes)
    encoding = topk(classes, classes + more, 2.0)
    assert encoding == topk(classes, classes, 2.0)
    assert encode(encoding, z).dtype.names == ("pixels", "ids", "values")
    for t in (None, 2.0, 7.0):
        got = answered(encoding, z, t)
        torch.testing.assert_close(got, z - z.amax(1, keepdim=True), rtol=2.0**-10, atol=1e-6)


@given(seed=seeds, k=st.integers(1, 9))
def test_of_equal_logits_the_smaller_class_is_first(seed: int, k: int) -> None:
    signed = torch.randint(-1, 2, (6, 9), generator=torch.Generator().manual_seed(seed)) * -1.0
    unsigned = torch.where(signed == 0, 0.0, signed)  # without the negative zeros
    assert encode(topk(9, k), signed)["ids"].tolist() == order(signed)[:, :k].tolist()
    for encoding in (topk(9, k), dense("float16", 9)):
        assert encode(encoding, signed).tobytes() == encode(encoding, unsigned).tobytes()


@pytest.mark.parametrize("classes", [2**16, 2**16 + 1])
def test_classes_beyond_16_bits(classes: int) -> None:
    z = gaussian(3, batch=2, classes=classes, scale=0.1)
    z[0, -1], z[1, 32_768] = 30.0, 20.0
    assert encode(topk(classes, 2), z)["ids"].dtype.itemsize == (2 if classes == 2**16 else 4)
    assert answered(topk(classes, 2), z).argmax(1).tolist() == [classes - 1, 32_768]


def test_an_undeclared_temperature_is_refused() -> None:
    z = gaussian(0, classes=9)
    assert torch.equal(answered(topk(9, 4, 3.0), z), answered(topk(9, 4, 3.0), z, 3.0))
    for wrong in (2.0, None):
        with pytest.raises(ConfigError) as caught:
            answered(topk(9, 4, 1.0, 4.0), z, wrong)
        assert caught.value.field == "temperatures"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kind": "uint8"}, "encoding"),
        ({"kind": "float16", "k": 3}, "encoding"),
        ({"kind": "float16", "temperatures": (1.0,)}, "encoding"),
        ({"kind": "topk", "k": 0, "temperatures": (1.0,)}, "k"),
        ({"kind": "topk", "k": 3}, "temperatures"),
        ({"kind": "topk", "k": 3, "temperatures": (0.0,)}, "temperatures"),
        ({"kind": "topk", "k": 3, "temperatures": (math.nan,)}, "temperatures"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LogitEncoding(num_classes=9, **settings)
    assert caught.value.field == field


@pytest.mark.parametrize("encoding", EVERY, ids=lambda e: f"{e.kind}-{e.k}")
def test_records_do_not_depend_on_their_batch(encoding: LogitEncoding) -> None:
    z = gaussian(8, batch=7, classes=5, ties=True)
    whole = encode(encoding, z)
    ones = [encode(encoding, z[i : i + 1]) for i in range(7)]
    for name in whole.dtype.names[1:]:
        assert np.array_equal(whole[name], np.concatenate([one[name] for one in ones]))
    some = np.array([3, 0, 6])
    assert torch.equal(read(encoding, whole[some]), read(encoding, whole)[torch.from_numpy(some)])
    assert read(encoding, whole[:0]).shape == (0, 5)
    never_written = np.zeros(2, whole.dtype)
    assert read(encoding, never_written).isfinite().all()


# -------------------------------------------------------------------------------------------------


def convert(source: LogitEncoding, records: Records, target: LogitEncoding) -> Records:
    return Layout(logits=source).convert(records, target)


@given(seed=seeds, k=st.integers(1, 12), fewer=st.integers(0, 11), ties=st.booleans())
def test_a_smaller_head_keeps_all_mass(seed: int, k: int, fewer: int, ties: bool) -> None:
    """And only the temperatures that are asked for."""
    z, temperatures = gaussian(seed, classes=12, ties=ties), (0.5, 4.0)
    kept = max(1, k - fewer)
    big, small = topk(12, k, 0.5, 1.0, 4.0), topk(12, kept, *temperatures)
    records, direct = encode(big, z), encode(small, z)
    cut = convert(big, records, small)
    assert cut.dtype == direct.dtype
    assert all(np.array_equal(cut[name], direct[name]) for name in ("pixels", "ids", "values"))
    ids = order(z)
    for t in temperatures:
        before, after = (
            probabilities(read(encoding, r, t), t) for encoding, r in ((big, records), (small, cut))
        )
        for place, reduce in ((ids[:, :kept], False), (ids[:, kept:], True)):
            a, b = after.gather(1, place), before.gather(1, place)
            a, b = (a.sum(1), b.sum(1)) if reduce else (a, b)
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("target", [dense("float16", 30), topk(30, 5, 1.0, 4.0), topk(30, 30)])
def test_complete_records_become_smaller_ones(target: LogitEncoding) -> None:
    z = gaussian(0, batch=20, classes=30)
    exact, half = dense("float32", 30), dense("float16", 30)
    assert convert(exact, encode(exact, z), target).tobytes() == encode(target, z).tobytes()
    made = convert(half, encode(half, z), target)
    shown = answered(half, z)  # rounded in float32, which conversion does without
    torch.testing.assert_close(
        read(target, made, 1.0), answered(target, shown, 1.0), rtol=2e-3, atol=1e-5
    )


@pytest.mark.parametrize(
    ("source", "target", "field"),
    [
        (topk(9, 4), topk(9, 5), "k"),
        (topk(9, 4), topk(9, 3, 2.0), "temperatures"),
        (topk(9, 4), dense("float16", 9), "encoding"),
        (dense("float16", 9), dense("float32", 9), "encoding"),
    ],
)
def test_what_is_not_there_cannot_be_made(source, target, field):
    with pytest.raises(ConfigError) as caught:
        convert(source, encode(source, gaussian(0, classes=9)), target)
    assert caught.value.field == field
