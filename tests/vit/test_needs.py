"""Needs are sets: united, resolved, counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitdistill.vit.needs import Needs

needs = st.builds(
    Needs,
    logits=st.booleans(),
    hidden=st.frozensets(st.integers(-4, 3)),
    attention=st.frozensets(st.integers(-4, 3)),
    qkv=st.frozensets(st.integers(-4, 3)),
    features=st.booleans(),
)


@given(needs, needs)
def test_union_asks_for_what_either_asks(a: Needs, b: Needs) -> None:
    union = a | b
    assert union.logits == (a.logits or b.logits) and union.features == (a.features or b.features)
    for blocks in ("hidden", "attention", "qkv"):
        assert getattr(union, blocks) == getattr(a, blocks) | getattr(b, blocks)
        assert getattr(union.resolve(4), blocks) == {i % 4 for i in getattr(union, blocks)}
    assert bool(union) == (bool(a) or bool(b)) == (union != Needs())


@given(needs)
def test_the_blocks_that_run_end_with_the_last_that_is_read(asked: Needs) -> None:
    read = [i % 4 for i in asked.hidden | asked.attention | asked.qkv]
    whole = asked.logits or asked.features
    assert asked.num_blocks(4) == (4 if whole else max(read, default=-1) + 1)


@pytest.mark.parametrize("kind", ["hidden", "attention", "qkv"])
@pytest.mark.parametrize("block", [4, -5])
def test_a_block_that_does_not_exist_is_refused(kind: str, block: int) -> None:
    with pytest.raises(IndexError, match=f"block {block} does not exist: the model has 4"):
        Needs(**{kind: frozenset({block})}).resolve(4)
