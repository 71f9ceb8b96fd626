"""Token relations: which tokens are alike in one block, whatever the networks' widths and heads."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_vits import DISTILLED, NO_CLASS, kept, loss_of, network, outputs, randn, vit

from vitdistill.errors import ConfigError
from vitdistill.methods.relations import Relations, relation_heads, relation_loss

seeds = st.integers(0, 10**6)


# --- the formula ---------------------------------------------------------------------------------


def test_the_formula_by_hand() -> None:
    """One image, two tokens, width 4 in two relation heads against width 2 in two."""
    ours, its = [[1.0, 0.0, 2.0, 1.0], [0.0, 1.0, -1.0, 0.5]], [[1.0, -1.0], [2.0, 0.5]]
    total = 0.0
    for head in range(2):
        mine, other = (
            [row[2 * head : 2 * head + 2] for row in ours],
            [row[head : head + 1] for row in its],
        )
        for i in range(2):
            p = [
                math.exp(sum(x * y for x, y in zip(mine[i], row, strict=True)) / math.sqrt(2))
                for row in mine
            ]
            q = [math.exp(sum(x * y for x, y in zip(other[i], row, strict=True))) for row in other]
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            total += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)) / 4
    student, teacher = torch.tensor([ours]), torch.tensor([its])
    assert relation_loss(student, student, teacher, teacher, 2).item() == pytest.approx(
        total, abs=1e-6
    )


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


@given(seed=seeds)
def test_relations_of_a_teacher_wider_by_repetition_are_its_own(seed: int) -> None:
    """Twice the channels, divided by the fourth root of 2, in the same number of relation heads:
    the same products and scale.
    """
    q, k = randn(seed, 2, 5, 6), randn(seed + 1, 2, 5, 6)
    wide = [x.unflatten(2, (2, 3)).repeat(1, 1, 1, 2).flatten(2) / 2**0.25 for x in (q, k)]
    assert abs(relation_loss(q, k, wide[0], wide[1], 2).item()) < 1e-5


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


@torch.no_grad()
def test_a_network_has_no_loss_against_itself() -> None:
    objective = Relations(relations=("qk", "vv", "kq"))
    for form in ({}, NO_CLASS, {"name": DISTILLED}, {"reg_tokens": 2, **NO_CLASS}):
        model = vit(0, **form)
        assert loss_of(objective, model, model).item() == pytest.approx(0, abs=1e-6)
        assert loss_of(objective, model, vit(1, **form)).item() > 1e-3


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


def test_what_cannot_be_split_is_refused_and_what_is_chosen_is_said() -> None:
    student, teacher = network(vit(0), "student"), network(vit(1, embed_dim=36, num_heads=6))
    with pytest.raises(ConfigError, match="student is 24 wide, which does not split into 9"):
        Relations(num_heads=9).check(student, teacher)
    with pytest.raises(ConfigError, match="teacher is 36 wide, which does not split into 8"):
        Relations(num_heads=8).check(student, teacher)
    Relations(num_heads=12).check(student, teacher)
    assert Relations().describe(student, teacher, None) == "qk and vv in 6 relation heads"
    assert "in 12 relation heads, compared at the 5 of 16" in Relations(num_heads=12).describe(
        student, teacher, 5
    )
