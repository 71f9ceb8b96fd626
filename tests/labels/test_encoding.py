"""Records of a teacher's answers: what they give back, whatever the logits, and what they
refuse.
"""

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitdistill import keyed
from vitdistill.errors import ConfigError, DataError
from vitdistill.labels.encoding import Layout, LogitEncoding, NonFinite, Records

DENSE = ("float32", "float16", "uint8")
seeds = st.integers(0, 10**6)


def gaussian(
    seed: int, batch: int = 3, classes: int = 7, scale: float = 3.0, ties: bool = False
) -> Tensor:
    z = scale * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))
    return z.round() if ties else z


def topk(classes: int, k: int, *temperatures: float) -> Layout:
    return Layout(
        logits=LogitEncoding(
            kind="topk", num_classes=classes, k=k, temperatures=temperatures or (1.0,)
        )
    )


def dense(kind: Any, classes: int) -> Layout:
    return Layout(logits=LogitEncoding(kind=kind, num_classes=classes))


def sampled(classes: int, k: int, temperature: float = 1.0) -> Layout:
    return Layout(
        logits=LogitEncoding(kind="sampled", num_classes=classes, k=k, temperatures=(temperature,))
    )


def encode(
    layout: Layout,
    logits: Tensor | None,
    hidden: dict[int, Tensor] | None = None,
    features: Tensor | None = None,
) -> Records:
    given = next(t for t in (logits, features, *(hidden or {}).values()) if t is not None)
    pixels = np.arange(len(given), dtype=np.uint32) + np.uint32(2**32 - len(given))
    keys = keyed.keys(0, 0, np.arange(len(given)), keyed.Stream.OBJECTIVE)
    return layout.encode(logits, hidden or {}, features, pixels, keys)


def answered(layout: Layout, logits: Tensor, temperature: float | None = None) -> Tensor:
    return layout.targets(encode(layout, logits)).logits(temperature)


def probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits.double() / temperature).softmax(-1)


def order(logits: Tensor) -> Tensor:
    """Ids by falling logit and then rising id, by Python's sort."""
    return torch.tensor(
        [sorted(range(len(row)), key=lambda i: (-row[i], i)) for row in logits.tolist()]
    )


def head_error(logits: Tensor, k: int, temperature: float) -> Tensor:
    """The most that float16 can move the log of the head's sum: the head's mean rounding error, and
    twice that for its single values.
    """
    head = logits.double().sort(dim=1, descending=True).values[:, :k]
    below = (head - head[:, :1]).abs()
    return (below * 2.0**-11 * 1.001 + 2.0**-25).amax(1) / temperature


# -------------------------------------------------------------------------------------------------


def test_the_size_of_a_record() -> None:
    assert topk(1000, 10).record_bytes == 4 + 44
    assert topk(1000, 10, 1.0, 4.0).record_bytes == 4 + 48
    assert topk(2**16, 10).record_bytes == 4 + 44
    assert topk(2**16 + 1, 10).record_bytes == 4 + 64
    assert sampled(1000, 12).record_bytes == 4 + 24
    assert dense("float32", 1000).record_bytes == 4 + 4000
    assert dense("float16", 1000).record_bytes == 4 + 2004
    assert dense("uint8", 1000).record_bytes == 4 + 1008
    assert Layout(
        hidden=((2, 5, 3), (4, 2, 2)), features=(5, 3), hidden_dtype="float32"
    ).record_bytes == 4 + 4 * (15 + 4 + 15)


def test_the_bytes_of_a_record() -> None:
    """Frozen: a store is read by every later version."""
    z = torch.tensor([[1.0, 4.0, -2.0, 4.0, 0.5]])
    dtype = topk(5, 3, 2.0).dtype
    assert dtype.names == ("pixels", "ids", "values", "tails")
    assert dtype["pixels"] == np.dtype("<u4") and dtype["tails"].base == np.dtype("<f4")
    tail = math.log(math.exp(-6 / 2) + math.exp(-3.5 / 2))
    expected = (
        np.array([2**32 - 1], "<u4").tobytes()
        + np.array([1, 3, 0], "<u2").tobytes()
        + np.array([0, 0, -3], "<f2").tobytes()
    )
    record = encode(topk(5, 3, 2.0), z).tobytes()
    assert record[:-4] == expected
    assert np.frombuffer(record[-4:], "<f4")[0] == pytest.approx(tail, abs=1e-6)
    assert (
        encode(dense("float16", 5), z).tobytes()[4:]
        == np.array([4], "<f4").tobytes() + np.array([-3, 0, -6, 0, -3.5], "<f2").tobytes()
    )
    steps, z[0, 0] = np.array([132, 255, 0, 255, 106], "u1").tobytes(), 1.1
    assert (
        encode(dense("uint8", 5), z).tobytes()[4:]
        == np.array([-2, 6 / 255], "<f4").tobytes() + steps
    )


