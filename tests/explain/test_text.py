"""Plans in words."""

from dataclasses import replace

from small_vits import CNN, STUDENT, TEACHER

from vitdistill.explain.text import describe_needs
from vitdistill.vit.needs import Needs


def test_plans_are_described_in_words() -> None:
    needs = Needs(logits=True, attention=frozenset({11}))
    assert (
        describe_needs(STUDENT, needs, None)
        == "196 of 196 patches; 12 of 12 blocks; records logits and class-token attention of"
        " block 11"
    )
    early = Needs(hidden=frozenset({0, 3}))
    assert (
        describe_needs(TEACHER, early, 64)
        == "64 of 256 patches; 4 of 8 blocks; records hidden states after block 0, 3"
    )
    assert describe_needs(CNN, Needs(logits=True), None) == "records logits"
    pooled = replace(STUDENT, reads_class_token=False, final_norm=False)
    assert describe_needs(pooled, needs, None).endswith(
        "class-token attention of block 11 (whose class token its prediction does not read: that of"
        " an earlier block is trained)"
    )
    assert describe_needs(pooled, Needs(attention=frozenset({10})), None).endswith(
        "class-token attention of block 10"
    )
    assert "records features before its norm, which follows the pool" in describe_needs(
        pooled, Needs(features=True), None
    )
    assert "records features after the final norm" in describe_needs(
        STUDENT, Needs(features=True), None
    )
    mean = replace(STUDENT, attention_source="mean")
    assert "mean attention of block 11" in describe_needs(mean, needs, None)


def test_features_and_queries_are_described_in_words() -> None:
    needs = Needs(hidden=frozenset({0}), qkv=frozenset({3, 1}), features=True)
    assert (
        describe_needs(TEACHER, needs, 64)
        == "64 of 256 patches; 8 of 8 blocks; records hidden states after block 0 and features"
        " after the final norm and queries, keys and values of block 1, 3"
    )
    assert describe_needs(CNN, Needs(features=True), None) == "records the last feature map"
