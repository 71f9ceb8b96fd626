"""Keyed numbers: frozen, equal in numpy and torch, uniform, independent of the company."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitdistill import keyed
from vitdistill.keyed import Stream

WORDS = st.integers(-(2**63), 2**63 - 1)


def test_bits_are_splitmix64() -> None:
    """The first outputs of the published generator from state 1234567 (Vigna's splitmix64.c)."""
    got = keyed.bits(np.array([1234567], dtype=np.uint64), np.arange(5))
    assert got.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_vectors_are_frozen() -> None:
    """These values may never change: stored labels and resumed runs rest on them."""
    ids = np.array([0, 1, 2**40], dtype=np.int64)
    got = keyed.keys(7, np.array([0, 3, 5], dtype=np.int64), ids, Stream.CROP)
    assert got.tolist() == [3827544751006511609, 13285345916972662703, 24369918317814308]
    assert keyed.uniforms(got, 2).tolist() == [
        [0.5836614568354661, 0.7105363300174491],
        [0.9609784181460005, 0.9055100151110584],
        [0.26092825322636326, 0.7313736493701295],
    ]
    assert keyed.permutation(7, 2, 10).tolist() == [3, 6, 0, 5, 8, 1, 9, 7, 4, 2]
    assert keyed.library_seeds(7, 2, 3) == [9187612033851577075]


@given(state=st.lists(WORDS, min_size=1, max_size=8), index=st.integers(0, 2**62))
def test_torch_gives_the_same_bits(state: list[int], index: int) -> None:
    words = np.array(state, dtype=np.int64)
    ours = keyed.bits(words.view(np.uint64), np.full(len(words), index, dtype=np.int64))
    theirs = keyed.torch_bits(
        torch.from_numpy(words), torch.full((len(words),), index, dtype=torch.int64)
    )
    assert ours.view(np.int64).tolist() == theirs.tolist()
    assert keyed.to_torch(ours).tolist() == theirs.tolist()


SEEDS = st.one_of(
    WORDS, st.sampled_from([0, -1, 2**32, 2**32 + 1, 2**63, 2**64 - 1, 2**64 + 5, -(2**70)])
)


@given(
    seed=SEEDS,
    addresses=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8),
    stream=st.sampled_from(Stream),
)
def test_torch_gives_the_same_keys(seed, addresses, stream):
    views, ids = np.array(addresses, dtype=np.int64).T
    ours = keyed.keys(seed, views, ids, stream)
    theirs = keyed.torch_keys(
        seed, torch.from_numpy(views.copy()), torch.from_numpy(ids.copy()), stream
    )
    assert theirs.dtype is torch.int64 and ours.view(np.int64).tolist() == theirs.tolist()


@given(state=st.lists(WORDS, min_size=1, max_size=8), count=st.integers(0, 40))
def test_torch_uniforms_are_the_first_24_bits(state: list[int], count: int) -> None:
    words = np.array(state, dtype=np.int64)
    ours = keyed.bits(words.view(np.uint64)[:, None], np.arange(count)[None]) >> np.uint64(40)
    numbers = keyed.torch_uniforms(torch.from_numpy(words), count)
    assert numbers.dtype is torch.float32 and numbers.shape == (len(state), count)
    assert (numbers.double() * 2**24).tolist() == ours.astype(np.float64).tolist()
    assert bool(((numbers >= 0) & (numbers < 1)).all())
    whole = keyed.uniforms(words.view(np.uint64), count)  # the same numbers with more digits
    assert count == 0 or (np.abs(whole - numbers.double().numpy()) < 2.0**-24).all()


def test_torch_keys_are_traced_without_a_graph_break() -> None:
    views, ids = torch.arange(5), torch.arange(5) + 2**40
    torch.compiler.reset()

    def draw(views: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return keyed.torch_uniforms(keyed.torch_keys(-7, views, ids, Stream.PATCHES), 3)

    compiled = torch.compile(draw, fullgraph=True, backend="eager")
    assert torch.equal(compiled(views, ids), draw(views, ids))


@given(seed=WORDS, view=WORDS, sample=WORDS)
def test_every_part_of_the_address_counts(seed: int, view: int, sample: int) -> None:
    def key(seed: int, view: int, sample: int, stream: Stream) -> int:
        return int(keyed.keys(seed, view, sample, stream)[0])

    base = key(seed, view, sample, Stream.CROP)
    others = {key(seed ^ 1, view, sample, Stream.CROP), key(seed, view ^ 1, sample, Stream.CROP)}
    others |= {key(seed, view, sample ^ 1, Stream.CROP), key(seed, view, sample, Stream.FLIP)}
    assert len(others | {base}) == 5
    assert 0 <= keyed.library_seeds(seed, view, sample)[0] < 2**63


def test_a_sample_does_not_depend_on_its_company() -> None:
    ids = np.arange(100, dtype=np.int64)
    together = keyed.uniforms(keyed.keys(1, 2, ids, Stream.CROP), 6)
    alone = np.concatenate([keyed.uniforms(keyed.keys(1, 2, int(i), Stream.CROP), 6) for i in ids])
    assert np.array_equal(together, alone)
    assert np.array_equal(
        together[:, 2:5], keyed.uniforms(keyed.keys(1, 2, ids, Stream.CROP), 3, start=2)
    )


def test_numbers_are_uniform_and_uncorrelated() -> None:
    u = keyed.uniforms(keyed.keys(0, 0, np.arange(20000, dtype=np.int64), Stream.CROP), 4)
    assert u.min() >= 0.0 and u.max() < 1.0
    counts, expected = np.histogram(u, bins=64, range=(0, 1))[0], u.size / 64
    # Chi-squared, 63 degrees of freedom: p = 0.0002.
    assert ((counts - expected) ** 2 / expected).sum() < 110
    assert np.abs(np.corrcoef(u, rowvar=False) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize("where", ["numpy", "torch"])
def test_normals_are_normal(where: str) -> None:
    keys = keyed.keys(0, 0, np.arange(50000, dtype=np.int64), Stream.ERASE_NOISE)
    if where == "numpy":
        z = keyed.normals(keys, 2)
    else:
        words = keyed.to_torch(keys)[:, None].expand(-1, 2)
        z = keyed.torch_normals(words, torch.arange(2).expand_as(words)).double().numpy()
    assert np.isfinite(z).all()
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert abs((np.abs(z) > 1.959964).mean() - 0.05) < 0.003 and abs((z**4).mean() - 3) < 0.15