layouts = st.builds(
    Layout,
    logits=st.sampled_from(
        [
            None,
            *(dense(kind, 9).logits for kind in DENSE),
            topk(9, 4, 1.0, 2.5).logits,
            sampled(9, 30, 0.7).logits,
        ]
    ),
    hidden=st.sampled_from([(), ((0, 3, 2),), ((2, 3, 2), (7, 1, 4))]),
    features=st.just((3, 2)),
    hidden_dtype=st.sampled_from(["float16", "float32"]),
)


@given(layouts)
def test_a_layout_survives_json_and_pickle(layout: Layout) -> None:
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout and again.dtype == layout.dtype and again.to_json() == layout.to_json()
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_equal_encodings_are_written_alike() -> None:
    assert topk(9, 4, 4, 1.0, 4.0).to_json() == topk(9, 4, 1, 4).to_json()
    assert topk(9, 12) == topk(9, 9)


GOOD = topk(9, 4).to_json()
NONSENSE: list[Any] = [
    None,
    [],
    "layout",
    {},
    {**GOOD, "surprise": 1},
    {name: value for name, value in GOOD.items() if name != "hidden"},
    {**GOOD, "logits": None},
    {**GOOD, "logits": "topk"},
    {**GOOD, "logits": {**GOOD["logits"], "kind": "zip"}},
    {**GOOD, "logits": {**GOOD["logits"], "kind": ["topk"]}},
    {**GOOD, "logits": {**GOOD["logits"], "k": 0}},
    {**GOOD, "logits": {**GOOD["logits"], "k": True}},
    {**GOOD, "logits": {**GOOD["logits"], "k": 4.0}},
    {**GOOD, "logits": {**GOOD["logits"], "num_classes": -1}},
    {**GOOD, "logits": {**GOOD["logits"], "num_classes": 2**40}},
    {**GOOD, "logits": {**GOOD["logits"], "temperatures": []}},
    {**GOOD, "logits": {**GOOD["logits"], "temperatures": None}},
    {**GOOD, "logits": {**GOOD["logits"], "temperatures": [0.0]}},
    {**GOOD, "logits": {**GOOD["logits"], "temperatures": [math.nan]}},
    {**GOOD, "logits": {**GOOD["logits"], "temperatures": ["1"]}},
    {**GOOD, "logits": {**GOOD["logits"], "more": 1}},
    {**GOOD, "logits": {"kind": "topk"}},
    {**GOOD, "hidden": [[1, 2]]},
    {**GOOD, "hidden": [[-1, 2, 2]]},
    {**GOOD, "hidden": [[1, 2, 0]]},
    {**GOOD, "hidden": [[1, 2, 2.5]]},
    {**GOOD, "hidden": [[1, 2, 2], [1, 2, 2]]},
    {**GOOD, "hidden": [[2, 2, 2], [1, 2, 2]]},
    {**GOOD, "hidden": "abc"},
    {**GOOD, "hidden": [[1, 2**20, 2**20]]},
    {**GOOD, "features": [1]},
    {**GOOD, "features": [0, 1]},
    {**GOOD, "features": 3},
    {**GOOD, "hidden_dtype": "bfloat16"},
    {**GOOD, "hidden_dtype": []},
]


@pytest.mark.parametrize("written", NONSENSE, ids=str)
def test_nonsense_is_no_layout(written: Any) -> None:
    with pytest.raises(DataError, match="layout of a label store cannot be read"):
        Layout.from_json(written)


def test_settings_that_do_not_fit_together() -> None:
    with pytest.raises(ConfigError, match="keeps every class at any temperature"):
        LogitEncoding(kind="float16", num_classes=9, k=3)
    with pytest.raises(ConfigError, match="keeps every class at any temperature"):
        LogitEncoding(kind="uint8", num_classes=9, temperatures=(1.0,))
    with pytest.raises(ConfigError, match="give at least one"):
        LogitEncoding(kind="topk", num_classes=9, k=3)
    with pytest.raises(ConfigError, match="drawn at one temperature, not at 1 and 2"):
        LogitEncoding(kind="sampled", num_classes=9, k=3, temperatures=(1.0, 2.0))
    with pytest.raises(ConfigError, match="holds nothing"):
        Layout()


