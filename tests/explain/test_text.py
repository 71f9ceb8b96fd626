"""Plans in words."""

from dataclasses import replace

import pytest
from small_vits import CNN, STUDENT, TEACHER

from vitdistill.explain.text import describe_needs
from vitdistill.vit.needs import Needs
from vitdistill.vit.network import Network

POOLED = replace(STUDENT, reads_class_token=False, final_norm=False)
LAST, EARLY = Needs(attention=frozenset({11})), Needs(hidden=frozenset({0, 3}))


@pytest.mark.parametrize(
    ("network", "needs", "keep", "words"),
    [
        (STUDENT, Needs(logits=True) | LAST, None, "196 of 196 patches; 12 of 12 blocks; records"),
        (STUDENT, Needs(logits=True) | LAST, None, "logits and class-token attention of block 11"),
        (TEACHER, EARLY, 64, "64 of 256 patches; 4 of 8 blocks; records hidden states after block"),
        (CNN, Needs(logits=True), None, "records logits"),
        (CNN, Needs(features=True), None, "records the last feature map"),
        (POOLED, LAST, None, "block 11 (whose class token its prediction does not read"),
        (
            POOLED,
            Needs(features=True),
            None,
            "final features, before its norm, which follows the pool",
        ),
        (STUDENT, Needs(features=True), None, "final features"),
        (replace(STUDENT, attention_source="mean"), LAST, None, "mean attention of block 11"),
        (TEACHER, Needs(qkv=frozenset({3, 1})), 64, "queries, keys and values of block 1, 3"),
    ],
)
def test_plans_are_described_in_words(
    network: Network, needs: Needs, keep: int | None, words: str
) -> None:
    assert words in describe_needs(network, needs, keep)
