"""Token relations: which tokens are alike in one block, whatever the networks' widths and heads."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_vits import DISTILLED, kept, loss_of, network, outputs, randn, vit

from vitdistill.errors import ConfigError
from vitdistill.methods.relations import Relations, relation_heads, relation_loss

seeds = st.integers(0, 10**6)


# --- the formula ---------------------------------------------------------------------------------


@given(seed=seeds, heads=st.integers(1, 3), width=st.integers(1, 4), tokens=st.integers(2, 6))
def test_equal_relations_have_no_loss_and_other_relations_have(
    seed: int, heads: int, width: int, tokens: int
) -> None:
    """Turning every head's vectors by one rotation keeps their relations."""
    q, k, other = (2 * randn(seed + i, 2, tokens, heads * width) for i in range(3))
    turn = torch.linalg.qr(randn(seed + 3, width, width)).Q
    turned = [(x.unflatten(2, (heads, width)) @ turn).flatten(2) for x in (q, k)]
    assert abs(relation_loss(*turned, q, k, heads).item()) < 1e-4
    assert relation_loss(q, other, q, k, heads).item() > 1e-5


@given(student=st.integers(1, 64), teacher=st.integers(1, 64), heads=st.integers(1, 16))
def test_relation_heads_split_both_widths(student: int, teacher: int, heads: int) -> None:
    count = relation_heads(student, heads * teacher, heads)
    assert count <= heads and student % count == 0 and heads * teacher % count == 0
    assert count == heads or student % heads != 0
    assert not any(
        student % more == 0 and heads * teacher % more == 0 for more in range(count + 1, heads + 1)
    )


def test_large_vectors_stay_finite() -> None:
    ours, its = (100 * randn(0, 2, 4, 6)).requires_grad_(), 100 * randn(1, 2, 4, 6)
    loss = relation_loss(ours, ours, its, its, 2)
    loss.backward()
    assert loss.isfinite() and loss > 0 and ours.grad is not None and ours.grad.isfinite().all()


# --- as an objective -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads", [None, 2, 6, 12])
@torch.no_grad()
def test_kept_patches_by_hand(num_heads: int | None) -> None:
    """A student with class and distillation token; a teacher of other width, depth and heads that
    sees 5 patches.
    """
    student, teacher, keep = (
        vit(0, DISTILLED, depth=2),
        vit(1, embed_dim=36, depth=4, num_heads=3, reg_tokens=1),
        kept(5),
    )
    objective = Relations(block=0, teacher_block=-2, relations=("qk", "vv"), num_heads=num_heads)
    count = num_heads or 3
    ours, its = outputs(objective, student, teacher, keep)
    total = 0.0
    for b in range(3):
        for row, column in ((0, 1), (2, 2)):
            mine = [
                ours.qkv[0][i][b].transpose(0, 1).flatten(1)[[0, *(2 + keep[b]).tolist()]]
                for i in (row, column)
            ]
            other = [
                its.qkv[2][i][b].transpose(0, 1).flatten(1)[[0, 2, 3, 4, 5, 6]]
                for i in (row, column)
            ]
            for head in range(count):
                (a, c), (d, e) = (
                    [x.chunk(count, dim=1)[head] for x in pair] for pair in (mine, other)
                )
                p, q = (
                    (a @ c.T / math.sqrt(24 / count)).softmax(-1),
                    (d @ e.T / math.sqrt(36 / count)).softmax(-1),
                )
                total += (q * (q / p).log()).sum(-1).mean().item() / (3 * 2 * count)
    assert loss_of(objective, student, teacher, keep).item() == pytest.approx(total, rel=1e-4)


def test_what_cannot_be_split_is_refused() -> None:
    student, teacher = network(vit(0), "student"), network(vit(1, embed_dim=36, num_heads=6))
    Relations(num_heads=12).check(student, teacher)
    for wrong in (9, 8):  # which do not divide the student's 24, the teacher's 36
        with pytest.raises(ConfigError) as caught:
            Relations(num_heads=wrong).check(student, teacher)
        assert caught.value.field == "num_heads"