# -------------------------------------------------------------------------------------------------

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


@given(
    seed=seeds,
    scale=st.sampled_from([1e-6, 0.01, 1.0, 30.0, 1e4, 1e30]),
    offset=st.sampled_from([0.0, -7.0, 1e4]),
)
def test_the_error_of_uint8_is_half_a_step(seed: int, scale: float, offset: float) -> None:
    z = gaussian(seed, classes=300, scale=scale) + offset
    records = encode(dense("uint8", 300), z)
    low, step = (
        torch.from_numpy(records[name].astype(np.float64))[:, None] for name in ("low", "step")
    )
    got = low + step * torch.from_numpy(records["values"].astype(np.float64))
    assert torch.all((got - z.double()).abs() <= step * 0.5 * (1 + 1e-12))
    assert torch.all(step <= (z.amax(1) - z.amin(1)).double()[:, None] / 255 * (1 + 1e-6) + 1e-44)
    rounding = z.abs().amax() * 2.0**-22
    assert torch.all(
        (dense("uint8", 300).targets(records).logits() - z).abs() <= step * 0.5 + rounding
    )


@pytest.mark.parametrize("kind", DENSE)
def test_equal_logits_are_kept_as_they_are(kind: str) -> None:
    z = torch.tensor([[2.5] * 6, [-0.0] * 6, [1e-45] * 6, [-3e38] * 6])
    assert torch.equal(answered(dense(kind, 6), z), z)


def test_what_float16_cannot_reach_is_clamped() -> None:
    z = torch.tensor([[0.0, -1e9, 3.4e38], [-3.4e38, 3.4e38, 0.0], [5.0, -1e6, 4.0]])
    assert answered(dense("float16", 3), z)[2].tolist() == [5.0, -65499.0, 4.0]
    for layout in (
        dense("float16", 3),
        topk(3, 1),
        topk(3, 2, 0.001, 1000.0),
        topk(3, 3),
        sampled(3, 4, 1000.0),
    ):
        temperatures = layout.logits.temperatures if layout.logits is not None else ()
        for t in temperatures or (1.0,):
            assert answered(layout, z, t).isfinite().all()


# -------------------------------------------------------------------------------------------------


@given(
    seed=seeds,
    k=st.integers(1, 11),
    ties=st.booleans(),
    temperatures=st.lists(
        st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0, 10.0]), min_size=1, max_size=3
    ),
)
def test_the_mass_of_the_tail_is_right_at_every_temperature(
    seed: int, k: int, ties: bool, temperatures: list[float]
) -> None:
    z = gaussian(seed, classes=12, ties=ties)
    layout, ids = topk(12, k, *temperatures), order(z)
    targets = layout.targets(encode(layout, z))
    for t in temperatures:
        true, got = probabilities(z, t), probabilities(targets.logits(t), t)
        torch.testing.assert_close(
            got.sum(1), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0
        )
        # The tail is one number, spread evenly: its mass is exact though the head is rounded.
        tail = got.gather(1, ids[:, k:])
        torch.testing.assert_close(
            tail.sum(1), true.gather(1, ids[:, k:]).sum(1), rtol=2e-6, atol=1e-12
        )
        torch.testing.assert_close(tail, tail[:, :1].expand_as(tail))
        # The head is right to float16: each log-probability to its own rounding and the
        # normaliser's.
        error = (got.gather(1, ids[:, :k]).log() - true.gather(1, ids[:, :k]).log()).abs()
        assert torch.all(error <= 2 * head_error(z, k, t)[:, None] + 2e-6)


@given(seed=seeds, classes=st.integers(1, 9), more=st.integers(0, 3))
def test_every_class_in_the_head_is_dense_in_disguise(seed: int, classes: int, more: int) -> None:
    z = gaussian(seed, classes=classes)
    layout = topk(classes, classes + more, 2.0)
    assert layout.dtype.names == ("pixels", "ids", "values")
    for t in (None, 2.0, 7.0):
        got = answered(layout, z, t)
        assert got.isfinite().all()
        torch.testing.assert_close(got, z - z.amax(1, keepdim=True), rtol=2.0**-10, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 10, 99, 100])
