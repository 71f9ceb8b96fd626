"""k-NN and the linear probe are what their definitions say, whatever the features' scale and order."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitdistill.errors import ConfigError, DataError
from vitdistill.evaluate import knn, linear
from vitdistill.evaluate.knn import knn_accuracy, knn_votes
from vitdistill.evaluate.linear import fit_logistic, linear_probe

seeds = st.integers(0, 10**6)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(seed: int, count: int, num: int) -> Tensor:
    """Labels in which every class comes up."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % num


def task(seed: int, dim: int, num: int, sizes: tuple[int, int], signal: float = 0.0) -> list:
    """Noise with labels, to learn from and to judge by; each class's own feature is raised."""
    made = []
    for offset, size in enumerate(sizes):
        labels = labels_of(seed + offset, size, num)
        x = noise(seed + offset, size, dim)
        made += [x + signal * F.one_hot(labels, dim) if signal else x, labels]
    return made


# --- k nearest neighbours ------------------------------------------------------------------------


def slow_votes(
    bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int, k: int, temperature: float
) -> np.ndarray:
    """The definition, one query at a time in float64: the nearest first, equals at the k-th place
    share what is left.
    """
    rows, asked = (x.double().numpy() for x in (bank, queries))
    votes = np.zeros((len(asked), num_classes))
    for q, query in enumerate(asked):
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
        similar = np.where(lengths > 0, rows @ query / np.where(lengths > 0, lengths, 1), 0)
        order = sorted(similar, reverse=True)
        last, nearest = order[k - 1], order[0]
        above = similar > last + 1e-6
        equal = np.abs(similar - last) <= 1e-6
        for i, label in enumerate(labels.tolist()):
            place = 1.0 if above[i] else (k - above.sum()) / equal.sum() if equal[i] else 0.0
            votes[q, label] += place * math.exp((similar[i] - nearest) / temperature)
    return votes


@given(
    seed=seeds,
    size=st.integers(1, 40),
    k=st.integers(1, 40),
    temperature=st.sampled_from([0.07, 0.5, 5.0]),
    duplicates=st.booleans(),
)
def test_votes_are_their_definition_in_any_order(seed, size, k, temperature, duplicates):
    """With duplicates: of other labels, and rows of zeros, so that nearly every k cuts equals."""
    k, generator = min(k, size), torch.Generator().manual_seed(seed)
    bank, queries, labels = noise(seed, size, 5), noise(seed + 1, 9, 5), labels_of(seed, size, 4)
    if duplicates:
        bank, queries = bank[:, :2].round().clip(-1, 1), queries[:, :2].round().clip(-1, 1)
    votes = knn_votes(bank, labels, queries, 4, k, temperature)
    expected = slow_votes(bank, labels, queries, 4, k, temperature)
    np.testing.assert_allclose(votes.numpy(), expected, rtol=1e-4, atol=1e-6)
    order = torch.randperm(size, generator=generator)
    shuffled = knn_votes(bank[order], labels[order], queries, 4, k, temperature)
    torch.testing.assert_close(shuffled, votes, rtol=1e-4, atol=1e-6)


def test_accuracy_counts_the_votes_in_chunks_of_any_size(monkeypatch):
    bank, labels, queries, truth = task(0, 3, 9, (80, 60))
    votes = slow_votes(bank, labels, queries, 9, 20, 0.07)
    ranked = np.argsort(-votes, axis=1, kind="stable")
    right = (ranked == truth.numpy()[:, None]) & (np.take_along_axis(votes, ranked, 1) > 0)
    expected = {"knn_top1": right[:, 0].mean(), "knn_top5": right[:, :5].any(1).mean()}
    assert 0 < expected["knn_top1"] < expected["knn_top5"] < 1
    for size in (knn._SIMILARITIES, 1, 100, 80 * 32):
        monkeypatch.setattr(knn, "_SIMILARITIES", size)
        assert knn_accuracy(bank, labels, queries, truth) == pytest.approx(expected)


def test_a_class_without_votes_is_never_right():
    points, labels = torch.eye(7), torch.arange(7)
    for truth, right in ((labels, 1.0), ((labels + 1) % 7, 0.0), (labels + 7, 0.0)):
        found = knn_accuracy(points, labels, points, truth, k=1)
        assert found == {"knn_top1": right, "knn_top5": right}


@pytest.mark.parametrize("k", [0, 41])
def test_impossible_neighbours_are_refused(k):
    with pytest.raises(ConfigError) as caught:
        knn_accuracy(*task(0, 3, 4, (40, 20)), k=k)
    assert caught.value.field == "knn"


# --- both probes ---------------------------------------------------------------------------------


