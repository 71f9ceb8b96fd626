"""Keyed numbers: frozen, equal in numpy and torch, uniform, independent of the company."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitdistill import keyed
from vitdistill.keyed import Stream

WORDS = st.integers(-(2**63), 2**63 - 1)
ADDRESSES = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8)
SEEDS = st.one_of(WORDS, st.sampled_from([0, -1, 2**32, 2**63, 2**64 - 1, 2**64 + 5, -(2**70)]))
IDS = np.arange(50000, dtype=np.int64)


def test_bits_are_splitmix64() -> None:
    """The first outputs of the published generator from state 1234567 (Vigna's splitmix64.c)."""
    got = keyed.bits(np.array([1234567], dtype=np.uint64), np.arange(3))
    assert got.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


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
    normals = [[-0.32489911890057777], [2.111162757865161], [-0.09080152768986377]]
    assert keyed.normals(got, 1) == pytest.approx(np.array(normals), abs=1e-12)
    assert keyed.permutation(7, 2, 10).tolist() == [3, 6, 0, 5, 8, 1, 9, 7, 4, 2]
    assert keyed.library_seeds(7, 2, 3) == [9187612033851577075]


@given(SEEDS, ADDRESSES, st.sampled_from(Stream), st.integers(0, 2**62), st.integers(0, 40))
def test_torch_gives_the_same_numbers(seed, addresses, stream, index, count) -> None:
    views, ids = np.array(addresses, dtype=np.int64).T
    ours = keyed.keys(seed, views, ids, stream)
    theirs = keyed.torch_keys(
        seed, torch.from_numpy(views.copy()), torch.from_numpy(ids.copy()), stream
    )
    assert theirs.dtype is torch.int64 and ours.view(np.int64).tolist() == theirs.tolist()
    assert keyed.to_torch(ours).tolist() == theirs.tolist()
    bits = keyed.torch_bits(theirs, torch.full_like(theirs, index))
    assert keyed.bits(ours, index).view(np.int64).tolist() == bits.tolist()
    numbers = keyed.torch_uniforms(theirs, count)  # the first 24 bits of the others
    whole = np.floor(keyed.uniforms(ours, count) * 2**24)
    assert numbers.dtype is torch.float32 and numbers.shape == (len(ids), count)
    assert (numbers.double() * 2**24).tolist() == whole.tolist()


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
    together = keyed.uniforms(keyed.keys(1, 2, IDS[:100], Stream.CROP), 6)
    alone = [keyed.uniforms(keyed.keys(1, 2, i, Stream.CROP), 3, start=2) for i in range(100)]
    assert np.array_equal(together[:, 2:5], np.concatenate(alone))


def test_numbers_are_uniform_and_uncorrelated() -> None:
    u = keyed.uniforms(keyed.keys(0, 0, IDS[:20000], Stream.CROP), 4)
    assert u.min() >= 0.0 and u.max() < 1.0
    counts, expected = np.histogram(u, bins=64, range=(0, 1))[0], u.size / 64
    # Chi-squared, 63 degrees of freedom: p = 0.0002.
    assert ((counts - expected) ** 2 / expected).sum() < 110
    assert np.abs(np.corrcoef(u, rowvar=False) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize("where", ["numpy", "torch"])
def test_normals_are_normal(where: str) -> None:
    keys = keyed.keys(0, 0, IDS, Stream.ERASE_NOISE)
    words = keyed.to_torch(keys)[:, None].expand(-1, 2)
    in_torch = keyed.torch_normals(words, torch.arange(2).expand_as(words)).double().numpy()
    z = keyed.normals(keys, 2) if where == "numpy" else in_torch
    assert np.isfinite(z).all() and abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert abs((np.abs(z) > 1.959964).mean() - 0.05) < 0.003 and abs((z**4).mean() - 3) < 0.15