@pytest.mark.parametrize("confidence", [4.0, 9.2, 20.0, 100.0, 60000.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_confident_answers(k: int, confidence: float, temperature: float) -> None:
    """float16 probabilities would sum above 1 here, and leave a negative tail: NaN in
    `F.kl_div`.
    """
    z = gaussian(1, batch=64, classes=100, scale=0.5)
    z[torch.arange(64), torch.arange(64)] += confidence + torch.linspace(0, 5, 64)
    layout = topk(100, k, temperature)
    got = answered(layout, z, temperature)
    assert got.isfinite().all()
    teacher = (got / temperature).softmax(-1)
    assert (teacher >= 0).all() and (teacher.sum(1) - 1).abs().max() <= 1e-6
    student = gaussian(2, batch=64, classes=100).requires_grad_()
    log_student = (student / temperature).log_softmax(-1)
    loss = F.kl_div(log_student, teacher, reduction="batchmean")
    other = F.kl_div(
        log_student, (got / temperature).log_softmax(-1), reduction="batchmean", log_target=True
    )
    (loss + other).backward()
    assert (
        loss.isfinite()
        and other.item() == pytest.approx(loss.item(), rel=1e-4)
        and student.grad is not None
    )
    assert student.grad.isfinite().all()
    true = probabilities(z, temperature).amax(1)
    torch.testing.assert_close(teacher.amax(1).double(), true, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        1 - probabilities(got, temperature).amax(1), 1 - true, rtol=0.05, atol=1e-9
    )


def test_an_answer_of_four_nines_by_hand() -> None:
    p = torch.full((1, 1000), 1e-4 / 999, dtype=torch.float64)
    p[0, 123] = 0.9999
    got = probabilities(answered(topk(1000, 1), p.log().float()))
    assert got[0, 123].item() == pytest.approx(0.9999, abs=1e-9)
    assert (1 - got[0, 123]).item() == pytest.approx(1e-4, rel=1e-5)


@given(seed=seeds, k=st.integers(1, 9))
def test_of_equal_logits_the_smaller_class_is_first(seed: int, k: int) -> None:
    z = (
        torch.randint(-1, 2, (6, 9), generator=torch.Generator().manual_seed(seed)).float() * -1.0
    )  # with negative zeros
    records = encode(topk(9, k), z)
    assert records["ids"].tolist() == order(z)[:, :k].tolist()
    assert records.tobytes() == encode(topk(9, k), torch.where(z == 0, 0.0, z)).tobytes()
    for kind in ("float16", "uint8"):
        assert (
            encode(dense(kind, 9), z).tobytes()
            == encode(dense(kind, 9), torch.where(z == 0, 0.0, z)).tobytes()
        )
    alike = torch.zeros(2, 9)
    assert encode(topk(9, k), alike)["ids"].tolist() == [list(range(k))] * 2


@pytest.mark.parametrize("place", [32_767, 32_768, 65_535, 65_536, 69_999])
def test_70_000_classes(place: int) -> None:
    z = gaussian(3, batch=2, classes=70_000, scale=0.1)
    z[0, place], z[1, place], z[1, 5] = 30.0, 20.0, 21.0
    targets = topk(70_000, 3).targets(encode(topk(70_000, 3), z))
    got = targets.logits()
    assert got[0].argmax() == place and got[1].topk(2).indices.tolist() == [5, place]
    drawn = answered(sampled(70_000, 5), z)
    assert drawn[0].argmax() == place and (drawn[0] > -1e3).sum() == 1
    true, ids = probabilities(z), order(z[:1])[0]
    torch.testing.assert_close(
        probabilities(got)[0, ids[3:]].sum(), true[0, ids[3:]].sum(), rtol=2e-6, atol=0
    )


def test_the_largest_id_that_16_bits_hold() -> None:
    z = torch.zeros(1, 2**16)
    z[0, 65_535] = 50.0
    assert topk(2**16, 1).dtype["ids"].base == np.dtype("<u2")
    assert answered(topk(2**16, 1), z)[0].argmax() == 65_535


def test_an_undeclared_temperature_is_refused() -> None:
    targets = topk(9, 4, 1.0, 4.0).targets(encode(topk(9, 4, 1.0, 4.0), gaussian(0, classes=9)))
    assert targets.logits(4).shape == (3, 9)
    with pytest.raises(
        ConfigError, match=r"of temperature 1 and 4, not of 2: use a stored one, or label again"
    ):
        targets.logits(2.0)
    with pytest.raises(ConfigError, match="several temperatures \\(1 and 4\\): say which"):
        targets.logits()
    drawn = sampled(9, 4, 2.0).targets(encode(sampled(9, 4, 2.0), gaussian(0, classes=9)))
    assert torch.equal(drawn.logits(), drawn.logits(2.0))
    with pytest.raises(ConfigError, match="of temperature 2, not of 1"):
        drawn.logits(1.0)


# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_draws_are_unbiased(temperature: float) -> None:
    """The mean over 4000 keys of 8 draws: 32,000 draws, within five standard errors of each class's
    probability.
    """
    z, layout = gaussian(5, batch=1, classes=10, scale=1.5), sampled(10, 8, temperature)
    keys = keyed.keys(1, 2, np.arange(4000), keyed.Stream.OBJECTIVE)
    records = layout.encode(z.expand(4000, 10), {}, None, np.zeros(4000, np.uint32), keys)
    mean = probabilities(layout.targets(records).logits(), temperature).mean(0)
    true = probabilities(z, temperature)[0]
    assert torch.all((mean - true).abs() <= 5 * (true * (1 - true) / 32_000).sqrt())
    other = probabilities(z, 2.0)[0]
    assert not torch.all(
        (mean - other).abs() <= 5 * (other * (1 - other) / 32_000).sqrt()
    )  # the bound is not empty


@given(seed=seeds, k=st.integers(1, 40), temperature=st.sampled_from([0.1, 1.0, 4.0, 1000.0]))
def test_draws_are_counted_exactly(seed: int, k: int, temperature: float) -> None:
    layout = sampled(6, k, temperature)
    records = encode(layout, gaussian(seed, classes=6))
    got = layout.targets(records).logits(temperature)
    counts = torch.stack(
        [
            torch.bincount(torch.from_numpy(ids.astype(np.int64)), minlength=6)
            for ids in records["ids"]
        ]
    )
    assert got.isfinite().all()
    shown = (got / temperature).softmax(-1)
    torch.testing.assert_close(shown, counts / k, rtol=0, atol=1e-6)
    assert torch.all(shown[counts == 0] == 0)
    assert F.kl_div(
        gaussian(seed + 1, classes=6).log_softmax(-1), shown, reduction="batchmean"
    ).isfinite()


def test_a_class_without_probability_is_never_drawn() -> None:
    z = torch.full((2000, 5), -60000.0)
    z[:, 2] = 0.0
    assert set(encode(sampled(5, 20), z)["ids"].ravel().tolist()) == {2}
    zero = np.array(
        [2**64 - 0x9E3779B97F4A7C15], np.uint64
    )  # the key whose first number is exactly 0
    assert keyed.uniforms(zero, 1).item() == 0.0
    assert sampled(5, 1).encode(z[:1], {}, None, np.zeros(1, np.uint32), zero)["ids"].tolist() == [
        [2]
    ]


@given(seed=seeds, classes=st.integers(1, 40))
def test_the_largest_number_there_is_draws_a_class(seed: int, classes: int) -> None:
    key = np.array([_unmixed(2**64 - 1) - 0x9E3779B97F4A7C15 & 2**64 - 1], np.uint64)
    assert keyed.uniforms(key, 1).item() == 1 - 2.0**-53
    z = torch.cat(
        [gaussian(seed, 1, classes), torch.full((1, 3), -60000.0)], 1
    )  # the last three are never drawn
    drawn = sampled(classes + 3, 1).encode(z, {}, None, np.zeros(1, np.uint32), key)["ids"].item()
    assert drawn < classes


def _unmixed(x: int) -> int:
    """The inverse of SplitMix64's mixing function."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        x = x ^ (x >> shift) ^ (x >> 2 * shift)
        x = x * pow(factor, -1, 2**64) % 2**64
    return x


def test_draws_depend_on_their_key_alone() -> None:
    z, layout = gaussian(4, batch=6, classes=50, scale=1.0), sampled(50, 9)
    keys, pixels = keyed.keys(0, 1, np.arange(6), keyed.Stream.OBJECTIVE), np.zeros(6, np.uint32)
    whole = layout.encode(z, {}, None, pixels, keys)
    parts = [
        layout.encode(z[i : i + 2], {}, None, pixels[i : i + 2], keys[i : i + 2]) for i in (0, 2, 4)
    ]
    assert whole.tobytes() == b"".join(part.tobytes() for part in parts)
    assert (
        whole.tobytes()
        != layout.encode(
            z, {}, None, pixels, keyed.keys(0, 2, np.arange(6), keyed.Stream.OBJECTIVE)
        ).tobytes()
    )


# -------------------------------------------------------------------------------------------------

EVERY = [*(dense(kind, 5) for kind in DENSE), topk(5, 2), topk(5, 5), sampled(5, 4)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "layout", EVERY, ids=lambda layout: f"{layout.logits.kind}-{layout.logits.k}"
)
def test_answers_that_are_not_finite_are_refused_by_row(layout: Layout, bad: float) -> None:
    z = gaussian(0, batch=6, classes=5)
    encode(layout, z)
    z[2, 4] = z[5, 0] = bad
    with pytest.raises(
        NonFinite, match="logits are not finite numbers of float32 in row 2"
    ) as caught:
        encode(layout, z)
    assert caught.value.index == 2


def test_hidden_states_that_are_not_finite_or_do_not_fit_are_refused_by_row() -> None:
    layout = Layout(logits=dense("float32", 5).logits, hidden=((1, 2, 3),), features=(2, 3))
    z, hidden, features = (
        gaussian(0, batch=4, classes=5),
        torch.zeros(4, 2, 3),
        torch.zeros(4, 2, 3),
    )
    features[3, 1, 1], hidden[1, 0, 2] = math.nan, 70000.0
    with pytest.raises(
        NonFinite, match="hidden_1 are not finite numbers of float16 in row 1"
    ) as caught:
        encode(layout, z, {1: hidden}, features)
    assert caught.value.index == 1
    z[2, 0] = math.inf
    with pytest.raises(NonFinite, match="hidden_1 are not finite numbers of float16 in row 1"):
        encode(layout, z, {1: hidden}, features)
    z[0, 0] = math.inf
    with pytest.raises(NonFinite, match=r"logits .* in row 0"):
        encode(layout, z, {1: hidden}, features)


def test_answers_of_another_shape_are_refused() -> None:
    layout = Layout(logits=dense("float32", 5).logits, hidden=((1, 2, 3),))
    z, hidden = gaussian(0, classes=5), {1: torch.zeros(3, 2, 3)}
    for logits, states in (
        (None, hidden),
        (z[:, :4], hidden),
        (z, {}),
        (z, {0: hidden[1]}),
        (z, {1: torch.zeros(3, 3, 2)}),
    ):
        with pytest.raises(ValueError, match="the layout of the label store has"):
            layout.encode(logits, states, None, np.zeros(3, np.uint32), np.zeros(3, np.uint64))
    with pytest.raises(ValueError, match="not a batch"):
        layout.targets(encode(dense("float16", 5), z))


def test_a_damaged_class_id_is_not_used() -> None:
    for layout in (topk(9, 2), sampled(9, 2)):
        records = encode(layout, gaussian(0, classes=9))
        records["ids"][1, 0] = 9
        with pytest.raises(DataError, match="a class beyond the 9 there are"):
            layout.targets(records)


# -------------------------------------------------------------------------------------------- hidd


@given(seed=seeds, number=st.sampled_from(["float16", "float32"]), logits=st.booleans())
def test_hidden_states_and_features_come_back(seed: int, number: Any, logits: bool) -> None:
    layout = Layout(
        logits=topk(7, 3).logits if logits else None,
        hidden=((0, 2, 3), (4, 5, 1)),
        features=(2, 3),
        hidden_dtype=number,
    )
    g = torch.Generator().manual_seed(seed)
    hidden = {
        4: torch.randn(3, 5, 1, generator=g),
        0: torch.randn(3, 2, 3, generator=g),
        9: torch.zeros(3, 1, 1),
    }
    features = torch.randn(3, 2, 3, generator=g) * 100
    targets = layout.targets(encode(layout, gaussian(seed), hidden, features))
    assert list(targets.hidden) == [0, 4] and targets.features is not None
    for got, true in (
        (targets.features, features),
        *((targets.hidden[i], hidden[i]) for i in (0, 4)),
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, true if number == "float32" else true.half().float())
    if not logits:
        with pytest.raises(ConfigError, match="holds no logits"):
            targets.logits()


def test_targets_move_and_keep_their_pixels() -> None:
    layout = topk(7, 3)
    targets = layout.targets(encode(layout, gaussian(0)))
    assert targets.pixels.tolist() == [2**32 - 3, 2**32 - 2, 2**32 - 1]
    assert targets.features is None and targets.hidden == {} and len(targets) == 3
    assert torch.equal(targets.to("cpu", non_blocking=True).logits(), targets.logits())
    assert targets.to("meta").logits().device.type == "meta"  # nothing is decoded on the host


@pytest.mark.parametrize(
    "layout", EVERY, ids=lambda layout: f"{layout.logits.kind}-{layout.logits.k}"
)
def test_records_do_not_depend_on_their_batch(layout: Layout) -> None:
    z = gaussian(8, batch=7, classes=5, ties=True)
    keys, pixels = (
        keyed.keys(0, 1, np.arange(7), keyed.Stream.OBJECTIVE),
        np.arange(7, dtype=np.uint32),
    )
    whole = layout.encode(z, {}, None, pixels, keys)
    ones = [
        layout.encode(z[i : i + 1], {}, None, pixels[i : i + 1], keys[i : i + 1]) for i in range(7)
    ]
    assert whole.tobytes() == b"".join(one.tobytes() for one in ones)
    swapped = np.array([3, 0, 6])
    assert torch.equal(
        layout.targets(whole[swapped]).logits(),
        layout.targets(whole).logits()[torch.from_numpy(swapped)],
    )
    assert (
        layout.targets(whole[:0]).logits().shape == (0, 5)
        and len(layout.encode(z[:0], {}, None, pixels[:0], keys[:0])) == 0
    )
    assert (
        layout.targets(np.zeros(2, layout.dtype)).logits().isfinite().all()
    )  # rows that were never written


def test_half_precision_answers_are_taken_as_they_are() -> None:
    z = gaussian(2, classes=5).bfloat16()
    assert torch.equal(answered(dense("float32", 5), z), z.float())
    assert torch.equal(answered(topk(5, 2), z), answered(topk(5, 2), z.float()))
    answered(dense("float32", 5), z.float().requires_grad_())


# -------------------------------------------------------------------------------------------------


@given(seed=seeds, k=st.integers(1, 12), fewer=st.integers(0, 11), ties=st.booleans())
def test_a_pruned_head_keeps_all_mass(seed: int, k: int, fewer: int, ties: bool) -> None:
    z, temperatures = gaussian(seed, classes=12, ties=ties), (0.5, 1.0, 4.0)
    big = topk(12, k, *temperatures)
    small = big.prune(max(1, k - fewer))
    records = encode(big, z)
    cut = big.convert(records, small)
    assert cut.dtype == small.dtype and np.array_equal(cut["pixels"], records["pixels"])
    kept = small.logits.k if small.logits is not None else 0
    direct = encode(small, z)
    assert np.array_equal(cut["ids"], direct["ids"]) and np.array_equal(
        cut["values"], direct["values"]
    )
    for t in temperatures:
        before, after = (
            probabilities(layout.targets(r).logits(t), t)
            for layout, r in ((big, records), (small, cut))
        )
        ids = order(z)
        torch.testing.assert_close(
            after.gather(1, ids[:, :kept]), before.gather(1, ids[:, :kept]), rtol=2e-6, atol=1e-12
        )
        torch.testing.assert_close(
            after.gather(1, ids[:, kept:]).sum(1),
            before.gather(1, ids[:, kept:]).sum(1),
            rtol=2e-6,
            atol=1e-12,
        )
        true = probabilities(z, t).gather(1, ids[:, kept:]).sum(1)
        assert torch.all(
            (after.gather(1, ids[:, kept:]).sum(1) - true).abs()
            <= true * (2 * head_error(z, k, t) + 2e-6)
        )


def test_pruning_twice_is_pruning_once() -> None:
    z, big = gaussian(0, batch=20, classes=30), topk(30, 12, 1.0, 4.0)
    records = encode(big, z)
    twice = big.prune(7).convert(big.convert(records, big.prune(7)), big.prune(3))
    once = big.convert(records, big.prune(3))
    assert np.array_equal(twice["ids"], once["ids"])
    np.testing.assert_allclose(twice["tails"], once["tails"], rtol=1e-6, atol=1e-6)
    one = big.convert(records, topk(30, 3, 4.0))
    assert np.array_equal(one["tails"][:, 0], once["tails"][:, 1])


@pytest.mark.parametrize("source", DENSE)
def test_dense_records_become_smaller_ones(source: str) -> None:
    z = gaussian(0, batch=20, classes=30)
    ours = dense(source, 30)
    records = encode(ours, z)
    shown = ours.targets(records).logits()
    for other in (
        dense("float16", 30),
        dense("uint8", 30),
        topk(30, 5, 1.0, 4.0),
        topk(30, 30),
        ours,
    ):
        kind = other.logits.kind if other.logits is not None else ""
        if source == "uint8" and kind == "float16":
            continue
        made = ours.convert(records, other)
        if source == "float32" or kind == source:
            assert made.tobytes() == encode(other, z).tobytes()
        elif kind == "topk":  # by rounding of the logits in float32, which conversion does without
            torch.testing.assert_close(
                other.targets(made).logits(1.0), answered(other, shown, 1.0), rtol=2e-3, atol=1e-5
            )
        else:
            step = torch.from_numpy(made["step"].copy())[:, None]
            assert torch.all((other.targets(made).logits() - shown).abs() <= step * 0.5 + 1e-5)


def test_fewer_draws_are_the_first_ones() -> None:
    z, big = gaussian(0, batch=20, classes=30), sampled(30, 12)
    assert big.convert(encode(big, z), big.prune(5)).tobytes() == encode(big.prune(5), z).tobytes()


def test_parts_of_a_record_can_be_left_out() -> None:
    big = Layout(
        logits=dense("float32", 7).logits,
        hidden=((0, 2, 3), (4, 5, 1)),
        features=(2, 3),
        hidden_dtype="float32",
    )
    g = torch.Generator().manual_seed(0)
    hidden, features = (
        {
            0: torch.randn(3, 2, 3, generator=g),
            4: torch.randn(3, 5, 1, generator=g),
        },
        torch.randn(3, 2, 3, generator=g),
    )
    records = encode(big, gaussian(0), hidden, features)
    for small in (
        Layout(logits=topk(7, 2).logits),
        Layout(hidden=((4, 5, 1),)),
        Layout(features=(2, 3), hidden_dtype="float32"),
        Layout(logits=dense("uint8", 7).logits, hidden=((0, 2, 3), (4, 5, 1)), features=(2, 3)),
    ):
        assert (
            big.convert(records, small).tobytes()
            == encode(small, gaussian(0), hidden, features).tobytes()
        )
    hidden[4][2] = 1e6
    with pytest.raises(NonFinite, match="hidden_4 are not finite numbers of float16 in row 2"):
        big.convert(encode(big, gaussian(0), hidden, features), Layout(hidden=((4, 5, 1),)))


def test_what_is_not_there_cannot_be_made() -> None:
    states = Layout(hidden=((1, 2, 3),))
    refused = [
        (topk(9, 4), topk(9, 5), "k 4, which cannot become 5"),
        (topk(9, 4), topk(9, 3, 2.0), "of temperature 1, not of 2"),
        (topk(9, 4), topk(8, 3), "of 9 classes and cannot become 8"),
        (topk(9, 4), dense("uint8", 9), "stored as topk cannot become uint8"),
        (topk(9, 4), sampled(9, 4), "stored as topk cannot become sampled"),
        (sampled(9, 4), topk(9, 4), "stored as sampled cannot become topk"),
        (sampled(9, 4), sampled(9, 4, 2.0), "of temperature 1, not of 2"),
        (sampled(9, 4), sampled(9, 5), "k 4, which cannot become 5"),
        (dense("float32", 9), sampled(9, 4), "stored as float32 cannot become sampled"),
        (dense("uint8", 9), dense("float16", 9), "gain nothing as float16"),
        (dense("float16", 9), dense("float32", 9), "gain nothing as float32"),
        (states, topk(9, 4), "holds no logits"),
        (topk(9, 4), states, "hidden_1 of None, not of"),
        (states, Layout(hidden=((1, 3, 2),)), "keep it as it is, or leave it out"),
        (states, Layout(hidden=((1, 2, 3),), hidden_dtype="float32"), "float32 would add nothing"),
    ]
    for ours, other, sentence in refused:
        with pytest.raises(ConfigError, match=sentence):
            ours.convert(np.zeros(1, ours.dtype), other)
    for layout, k in ((dense("float32", 9), 3), (states, 3), (topk(9, 4), 5), (topk(9, 4), 0)):
        with pytest.raises(ConfigError):
            layout.prune(k)