@given(seed=seeds, num=st.integers(2, 12))
def test_classes_that_lie_apart_are_all_right(seed, num):
    args = task(seed, 12, num, (60, 30), signal=20.0)
    scores = knn_accuracy(*args, k=60 // num // 2 or 1)
    assert set(scores.values()) == {1.0} and ("knn_top5" in scores) == (num > 5)
    assert linear_probe(*args)["linear_top1"] == 1.0


def test_labels_that_mean_nothing_are_guessed():
    args = task(0, 16, 10, (1000, 1000))
    assert 0.06 < knn_accuracy(*args)["knn_top1"] < 0.14  # chance 0.1, four standard errors
    assert 0.06 < linear_probe(*args)["linear_top1"] < 0.14


def test_features_that_have_collapsed_answer_with_the_commonest_class():
    labels, truth = torch.tensor([0] * 10 + [1] * 30), torch.tensor([1] * 8 + [0] * 2)
    for judge in (knn_accuracy, linear_probe):
        scores = judge(torch.ones(40, 5), labels, torch.ones(10, 5), truth)
        assert next(iter(scores.values())) == 0.8


def test_a_feature_that_was_constant_but_for_rounding_says_nothing_later():
    bank, labels, queries, truth = task(0, 6, 3, (90, 60), signal=2.0)
    expected = linear_probe(bank, labels, queries, truth)["linear_top1"]
    constant, loud = 1 + 1e-7 * noise(1, 90, 1), 1 + noise(2, 60, 1)
    assert 0 < constant.std() < 1e-6
    args = torch.cat([bank, constant], 1), labels, torch.cat([queries, loud], 1), truth
    assert linear_probe(*args)["linear_top1"] == expected > 0.8


@pytest.mark.parametrize("judge", [knn_accuracy, linear_probe])
def test_unlabelled_images_are_left_out(judge):
    bank, labels, queries, truth = task(0, 3, 4, (40, 20))
    some, asked = torch.arange(40) % 3 > 0, torch.arange(20) % 4 > 0
    expected = judge(bank[some], labels[some], queries[asked], truth[asked])
    assert judge(bank, labels.where(some, -1), queries, truth.where(asked, -1)) == expected
    with pytest.raises(DataError, match="validation image"):
        judge(bank, labels, queries, torch.full_like(truth, -1))
    with pytest.raises(DataError, match="training image"):
        judge(bank, torch.full_like(labels, -1), queries, truth)


# --- linear probe --------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_regression_is_at_its_minimum(l2):
    """Against scikit-learn's, whose C is 1 / (images x l2); and no slope is left."""
    from sklearn.linear_model import LogisticRegression

    x, y, *_ = task(0, 8, 4, (300, 1), signal=1.5)
    weight, bias = fit_logistic(x, y, 4, l2)
    theirs = LogisticRegression(C=1 / (300 * l2), tol=1e-10, max_iter=5000).fit(x.double(), y)

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(x.double() @ weight + bias, y) + l2 / 2 * weight.square().sum()

    parts = [part.double().requires_grad_() for part in (weight, bias)]
    found = loss(*parts)
    found.backward()
    assert all(part.grad.abs().max() < 1e-4 for part in parts)
    least = loss(torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_))
    assert found.item() == pytest.approx(least.item(), abs=1e-6)
    centred, tolerance = weight - weight.mean(1, keepdim=True), 2e-2 if l2 < 1e-3 else 2e-3
    np.testing.assert_allclose(centred.numpy(), theirs.coef_.T, atol=tolerance)


def test_chunks_and_starts_do_not_move_the_minimum(monkeypatch):
    x, y, *_ = task(0, 6, 3, (200, 1), signal=1.0)
    weight, bias = fit_logistic(x, y, 3, 1e-2)
    monkeypatch.setattr(linear, "_LOGITS", 3 * 7)
    start = noise(1, 6, 3), noise(2, 3)
    for begin in (None, start):
        other, shift = fit_logistic(x, y, 3, 1e-2, begin)
        torch.testing.assert_close(other, weight, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(shift - shift.mean(), bias - bias.mean(), atol=1e-3, rtol=1e-3)
    assert torch.equal(start[0], noise(1, 6, 3)) and torch.equal(start[1], noise(2, 3))


@settings(max_examples=15)
@given(seed=seeds)
def test_the_probe_repeats_itself_and_sees_no_shift_and_no_unit(seed):
    bank, labels, queries, truth = task(seed, 5, 3, (60, 40), signal=1.0)
    found = linear_probe(bank, labels, queries, truth)
    assert linear_probe(bank, labels, queries, truth) == found
    units, shift = 10.0 ** torch.arange(-2, 3), 8 * noise(seed + 2, 5).round()
    other = linear_probe((bank + shift) * units, labels, (queries + shift) * units, truth)
    # Rounding may choose another penalty.
    assert other["linear_top1"] == pytest.approx(found["linear_top1"], abs=3.5 / 40)


def test_the_penalty_is_chosen_by_held_out_images():
    """Many noisy features need a strong one, many images of a clear rule a weak one."""
    loud = noise(0, 200, 60)
    guess = (loud[:, 0] + noise(50, 200) > 0).long()
    sharp = noise(2, 2000, 3)
    truth = (sharp @ torch.tensor([1.0, 0.5, 0.1]) > 1.5).long()
    weak = linear_probe(sharp[:1500], truth[:1500], sharp[1500:], truth[1500:])
    assert linear_probe(loud, guess, loud, guess)["linear_l2"] >= 1e-2
    assert weak["linear_l2"] <= 1e-3 and weak["linear_top1"] > 0.98
